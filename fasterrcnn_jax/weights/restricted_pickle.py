"""Reads pickles without running their code.

A pickle is a program that can call any function by name. This interpreter runs a part of its instructions. Every name
leads to a function of ours or to `Unknown`: no module is imported and no attribute is looked up. `pickletools` reads
each instruction from the file, once, so that no second reader can see another program.

A small pickle costs little memory and time: nothing is allocated because of a stated length, keys have a bounded cost,
and no step visits a nested structure.
"""

import dataclasses
import io
import pickle
import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fasterrcnn_jax.errors import InputError

# A number of more bits is no value of a training program, and Python refuses to print one of 4300 digits.
MAX_BITS = 2048
# Larger keys and memo numbers can have equal hashes, and a dictionary of such keys takes quadratic time.
KEY_LIMIT = 2**60


@dataclasses.dataclass(frozen=True, eq=False)
class Unknown:
    """Stands for a class or function that we do not know, and for every object that it would make."""

    name: str


def ordered_dict(items: Iterable[Any] = ()) -> dict:
    """Replaces `collections.OrderedDict`; pickles of Python 2 give the items as an argument."""
    made = {}
    for key, value in items:
        _set(made, key, value)
    return made


def is_size(value: Any) -> bool:
    """Returns whether the value is a number of elements that an address can count."""
    return type(value) is int and 0 <= value < 2**63


def is_shape(value: Any) -> bool:
    """Returns whether the value is a sequence of sizes that NumPy can have as a shape or as strides."""
    return isinstance(value, tuple | list) and len(value) <= 64 and all(map(is_size, value))


