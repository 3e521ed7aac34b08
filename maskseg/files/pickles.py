"""Interpreter of pickles with bounded memory and time, which calls only the functions it is given.

A pickle is a program for a stack machine. Python's own interpreter runs any function that the
program names. Even an interpreter restricted to a few names, such as
`torch.load(weights_only=True)`, has no limits: in C, nine bytes request a memo of 13 GB; in Python,
three hundred bytes build a nested tuple whose hash, as the key of a dictionary, takes 2**60 steps.
This interpreter is restricted as follows:

- a name refers to one of the `makers`, or the pickle is refused; on request, objects of other
  classes are skipped: nothing is looked up for them, and a placeholder takes their place;
- the memo is a dictionary, and no read requests more bytes than the file has left;
- dictionary keys are plain values and there are no sets, so nested values are never hashed;
- what the makers build from existing values, such as an array from bytes, is charged to a budget
  that is proportional to the size of the file.
"""

from __future__ import annotations

import codecs
import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Protocol, runtime_checkable

_OPCODES = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}
_KEYS = (str, bytes, bool, type(None))
_MAX_INT_KEY = 2**31  # larger integers can be chosen to have the same hash
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
_NUMPY_CALLS = ("scalar", "_reconstruct")
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_NEW: dict[str, Callable[[], object]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FROM_MARK: dict[str, Callable[[list[object]], object]] = {"LIST": list, "TUPLE": tuple}

# Names that are never skipped: `torch.load` knows functions of these packages by itself.
_NOT_SKIPPED = ("torch", "builtins", "__builtin__", "_codecs")
# Calls without effects, whose results can be skipped.
_SKIPPED_CALLS = frozenset(
    [
        "datetime.datetime",
        "datetime.timedelta",
        "numpy.dtype",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in _NUMPY_CALLS),
        *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    ]
)

_MIN_BUDGET = 2**20
_BUDGET_PER_BYTE = 4


class Budget:
    """Number of units (bytes or elements) that the makers may still build."""

    def __init__(self, file_size: int) -> None:
        self.left = _MIN_BUDGET + _BUDGET_PER_BYTE * file_size

    def spend(self, units: int) -> None:
        """Charge `units`. Raises UnpicklingError if the budget is exceeded."""
        self.left -= units
        if self.left < 0:
            raise pickle.UnpicklingError("its objects are far larger than the file")


@dataclass(frozen=True)
class Name:
    """Dotted name of a function or class in the pickle. The object itself is never looked up."""

    name: str


@dataclass(frozen=True)
class Placeholder:
    """Stands for an object that is skipped. name: dotted name of its class or function."""

    name: str


@dataclass
class SkippedNames:
    """Dotted names of the skipped classes, functions and calls.

    with_items: classes whose objects are dictionaries; with_state: classes whose objects have a
    state.
    """

    every: set[str] = field(default_factory=set)
    with_items: set[str] = field(default_factory=set)
    with_state: set[str] = field(default_factory=set)


Maker = Callable[..., object]  # (budget, *arguments) -> value


@runtime_checkable
class _Stateful(Protocol):
    """A value that a maker has built and that receives its state from the pickle."""

    def set_state(self, budget: Budget, state: object) -> None: ...


class _Bounded:
    """File wrapper that never requests more bytes than the file has left."""

    def __init__(self, file: IO[bytes], end: int) -> None:
        self.file = file
        self.end = end
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        left = self.end - self.file.tell()
        return self.file.read(min(count, left))


