"""An inert reader of pickles: opcodes become records, records of arrays become arrays.

Nothing is imported or called. A pickle is a program. Here it is only parsed: a name stays a
`Global`, a call stays a `Call`, and what they would have done never happens. The result may hold
anything, cycles and shared parts too; readers walk only what they need, with a bound of their own.

Memory: at most 4 times the size of the file plus 64 MiB. Long strings stay where they are in the
file; short ones and records are bounded by the number of opcodes, which is capped. Everything
malformed raises ValueError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

# any file may have so many (a DiT-XL/2 with its optimizer: 50 000), and one more per 64 bytes
_OPCODES = 400_000
_SHORT = 1024  # bytes; longer strings are not copied out of the file
_LONG_INTEGER = 255  # bytes
_DTYPES = {"f2": 2, "f4": 4, "f8": 8}


@dataclass(slots=True, frozen=True)
class Global:
    """A name that the pickle refers to. It is never looked up."""

    module: str
    name: str


@dataclass(slots=True, frozen=True)
class Text:
    """A long string, as UTF-8 bytes in the file."""

    data: memoryview


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """What the pickle would have called or built, which never happens.

    function(*arguments), then its state, then items set on it.
    """

    function: Any
    arguments: Any
    state: Any = None
    items: dict[str, Any] | None = None


@dataclass(slots=True, frozen=True, eq=False)
class Persistent:
    """What a pickle keeps outside itself, by the identity that it gives (torch.save: storages)."""

    identity: Any


_RECONSTRUCT, _SCALAR, _FROM_BUFFER = (
    tuple(Global(f"numpy.{core}.{module}", name) for core in ("core", "_core"))
    for module, name in (
        ("multiarray", "_reconstruct"),
        ("multiarray", "scalar"),
        ("numeric", "_frombuffer"),
    )
)
_BFLOAT16 = tuple(
    Global(module, "bfloat16")
    for module in ("ml_dtypes", "ml_dtypes._custom_floats", "jaxlib.xla_extension")
)
_JAX_ARRAYS = (
    Global("jax._src.array", "_reconstruct_array"),
    Global("jax._src.device_array", "reconstruct_device_array"),
)


def read_records(data: memoryview, persistent: bool = False) -> Any:
    """The value that a pickle of protocol 2 to 5 describes.

    Args:
        persistent: whether it may refer to what lies outside of it.

    Returns:
        None, bool, int, float, str, bytes, memoryview (long bytes), list (sets too), tuple, dict
        (only items with text keys) or records.

    Raises:
        ValueError: it is malformed, too big or not of these protocols.
    """
    return _Reader(data, persistent).run()


class _Reader:
    """The pickle machine: a stack, the stacks below the marks, a memo."""

    def __init__(self, data: memoryview, persistent: bool = False) -> None:
        self.data, self.persistent = data, persistent
        self.position = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        if bytes(self.take(1)) != b"\x80" or not 2 <= self.number(1) <= 5:
            raise ValueError("not a pickle of protocol 2 to 5")
        for _ in range(_OPCODES + len(self.data) // 64):
            opcode = self.data[self.position] if self.position < len(self.data) else -1
            self.position += 1
            if opcode == 0x2E:  # STOP
                return self.pop()
            self.step(opcode)
        raise ValueError("too many opcodes for a file of this size")

    def step(self, opcode: int) -> None:
        stack = self.stack
        match opcode:
            case 0x80:  # PROTO
                self.take(1)
            case 0x95:  # FRAME
                if self.number(8) > len(self.data) - self.position:
                    raise ValueError("a frame ends after the file")
            case 0x4E:
                stack.append(None)
            case 0x88 | 0x89:
                stack.append(opcode == 0x88)
            case 0x4B | 0x4D:  # BININT1, BININT2
                stack.append(self.number(1 if opcode == 0x4B else 2))
            case 0x4A:  # BININT
                stack.append(int.from_bytes(self.take(4), "little", signed=True))
            case 0x8A | 0x8B:  # LONG1, LONG4
                size = self.number(1 if opcode == 0x8A else 4)
                if size > _LONG_INTEGER:
                    raise ValueError(f"an integer of {size} bytes")
                stack.append(int.from_bytes(self.take(size), "little", signed=True))
            case 0x47:  # BINFLOAT
                stack.append(float(np.frombuffer(self.take(8), ">f8")[0]))
            case 0x43 | 0x42 | 0x8E | 0x96:  # SHORT_BINBYTES, BINBYTES, BINBYTES8, BYTEARRAY8
                part = self.take(self.number({0x43: 1, 0x42: 4}.get(opcode, 8)))
                stack.append(bytes(part) if len(part) <= _SHORT else part)
            case 0x8C | 0x58 | 0x8D:  # SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
                part = self.take(self.number({0x8C: 1, 0x58: 4}.get(opcode, 8)))
                stack.append(_decode(part) if len(part) <= _SHORT else Text(part))
            case 0x5D | 0x8F:  # EMPTY_LIST, EMPTY_SET
                stack.append([])
            case 0x7D:
                stack.append({})
            case 0x29:
                stack.append(())
            case 0x85 | 0x86 | 0x87:  # TUPLE1, TUPLE2, TUPLE3
                size = opcode - 0x84
                if len(stack) < size:
                    raise ValueError("a tuple without enough elements")
                stack[-size:] = [tuple(stack[-size:])]
            case 0x28:  # MARK
                self.below.append(stack)
                self.stack = []
            case 0x74:  # TUPLE
                values = self.pop_mark()
                self.stack.append(tuple(values))
            case 0x6C | 0x91:  # LIST, FROZENSET
                values = self.pop_mark()
                self.stack.append(values)
            case 0x64:  # DICT
                values = self.pop_mark()
                self.stack.append({})
                self.set_items(values)
            case 0x30:  # POP
                if stack:
                    stack.pop()
                else:
                    self.pop_mark()
            case 0x31:
                self.pop_mark()
            case 0x32:  # DUP
                stack.append(self.top())
            case 0x61:  # APPEND
                self.append([self.pop()])
            case 0x65 | 0x90:  # APPENDS, ADDITEMS
                self.append(self.pop_mark())
            case 0x73:  # SETITEM
                value, key = self.pop(), self.pop()
                self.set_items([key, value])
            case 0x75:  # SETITEMS
                self.set_items(self.pop_mark())
            case 0x94 | 0x71 | 0x72:  # MEMOIZE, BINPUT, LONG_BINPUT
                index = (
                    len(self.memo) if opcode == 0x94 else self.number(1 if opcode == 0x71 else 4)
                )
                self.memo[index] = self.top()
            case 0x68 | 0x6A:  # BINGET, LONG_BINGET
                index = self.number(1 if opcode == 0x68 else 4)
                if index not in self.memo:
                    raise ValueError(f"memo {index} is not set")
                stack.append(self.memo[index])
            case 0x63:  # GLOBAL
                stack.append(Global(self.line(), self.line()))
            case 0x93:  # STACK_GLOBAL
                name, module = self.pop(), self.pop()
                if not isinstance(name, str) or not isinstance(module, str):
                    raise ValueError("a name that is no string")
                stack.append(Global(module, name))
            case 0x52 | 0x81:  # REDUCE, NEWOBJ
                arguments, function = self.pop(), self.pop()
                stack.append(Call(function, arguments))
            case 0x92:  # NEWOBJ_EX
                keywords, arguments, function = self.pop(), self.pop(), self.pop()
                stack.append(Call(function, (arguments, keywords)))
            case 0x6F | 0x69:  # OBJ, INST
                named = [Global(self.line(), self.line())] if opcode == 0x69 else []
                function, *values = named + self.pop_mark() or [None]
                self.stack.append(Call(function, tuple(values)))
            case 0x51 if self.persistent:  # BINPERSID
                stack.append(Persistent(self.pop()))
            case 0x62:  # BUILD
                state = self.pop()
                record = self.top()
                if isinstance(record, Call):
                    record.state = state
            case _:
                name = "the end of the file" if opcode < 0 else f"opcode 0x{opcode:02x}"
                raise ValueError(
                    f"{name} at byte {self.position - 1}: damaged, or not what a checkpoint may"
                    " hold"
                )

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.position:
            raise ValueError(
                f"{size} bytes wanted at byte {self.position}, {len(self.data) - self.position} are"
                " left"
            )
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        window = bytes(self.data[self.position : self.position + _SHORT])
        end = window.find(b"\n")
        if end < 0:
            raise ValueError("a name without an end")
        self.position += end + 1
        return _decode(window[:end])

    def top(self) -> Any:
        if not self.stack:
            raise ValueError(f"nothing on the stack at byte {self.position - 1}")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        del self.stack[-1]
        return value

    def pop_mark(self) -> list[Any]:
        if not self.below:
            raise ValueError(f"no mark at byte {self.position - 1}")
        values, self.stack = self.stack, self.below.pop()
        return values

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if len(values) % 2:
            raise ValueError("a key without a value")
        if isinstance(target, Call):
            target.items = target.items if target.items is not None else {}
            target = target.items
        if isinstance(target, dict):
            # Other keys are of no use here, and hashing those of a hostile file may never end.
            pairs = zip(values[::2], values[1::2])
            target.update((key, value) for key, value in pairs if isinstance(key, str))


def _decode(data: bytes | memoryview) -> str:
    return bytes(data).decode("utf-8", "surrogatepass")


def as_mapping(record: Any) -> dict[str, Any] | None:
    """The items of a dict, or of a record of one (FrozenDict, OrderedDict, object); else None."""
    if isinstance(record, Call):
        if is_array(record):
            return None
        if record.items is not None:
            return record.items  # an OrderedDict's, whose state is attributes of its own
        state = record.state
        if isinstance(state, tuple) and len(state) == 2:  # (attributes, slots)
            state = state[1]
        inner = state.get("_dict", state) if isinstance(state, dict) else None
        if inner is None and isinstance(record.arguments, tuple) and len(record.arguments) == 1:
            inner = record.arguments[0]
        record = inner
    return record if isinstance(record, dict) else None


def is_array(record: Any) -> bool:
    """Whether the record is a call of one of the functions that rebuild arrays."""
    return (
        isinstance(record, Call)
        and record.function in _RECONSTRUCT + _SCALAR + _FROM_BUFFER + _JAX_ARRAYS
    )


def as_array(record: Any) -> np.ndarray:
    """The array that a record describes.

    Known are NumPy's arrays (its old and new names, in-band buffers of protocol 5) and scalars, and
    JAX's arrays. Type, shape and number of bytes are checked before anything is made.

    Returns:
        float16, float32 or float64: a read-only view of the file; bfloat16: widened to float32.

    Raises:
        ValueError: everything else.
    """
    if not is_array(record) or not isinstance(record.arguments, tuple):
        raise ValueError("is not an array")
    function, arguments, state = record.function, record.arguments, record.state
    axes: Any = None
    if (
        function in _JAX_ARRAYS and len(arguments) >= 3
    ):  # a NumPy array's function, arguments and state
        function, _, state, *_ = arguments
    fields = state if isinstance(state, tuple) else ()
    if function in _RECONSTRUCT and len(fields) == 5 and isinstance(fields[3], bool):
        _, shape, dtype, fortran, data = fields
        order = "F" if fortran else "C"
    elif function in _SCALAR and len(arguments) == 2:
        (dtype, data), shape, order = arguments, (), "C"
    elif function in _FROM_BUFFER and len(arguments) in (4, 5):
        data, dtype, shape, order, *rest = arguments
        axes = rest[0] if rest else None
        if order not in ("C", "F", "K") or (order == "K") != (axes is not None):
            raise ValueError("has an unknown order of elements")
    else:
        raise ValueError("is not an array of a known form")
    if not _is_integers(shape) or len(shape) > 8 or any(not 0 <= n < 1 << 48 for n in shape):
        raise ValueError("has a shape that cannot be")
    if axes is not None and (not _is_integers(axes) or sorted(axes) != list(range(len(shape)))):
        raise ValueError("has an order of axes that cannot be")
    kind, item = _dtype(dtype)
    content = _bytes(data)
    if math.prod(shape) * item != len(content):
        raise ValueError(f"has shape {shape}, which is not what its {len(content)} bytes hold")
    if kind.endswith("u2"):
        flat = (np.frombuffer(content, kind).astype(np.uint32) << 16).view(np.float32)
    else:
        flat = np.frombuffer(content, kind)
    array = flat.reshape(shape, order="F" if order == "F" else "C")
    return array if axes is None else array.transpose(axes)


def _is_integers(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(n) is int for n in value)


def _dtype(record: Any) -> tuple[str, int]:
    """NumPy's name and the item size of an allowed dtype record; bfloat16 is read as uint16."""
    order = "<"
    match record:
        case Call(Global("numpy", "dtype"), tuple(arguments), None):
            pass
        case Call(
            Global("numpy", "dtype"),
            tuple(arguments),
            tuple((_, "<" | ">" | "=" | "|" as mark, None, None, None, *_)),
        ):
            order = ">" if mark == ">" else "<"
        case _:
            raise ValueError("has a type that is unknown")
    kind = arguments[0] if arguments else None
    if kind in _BFLOAT16:
        return order + "u2", 2
    if isinstance(kind, str) and len(kind) == 3 and kind[0] in "<>=|":
        order, kind = (">" if kind[0] == ">" else order), kind[1:]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError("is not of float16, bfloat16, float32 or float64")
    return order + kind, _DTYPES[kind]


def _bytes(record: Any) -> bytes | memoryview:
    """The bytes of a string record; protocol 2 writes them as Latin-1 text."""
    match record:
        case bytes() | memoryview():
            return record
        case Call(Global("__builtin__" | "builtins", "bytes"), tuple(())):
            return b""
        case Call(Global("_codecs", "encode"), tuple((Text(data), "latin1"))):
            return _decode(data).encode("latin-1")
        case Call(Global("_codecs", "encode"), tuple((str(text), "latin1"))):
            return text.encode("latin-1")
    raise ValueError("has no bytes of its own")