def unpickle(
    file: io.BytesIO,
    names: Mapping[str, Callable | str],
    *,
    where: str,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns the object of the pickle that starts at the file's position, and leaves the position after the pickle.

    Objects of other classes than those in `names` are `Unknown`. Sets become lists, and dictionaries lose entries whose
    key is neither text nor a small number.

    Args:
      names: replacement of each `module.name` that weights need.
      where: name of the pickle for messages.
      persistent: function from a persistent id to its object; None: persistent ids are an error.

    Raises:
      InputError: the pickle is damaged.
    """
    machine = _Machine(names, persistent, allowance=2 * len(file.getbuffer()))
    try:
        for instruction, argument, _ in pickletools.genops(file):
            INSTRUCTIONS[instruction.name](machine, argument)
        return machine.stack.pop()
    except Exception as error:  # the instructions of a damaged pickle can fail in any way
        raise InputError(f"{where}: the pickle is damaged ({type(error).__name__}: {str(error)[:200]})") from error


KEYS = (str, Unknown, type(None))


class _Machine:
    """The stack and the memo of a pickle, and the objects that its names stand for."""

    def __init__(self, names: Mapping[str, Callable | str], persistent: Callable | None, allowance: int):
        self.names, self.persistent, self.allowance = names, persistent, allowance
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> list[Any]:
        """Removes and returns the last `count` objects."""
        if count > len(self.stack):
            raise ValueError("an instruction without its arguments")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def take_to_mark(self) -> list[Any]:
        return self.take(max(0, len(self.stack) - self.marks.pop()))

    def find(self, module: Any, name: Any) -> Callable | str | Unknown:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        full = f"{module}.{name}"
        return self.names.get(full, Unknown(full))

    def call(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Unknown):
            return function
        if not callable(function) or not isinstance(arguments, tuple):
            raise ValueError(f"a call of {type(function).__name__}")
        self.pay(arguments)
        unknown = [argument for argument in arguments if isinstance(argument, Unknown)]
        return unknown[0] if unknown else function(*arguments)

    def build(self, made: Any, state: Any) -> None:
        """Gives an array or its type the state; attributes of other objects are dropped."""
        if hasattr(made, "__setstate__"):
            self.pay(state)
            made.__setstate__(state)

    def pay(self, arguments: Any) -> None:
        """Raises ValueError where a pickle gives one long object to many calls, each of which would copy it."""
        self.allowance -= len(arguments)
        self.allowance -= sum(len(argument) for argument in arguments if isinstance(argument, str | list | tuple))
        if self.allowance < 0:
            raise ValueError("its calls have more arguments than the file has bytes")


def _set(target: dict, key: Any, value: Any) -> None:
    if isinstance(key, KEYS) or (isinstance(key, int) and abs(key) < KEY_LIMIT):
        target[key] = value


def _set_items(target: Any, items: list[Any]) -> None:
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set(target, key, value)
    elif not isinstance(target, Unknown):
        raise ValueError(f"items for {type(target).__name__}")


def _set_items_to_mark(machine: _Machine, _: None) -> None:
    items = machine.take_to_mark()
    _set_items(machine.stack[-1], items)


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target += items
    elif not isinstance(target, Unknown):
        raise ValueError(f"elements for {type(target).__name__}")


def _extend_to_mark(machine: _Machine, _: None) -> None:
    items = machine.take_to_mark()
    _extend(machine.stack[-1], items)


def _dictionary(items: list[Any]) -> dict:
    made = {}
    _set_items(made, items)
    return made


def _start(machine: _Machine, version: int) -> None:
    if version > pickle.HIGHEST_PROTOCOL:
        raise ValueError(f"protocol {version}")


def _push(machine: _Machine, value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError(f"a number of {value.bit_length()} bits")
    machine.stack.append(value)


def _pop(machine: _Machine, _: None) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _memorise(machine: _Machine, index: int | None) -> None:
    index = len(machine.memo) if index is None else index
    if not 0 <= index < KEY_LIMIT:
        raise ValueError(f"memo entry {index}")
    machine.memo[index] = machine.stack[-1]


def _frozen(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(tuple(machine.take(count)))


def _made(make: Callable[[_Machine, Any], Any]) -> Callable[[_Machine, Any], None]:
    """Returns the instruction that puts what `make` returns on the stack."""
    return lambda machine, argument: machine.stack.append(make(machine, argument))


def _find(machine: _Machine, names: str) -> Callable | str | Unknown:
    return machine.find(*names.split(" ", 1))


def _called_name(machine: _Machine, names: str) -> Any:
    return machine.call(_find(machine, names), tuple(machine.take_to_mark()))


def _called_object(machine: _Machine, _: None) -> Any:
    function, *arguments = machine.take_to_mark()
    return machine.call(function, tuple(arguments))


def _called_with_names(machine: _Machine, _: None) -> Any:
    function, _, _ = machine.take(3)
    if not isinstance(function, Unknown):
        raise ValueError("a call with named arguments")
    return function


def _outside(machine: _Machine, pid: Any) -> Any:
    if machine.persistent is None:
        raise ValueError("it refers to an object outside of it")
    return machine.persistent(pid)


INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _start,
    "FRAME": lambda machine, size: None,
    "STOP": lambda machine, _: None,
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), _push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _push),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _push),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"), _push),
    "NONE": _made(lambda machine, _: None),
    "NEWTRUE": _made(lambda machine, _: True),
    "NEWFALSE": _made(lambda machine, _: False),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": _pop,
    "POP_MARK": lambda machine, _: machine.take_to_mark().clear(),
    "DUP": _made(lambda machine, _: machine.stack[-1]),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _made(lambda machine, index: machine.memo[index])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _memorise),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), _made(lambda machine, _: [])),
    **dict.fromkeys(("LIST", "FROZENSET"), _made(lambda machine, _: machine.take_to_mark())),
    "APPEND": lambda machine, _: _extend(machine.stack[-2], machine.take(1)),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), _extend_to_mark),
    "EMPTY_TUPLE": _frozen(0),
    "TUPLE1": _frozen(1),
    "TUPLE2": _frozen(2),
    "TUPLE3": _frozen(3),
    "TUPLE": _made(lambda machine, _: tuple(machine.take_to_mark())),
    "EMPTY_DICT": _made(lambda machine, _: {}),
    "DICT": _made(lambda machine, _: _dictionary(machine.take_to_mark())),
    "SETITEM": lambda machine, _: _set_items(machine.stack[-3], machine.take(2)),
    "SETITEMS": _set_items_to_mark,
    "GLOBAL": _made(_find),
    "STACK_GLOBAL": _made(lambda machine, _: machine.find(*machine.take(2))),
    "INST": _made(_called_name),
    "OBJ": _made(_called_object),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _made(lambda machine, _: machine.call(*machine.take(2)))),
    "NEWOBJ_EX": _made(_called_with_names),
    "BUILD": lambda machine, _: machine.build(machine.stack[-2], *machine.take(1)),
    "PERSID": _made(_outside),
    "BINPERSID": _made(lambda machine, _: _outside(machine, *machine.take(1))),
}
