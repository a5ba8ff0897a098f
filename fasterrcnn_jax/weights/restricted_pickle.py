"""Reads pickles without running their code.

A pickle is a program that can call any function by name. Here every name is replaced by our own function or refused: no
module is imported and no attribute is looked up. Lengths are not trusted either: all instructions are checked before
they run.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from fasterrcnn_jax.errors import InputError


class _Dict(dict):
    """Replaces an ordered dictionary; drops torch's attribute with versions."""

    def __setstate__(self, state: object) -> None:
        del state


def ordered_dict() -> Callable:
    """Returns a replacement for `collections.OrderedDict`."""
    # Pickles of Python 2 give the items as an argument.
    return lambda items=(): _Dict(items)


def unpickle(
    file: io.BytesIO,
    names: Mapping[str, Callable | str],
    *,
    where: str,
    encoding: str = "utf-8",
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns the object of the pickle that starts at the file's position, and leaves the position after the pickle.

    Args:
      names: replacement of each `module.name` that the pickle may use.
      where: name of the pickle for messages.
      encoding: encoding of byte strings that Python 2 wrote.
      persistent: function from a persistent id to its object; None: persistent ids are an error.

    Raises:
      InputError: the pickle uses a name that is not in `names`, or is damaged.
    """
    try:
        _walk(file, where)
        return _Unpickler(file, names, where, encoding, persistent).load()
    except InputError:
        raise
    except Exception as error:  # the instructions of a damaged pickle can fail in any way
        raise InputError(f"{where}: the pickle is damaged ({type(error).__name__}: {error})") from error


def _walk(file: io.BytesIO, where: str) -> None:
    """Raises InputError for instructions that would allocate more than the file's size; `genops` checks all others."""
    start, size = file.tell(), len(file.getbuffer())
    for instruction, argument, position in pickletools.genops(file):
        # The unpickler allocates its memo up to the largest index, and a frame with the length it states.
        is_size = "PUT" in instruction.name or instruction.name == "FRAME"
        beyond = is_size and argument is not None and argument > size
        # EXT instructions take objects from the cache of the copyreg registry, without `find_class`.
        if beyond or instruction.name.startswith("EXT"):
            raise InputError(f"{where}: the pickle is damaged ({instruction.name} {argument} at byte {position})")
    file.seek(start)


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        file: io.BytesIO,
        names: Mapping[str, Callable | str],
        where: str,
        encoding: str,
        persistent: Callable[[Any], Any] | None,
    ):
        super().__init__(file, encoding=encoding)
        self.names, self.where, self.persistent = names, where, persistent

    def find_class(self, module: str, name: str) -> Callable | str:
        full = f"{module}.{name}"
        if full not in self.names:
            raise InputError(f"{self.where}: refused, it uses {full}, which no weights file needs; no code was run")
        return self.names[full]

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise InputError(f"{self.where}: the pickle refers to an object outside of it")
        return self.persistent(pid)
