"""An interpreter of pickles with bounded memory and time, which calls nothing but the functions that it is given.

A pickle is a program for a stack machine. Python's own interpreter runs any function that the program
names. Even one that is restricted to a few names, such as `torch.load(weights_only=True)`, has no
limits: in C, nine bytes ask for a memo of 13 GB; in Python, three hundred bytes build a nested tuple
whose hash, as the key of a dictionary, takes 2**60 steps. Here:

- a name leads to one of the `makers`, or the pickle is refused;
- the memo is a dictionary, and no read asks for more bytes than the file has left;
- keys of dictionaries are plain values, and there are no sets, so nothing nested is ever hashed;
- what makers build from values that are already there, such as an array from bytes, is charged to a
  budget that is proportional to the size of the file.
"""

from __future__ import annotations

import codecs
import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

_OPCODES = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}
_KEYS = (str, bytes, bool, type(None))
_MAX_INT_KEY = 2**31  # larger numbers may all have one hash
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ]
)
_IGNORED = ("PROTO", "FRAME")
_NEW: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FROM_MARK: dict[str, Callable[[list[Any]], Any]] = {"LIST": list, "TUPLE": tuple}

_MIN_BUDGET, _BUDGET_PER_BYTE = 2**20, 4


class Budget:
    """Units (bytes or elements) that makers may still build."""

    def __init__(self, file_size: int) -> None:
        self.left = _MIN_BUDGET + _BUDGET_PER_BYTE * file_size

    def spend(self, units: int) -> None:
        """Raises UnpicklingError where the budget is exceeded."""
        self.left -= units
        if self.left < 0:
            raise pickle.UnpicklingError("its objects are far larger than the file")


@dataclass(frozen=True)
class Name:
    """A function or a class that the pickle names, `module.name`. It is never the object itself."""

    name: str


Maker = Callable[..., Any]  # (budget, *arguments) -> value


class _Bounded:
    """A file of which no read asks for more bytes than are left."""

    def __init__(self, file: IO[bytes], end: int) -> None:
        self.file = file
        self.end = end
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        left = self.end - self.file.tell()
        return self.file.read(min(count, left))


