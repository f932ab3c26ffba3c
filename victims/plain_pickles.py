"""The plain values of a pickle file, read without running it.

Unpickling calls whatever a file names. `pickletools.genops` splits a file into opcodes and executes
nothing; the stack machine here gives a meaning to those of them that build dicts, lists, tuples,
strings, integers and arrays of integers, as Python 2 and 3 with any numpy write them (protocols 2
to 5). Every other opcode, and every name but those of numpy's reconstruction, is refused.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from victims.errors import GridError

_DTYPE: Final = re.compile(r"[<>=|]?[iu][1248]")
_RECONSTRUCT: Final = {"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"}
_FROM_BUFFER: Final = {"numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer"}
_BYTES: Final = {"__builtin__ bytes", "builtins bytes"}
# What a file may name. None of these is ever imported: each stands for a rule of `_reduce`.
_NAMES: Final = {
    *(_RECONSTRUCT | _FROM_BUFFER | _BYTES),
    *("numpy ndarray", "numpy dtype", "_codecs encode"),
}
_PUSHED: Final = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4"),
    *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK: Final = object()


class _Refused(Exception):
    """Why a file is not plain; `read_plain` adds where."""


@dataclass(frozen=True, slots=True)
class _Name:
    name: str


@dataclass(slots=True)
class _Dtype:
    """A type of integers; its state, which says the byte order, comes after it is made."""

    code: str
    order: str = "="

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


@dataclass(slots=True)
class _Array:
    """An array whose state has not come yet; ``value`` once it has."""

    value: np.ndarray[Any, Any] | None = None


def read_plain(path: Path) -> dict[str, Any]:
    """The dict in a pickle file, its keys as text. Text that Python 2 wrote comes as latin-1."""
    machine, position = _Machine(), 0
    try:
        for opcode, argument, at in pickletools.genops(path.read_bytes()):
            position = at or 0
            machine.step(opcode.name, argument)
        return _named(machine.result())
    except _Refused as refused:
        reason = str(refused)
    except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"it is damaged or no such file ({type(error).__name__}: {str(error)[:200]})"
    raise GridError(
        f"{path}, at byte {position}: {reason}. Only dicts of text, integers, lists and arrays "
        "of integers are read; nothing in the file was run. Put the data set's own file there."
    )


def _named(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Refused(f"it holds a {type(value).__name__} where a dict is expected")
    return {k.decode("latin-1") if isinstance(k, bytes) else k: v for k, v in value.items()}


@final
@dataclass(slots=True)
class _Machine:
    """The stack and the memo of a pickle, without the power to call anything."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def result(self) -> Any:
        if len(self.stack) != 1:
            raise _Refused(f"it leaves {len(self.stack)} values instead of one")
        return self.stack[0]

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _PUSHED:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _TUPLES:
            stack[-_TUPLES[opcode] :] = [tuple(self._last(_TUPLES[opcode]))]
        else:
            self._structure(opcode, argument)

    def _structure(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(_complete(self.memo[argument]))
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "APPEND":
                value = stack.pop()
                _of(list, stack[-1]).append(value)
            case "APPENDS":
                values = self._marked()
                _of(list, stack[-1]).extend(values)
            case "SETITEM":
                self._set(self._pop(2))
            case "SETITEMS":
                self._set(self._marked())
            case "GLOBAL":
                stack.append(_name(argument))
            case "STACK_GLOBAL":
                stack.append(_name(" ".join(self._pop(2))))
            case "REDUCE":
                called, arguments = self._pop(2)
                stack.append(_reduce(_of(_Name, called).name, _of(tuple, arguments)))
            case "BUILD":
                made, state = self._pop(2)
                stack.append(_build(made, _of(tuple, state)))
            case _:
                raise _Refused(f"it uses {opcode}, which no file of pictures and labels needs")

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise _Refused("it takes more values than it made")
        return self.stack[-count:]

    def _pop(self, count: int) -> list[Any]:
        values = self._last(count)
        del self.stack[-count:]
        return values

    def _marked(self) -> list[Any]:
        """What was pushed since the last mark."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _set(self, items: Sequence[Any]) -> None:
        target = _of(dict, self.stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nothing else is hashed: the hash of a deep nest of tuples overflows the C stack.
            target[_of((str, bytes), key)] = value


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise _Refused(f"it uses a {type(value).__name__} as what it is not")
    return value


def _complete(value: Any) -> Any:
    if not isinstance(value, _Array):
        return value
    if value.value is None:
        raise _Refused("it uses an array before its contents")
    return value.value


def _name(name: str) -> _Name:
    if name not in _NAMES:
        raise _Refused(f"it names {name.replace(' ', '.')!r}, which would be called: refused")
    return _Name(name)


def _reduce(name: str, arguments: tuple[Any, ...]) -> Any:
    """What numpy's and Python's own helpers would return, for the arguments that files have."""
    if name in _RECONSTRUCT:
        if arguments[0] != _Name("numpy ndarray"):
            raise _Refused("it reconstructs something other than an array")
        return _Array()
    if name in _FROM_BUFFER:
        raw, dtype, shape, order = arguments
        return _array(raw, dtype, shape, order == "F")
    if name == "numpy dtype":
        code = _of(str, arguments[0])
        if not _DTYPE.fullmatch(code):
            raise _Refused(f"it holds an array of {code[:20]!r}, not of integers")
        return _Dtype(code)
    if name == "_codecs encode" and arguments[1] in ("latin1", "latin-1"):
        return _of(str, arguments[0]).encode("latin-1")
    if name in _BYTES and arguments == ():
        return b""
    raise _Refused(f"it calls {name.replace(' ', '.')} in a way that no such file needs")


def _build(made: Any, state: tuple[Any, ...]) -> Any:
    if isinstance(made, _Dtype):
        if state[1] not in ("<", ">", "=", "|"):
            raise _Refused("its type of integers has no byte order")
        made.order = state[1]
        return made
    if not isinstance(made, _Array):
        raise _Refused(f"it gives a state to a {type(made).__name__}")
    _, shape, dtype, fortran, raw = state
    made.value = _array(raw, dtype, shape, bool(fortran))
    return made.value


def _array(raw: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray[Any, Any]:
    data = raw.encode("latin-1") if isinstance(raw, str) else _of((bytes, bytearray), raw)
    kind, sides = _of(_Dtype, dtype).numpy(), [_of(int, side) for side in _of(tuple, shape)]
    if min(sides, default=0) < 0 or math.prod(sides) * kind.itemsize != len(data):
        raise _Refused(f"an array's {len(data)} bytes do not fill its shape")
    return np.frombuffer(data, kind).reshape(sides, order="F" if fortran else "C")