class _Machine:
    """The stack machine: stack, memo, and the actions of the opcodes."""

    def __init__(
        self,
        makers: Mapping[str, Maker | None],
        persistent_load: Callable[[object], object] | None,
        budget: Budget,
        skipped: SkippedNames | None,
    ) -> None:
        self.makers = makers
        self.persistent_load = persistent_load
        self.budget = budget
        self.skipped = skipped
        self.stack: list[object] = []
        self.marked: list[list[object]] = []  # stacks below the marks
        self.memo: dict[object, object] = {}
        self.actions: dict[str, Callable[[object], None]] = {
            "MARK": self._mark,
            "POP": self._pop,
            "POP_MARK": self._pop_mark,
            "DUP": lambda _: self.stack.append(self.stack[-1]),
            "APPEND": lambda _: self._append([self.stack.pop()]),
            "APPENDS": lambda _: self._append(self._drop_mark()),
            "DICT": self._dict,
            "SETITEM": self._set_item,
            "SETITEMS": lambda _: self._set_items(self._drop_mark()),
            "GLOBAL": self._global,
            "STACK_GLOBAL": self._stack_global,
            "REDUCE": self._reduce,
            "NEWOBJ": self._new_object,
            "BUILD": self._build,
            "PERSID": self._persistent,
            "BINPERSID": lambda _: self._persistent(self.stack.pop()),
            "MEMOIZE": lambda _: self._put(len(self.memo)),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(
                ("GET", "BINGET", "LONG_BINGET"), lambda index: self.stack.append(self.memo[index])
            ),
        }

    def step(self, opcode: str, argument: object) -> None:
        """Execute one opcode."""
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
            raise pickle.UnpicklingError(f"opcode {opcode} is not supported")

    def _mark(self, _: object) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def _pop_mark(self, _: object) -> None:
        self._drop_mark()

    def _drop_mark(self) -> list[object]:
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def _pop(self, _: object) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._drop_mark()

    def _tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise pickle.UnpicklingError("a tuple needs more values than the stack has")
        items = tuple(self.stack[-length:])
        self.stack[-length:] = [items]

    def _append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise pickle.UnpicklingError(f"it appends items to a {type(target).__name__}")
        target.extend(items)

    def _dict(self, _: object) -> None:
        items = self._drop_mark()
        self.stack.append({})
        self._set_items(items)

    def _set_item(self, _: object) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._set_items([key, value])

    def _set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            self._skip_content(target.name, has_items=True)
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise pickle.UnpicklingError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[plain_key(key)] = value

    def _put(self, index: object) -> None:
        self.memo[index] = self.stack[-1]

    def _global(self, names: object) -> None:
        module, name = str(names).split(" ", 1)
        self._push_name(module, name)

    def _push_name(self, module: str, name: str) -> None:
        dotted = f"{module}.{name}"
        if dotted not in self.makers:
            if self.skipped is None or module.partition(".")[0] in _NOT_SKIPPED:
                raise pickle.UnpicklingError(f"it asks for {dotted}")
            self.skipped.every.add(dotted)
        self.stack.append(Name(dotted))

    def _stack_global(self, _: object) -> None:
        name = self.stack.pop()
        module = self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise pickle.UnpicklingError("a name that is not a string")
        self._push_name(module, name)

    def _reduce(self, _: object) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls an object that is not a function")
        self.stack.append(self._call(function.name, arguments, function.name in _SKIPPED_CALLS))

    def _new_object(self, _: object) -> None:
        arguments = self.stack.pop()
        cls = self.stack.pop()
        if not isinstance(cls, Name) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls an object that is not a class")
        self.stack.append(self._call(cls.name, arguments, can_skip=True))

    def _call(self, name: str, arguments: tuple[object, ...], can_skip: bool) -> object:
        """Call a maker. can_skip: return a placeholder if there is none and objects are skipped."""
        if name not in self.makers and can_skip:
            return Placeholder(name)
        maker = self.makers.get(name)
        if maker is None:
            raise pickle.UnpicklingError(f"it asks for a call of {name}")
        return maker(self.budget, *arguments)

    def _skip_content(self, name: str, has_items: bool) -> None:
        """Note that objects of a skipped class have items or a state. Both are refused.

        `torch.load` takes a dictionary for one with items, whose methods a state could replace.
        """
        assert self.skipped is not None
        names = self.skipped.with_items if has_items else self.skipped.with_state
        names.add(name)
        if name in self.skipped.with_items & self.skipped.with_state:
            raise pickle.UnpicklingError(f"it sets the state of a dictionary, {name}")

    def _build(self, _: object) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _Stateful):
            target.set_state(self.budget, state)
            return
        if isinstance(target, Placeholder):
            self._skip_content(target.name, has_items=False)
            return
        # A state dict has only the version numbers of its modules as an attribute. Any other
        # attribute could replace a method.
        if (
            not isinstance(target, dict)
            or not isinstance(state, dict)
            or not state.keys() <= {"_metadata"}
        ):
            raise pickle.UnpicklingError(f"it sets the state of a {type(target).__name__}")

    def _persistent(self, identity: object) -> None:
        if self.persistent_load is None:
            raise pickle.UnpicklingError("it refers to an object outside the file")
        self.stack.append(self.persistent_load(identity))


