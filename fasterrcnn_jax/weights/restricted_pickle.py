"""Pickles read without running what they ask for.

A pickle is a program that calls whatever it names. Here a name leads to a stand-in that we wrote, or nowhere: no module
is imported, no attribute looked up. Nor is a length believed: the instructions are walked through before they run.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from fasterrcnn_jax.errors import InputError


class _Dict(dict):
    """Stands in for an ordered dictionary; torch's attribute of versions is dropped."""

    def __setstate__(self, state: object) -> None:
        del state


def ordered_dict() -> Callable:
    """Returns a stand-in for `collections.OrderedDict`."""
    # Python 2 gives the items as an argument.
    return lambda items=(): _Dict(items)


def unpickle(
    file: io.BytesIO,
    names: Mapping[str, Callable | str],
    *,
    where: str,
    encoding: str = "utf-8",
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns the object of the pickle that starts at the file's position, and leaves the file behind it.

    Args:
      names: what `module.name` in the pickle stands for.
      where: names the pickle in errors.
      encoding: of the byte strings that Python 2 wrote.
      persistent: gives the object of a persistent id.
    Raises:
      InputError: the pickle asks for another name, or is damaged.
    """
    try:
        _walk(file, where)
        return _Unpickler(file, names, where, encoding, persistent).load()
    except InputError:
        raise
    except Exception as error:  # the instructions of a damaged pickle can fail in any way
        raise InputError(f"{where}: damaged ({type(error).__name__}: {error})") from error


def _walk(file: io.BytesIO, where: str) -> None:
    """Finds lengths that the file does not have, which would be allocated; each instruction's own is checked."""
    start, size = file.tell(), len(file.getbuffer())
    for instruction, argument, position in pickletools.genops(file):
        # The pickle's memory is as long as its largest index, a frame as long as it says.
        beyond = argument > size if "PUT" in instruction.name or instruction.name == "FRAME" else False
        # What the copyreg registry numbers comes out of a cache, past `find_class`.
        if beyond or instruction.name.startswith("EXT"):
            raise InputError(f"{where}: damaged ({instruction.name} {argument} at byte {position})")
    file.seek(start)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, names, where, encoding, persistent):
        super().__init__(file, encoding=encoding)
        self.names, self.where, self.persistent = names, where, persistent

    def find_class(self, module: str, name: str) -> Callable | str:
        full = f"{module}.{name}"
        if full not in self.names:
            raise InputError(f"{self.where}: asks for {full}, which no file of weights needs; nothing of it was run")
        return self.names[full]

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise InputError(f"{self.where}: refers to an object outside the pickle")
        return self.persistent(pid)