class _Machine:
    """The stack, the memo and what the opcodes do with them."""

    def __init__(
        self,
        makers: Mapping[str, Maker | None],
        persistent_load: Callable[[Any], Any] | None,
        budget: Budget,
    ) -> None:
        self.makers = makers
        self.persistent_load = persistent_load
        self.budget = budget
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}
        self.actions: dict[str, Callable[[Any], None]] = {
            "MARK": self._mark,
            "POP": self._pop,
            "POP_MARK": self._pop_mark,
            "DUP": lambda _: self.stack.append(self.stack[-1]),
            "APPEND": lambda _: self._append([self.stack.pop()]),
            "APPENDS": lambda _: self._append(self._drop_mark()),
            "DICT": self._dict,
            "SETITEM": self._set_item,
            "SETITEMS": lambda _: self._set_items(self._drop_mark()),
            "GLOBAL": lambda words: self._push_name(*words.split(" ", 1)),
            "STACK_GLOBAL": self._stack_global,
            "REDUCE": self._reduce,
            "NEWOBJ": self._reduce,
            "BUILD": self._build,
            "PERSID": self._persistent,
            "BINPERSID": lambda _: self._persistent(self.stack.pop()),
            "MEMOIZE": lambda _: self._put(len(self.memo)),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(
                ("GET", "BINGET", "LONG_BINGET"), lambda index: self.stack.append(self.memo[index])
            ),
        }

    def step(self, opcode: str, argument: Any) -> None:
        """Does what an opcode asks for."""
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _NEW:
            self.stack.append(_NEW[opcode]())
        elif opcode in _TUPLES:
            self._tuple(_TUPLES[opcode])
        elif opcode in _FROM_MARK:
            items = self._drop_mark()
            self.stack.append(_FROM_MARK[opcode](items))
        elif opcode in self.actions:
            self.actions[opcode](argument)
        elif opcode not in _IGNORED:
            raise pickle.UnpicklingError(f"the opcode {opcode}")

    def _mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def _pop_mark(self, _: Any) -> None:
        self._drop_mark()

    def _drop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def _pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._drop_mark()

    def _tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise pickle.UnpicklingError("a tuple of values that are not there")
        items = tuple(self.stack[-length:])
        self.stack[-length:] = [items]

    def _append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise pickle.UnpicklingError(f"items are appended to a {type(target).__name__}")
        target.extend(items)

    def _dict(self, _: Any) -> None:
        items = self._drop_mark()
        self.stack.append({})
        self._set_items(items)

    def _set_item(self, _: Any) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._set_items([key, value])

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise pickle.UnpicklingError(f"items are set in a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[plain_key(key)] = value

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _push_name(self, module: str, name: str) -> None:
        whole = f"{module}.{name}"
        if whole not in self.makers:
            raise pickle.UnpicklingError(f"it asks for {whole}")
        self.stack.append(Name(whole))

    def _stack_global(self, _: Any) -> None:
        name = self.stack.pop()
        module = self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise pickle.UnpicklingError("a name that is no text")
        self._push_name(module, name)

    def _reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        maker = self.makers[function.name] if isinstance(function, Name) else None
        if maker is None or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls something that is no function")
        self.stack.append(maker(self.budget, *arguments))

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if hasattr(target, "set_state"):
            target.set_state(self.budget, state)
        elif (
            not isinstance(target, dict)
            or not isinstance(state, dict)
            or not state.keys() <= {"_metadata"}
        ):
            # Only the versions of modules that a state dict has: any other attribute could replace a method.
            raise pickle.UnpicklingError(f"a {type(target).__name__} is given a state")

    def _persistent(self, identity: Any) -> None:
        if self.persistent_load is None:
            raise pickle.UnpicklingError("it refers to an object outside of the file")
        self.stack.append(self.persistent_load(identity))


def plain_key(key: Any) -> Any:
    """The key, if it is a plain value: a nested one may take exponential time to hash.

    Raises UnpicklingError."""
    if type(key) not in _KEYS and not (type(key) is int and abs(key) < _MAX_INT_KEY):
        raise pickle.UnpicklingError(f"a dictionary's key is a {type(key).__name__}")
    return key


def read_pickle(
    file: IO[bytes],
    makers: Mapping[str, Maker | None],
    persistent_load: Callable[[Any], Any] | None = None,
    file_size: int | None = None,
) -> Any:
    """The object of the pickle that begins at the position of `file`, which is then behind it.

    makers: function of each name that the pickle may use, called with the budget and the pickle's
    arguments; None for a name that is only a value. A made object's `set_state(budget, state)` takes
    the state that the pickle gives it. persistent_load: value of a persistent id. file_size: bytes
    that the budget is proportional to; by default those from here to the end. Raises UnpicklingError
    for what is refused, and any exception for a damaged pickle.
    """
    start = file.tell()
    end = file.seek(0, 2)
    file.seek(start)
    bounded = _Bounded(file, end)
    machine = _Machine(
        makers, persistent_load, Budget(end - start if file_size is None else file_size)
    )
    while True:
        code = bounded.read(1)
        if code not in _OPCODES:
            raise pickle.UnpicklingError("it is cut short" if not code else f"no opcode {code!r}")
        opcode = _OPCODES[code]
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.step(opcode.name, _argument(opcode, bounded))


def _argument(opcode: pickletools.OpcodeInfo, file: _Bounded) -> Any:
    if (
        opcode.name == "STRING"
    ):  # of Python 2: any byte, read as Latin-1 as the other kinds of strings are
        line = file.readline().strip()
        if len(line) < 2 or line[:1] not in b"'\"" or line[:1] != line[-1:]:
            raise pickle.UnpicklingError("a text without quotes")
        return codecs.escape_decode(line[1:-1])[0].decode("latin1")
    return None if opcode.arg is None else opcode.arg.reader(file)  # type: ignore[arg-type]


def shown(value: Any) -> str:
    """A value for a message: only a text itself, as lists of lists can be longer than memory."""
    return repr(value[:50]) if isinstance(value, str) else f"a {type(value).__name__}"


def make_dict(budget: Budget, items: Any = ()) -> dict[Any, Any]:
    """Maker of dictionaries (`OrderedDict`, `Counter`) from nothing, pairs or another dictionary."""
    pairs = list(items.items()) if isinstance(items, dict) else items
    if not isinstance(pairs, list | tuple):
        raise pickle.UnpicklingError(f"a dictionary made of a {type(items).__name__}")
    budget.spend(len(pairs))
    return {plain_key(key): value for key, value in pairs}


def encode_latin1(budget: Budget, text: Any, encoding: Any = "") -> bytes:
    """Maker of bytes from text, which is how Python 3 writes them in the protocols of Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text encoded as {shown(encoding)}")
    budget.spend(len(text))
    return text.encode("latin1")