def plain_key(key: object) -> object:
    """Return the key if it is a plain value; nested values can take exponential time to hash.

    Raises UnpicklingError for any other key.
    """
    if type(key) not in _KEYS and not (type(key) is int and abs(key) < _MAX_INT_KEY):
        raise pickle.UnpicklingError(f"a dictionary key is a {type(key).__name__}")
    return key


def read_pickle(
    file: IO[bytes],
    makers: Mapping[str, Maker | None],
    persistent_load: Callable[[object], object] | None = None,
    file_size: int | None = None,
    skipped: SkippedNames | None = None,
) -> object:
    """Read the pickle that starts at the current position of `file`, and stop behind it.

    Args:
        file: a seekable binary file.
        makers: the functions that the pickle may call, by dotted name. They are called with the
            budget and the pickle's arguments; None for a name that is only used as a value. An
            object with a method `set_state(budget, state)` receives the state that the pickle
            assigns to it.
        persistent_load: maps a persistent id to its value.
        file_size: number of bytes that the budget is proportional to; by default those from the
            current position to the end of the file.
        skipped: if given, objects of classes without a maker are placeholders, and their names are
            added to it. Calls of functions without a maker are still refused, apart from a few
            without effects.

    Raises UnpicklingError for a pickle that is refused, and any exception for a damaged one.
    """
    start = file.tell()
    end = file.seek(0, 2)
    file.seek(start)
    bounded = _Bounded(file, end)
    size = end - start if file_size is None else file_size
    machine = _Machine(makers, persistent_load, Budget(size), skipped)
    while True:
        code = bounded.read(1)
        if code not in _OPCODES:
            raise pickle.UnpicklingError(f"unknown opcode {code!r}" if code else "it is truncated")
        opcode = _OPCODES[code]
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.step(opcode.name, _argument(opcode, bounded))


def _argument(opcode: pickletools.OpcodeInfo, file: _Bounded) -> object:
    # A Python 2 string may hold any byte. It is decoded as Latin-1, as the other kinds of strings
    # are.
    if opcode.name == "STRING":
        line = file.readline().strip()
        if len(line) < 2 or line[:1] not in b"'\"" or line[:1] != line[-1:]:
            raise pickle.UnpicklingError("a string without quotes")
        return codecs.escape_decode(line[1:-1])[0].decode("latin1")
    return None if opcode.arg is None else opcode.arg.reader(file)  # type: ignore[arg-type]


def describe_value(value: object) -> str:
    """Describe a value in a message: a string by its content, any other value by its type.

    The text of nested lists could be larger than memory.
    """
    return repr(value[:50]) if isinstance(value, str) else f"a {type(value).__name__}"


def make_dict(budget: Budget, items: object = ()) -> dict[object, object]:
    """Build a dictionary (`OrderedDict`, `Counter`) from nothing, pairs or another dictionary."""
    pairs = list(items.items()) if isinstance(items, dict) else items
    if not isinstance(pairs, list | tuple):
        raise pickle.UnpicklingError(f"a dictionary built from a {type(items).__name__}")
    budget.spend(len(pairs))
    return {plain_key(key): value for key, value in pairs}


def encode_latin1(budget: Budget, text: object, encoding: object = "") -> bytes:
    """Build bytes from text: Python 3 stores bytes like this in the protocols of Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text that is encoded as {describe_value(encoding)}")
    budget.spend(len(text))
    return text.encode("latin1")
