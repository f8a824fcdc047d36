"""An inert reader of the files that torch.save writes: an uncompressed zip of a pickle and of the
bytes of its tensors.

The pickle is parsed as records (`pickle_records`), never run; tensors become views of the file. The
format before torch 1.6, compressed members, sparse, quantised and strided tensors are refused.
Memory: a small multiple of the file's size plus 64 MiB.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from typing import Any

import numpy as np

from .pickle_records import Call, Global, Persistent, read_records

_MEMBERS = 100_000
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
}
_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = Global("torch._utils", "_rebuild_parameter")


class TorchFile:
    """A file of torch.save: `root` is what its pickle describes, `array` makes a tensor of it.

    Args:
        data: the whole file; arrays are views of it.

    Raises:
        ValueError: it is damaged, or of another format.
    """

    def __init__(self, data: memoryview) -> None:
        if bytes(data[:2]) != b"PK":
            raise ValueError(
                "not a zip archive: files of torch.save before 1.6 and other pickles are not read"
                " (load and save the file with a newer torch)"
            )
        self._data = data
        try:
            # A view of the mapped file, not a copy.
            with zipfile.ZipFile(io.BufferedReader(_View(data))) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, struct.error, EOFError, LookupError) as error:
            raise ValueError(f"a damaged zip archive: {error}") from None
        if len(entries) > _MEMBERS:
            raise ValueError(f"{len(entries)} members in the archive, more than {_MEMBERS}")
        self._members = {entry.filename: entry for entry in entries}
        pickles = [name for name in self._members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise ValueError("not an archive of torch.save: it has no data.pkl of its own")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if f"{self._prefix}constants.pkl" in self._members:
            raise ValueError("a TorchScript program, not a file of weights")
        order = f"{self._prefix}byteorder"
        if order in self._members and bytes(self._member(order)[:8]) != b"little":
            raise ValueError("written on a big-endian machine")
        self.root = read_records(self._member(pickles[0]), persistent=True)

    def _member(self, name: str) -> memoryview:
        if name not in self._members:
            raise ValueError(f"the archive lacks {name!r}")
        entry = self._members[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError("a compressed or encrypted archive: save the weights with torch.save")
        header = self._data[entry.header_offset : entry.header_offset + _LOCAL_HEADER.size]
        if len(header) < _LOCAL_HEADER.size:
            raise ValueError(f"{name} lies outside the file")
        signature, *lengths = _LOCAL_HEADER.unpack(header)
        start = entry.header_offset + _LOCAL_HEADER.size + sum(lengths)
        content = self._data[start : start + entry.file_size]
        if signature != b"PK\x03\x04" or len(content) != entry.file_size:
            raise ValueError(f"{name} lies outside the file")
        return content

    def array(self, record: Any) -> np.ndarray:
        """The tensor that a record describes, as `pickle_records.as_array` gives them: a view of
        float16, float32 or float64; bfloat16 widened to float32.

        Raises:
            ValueError: everything else.
        """
        if isinstance(record, Call) and record.function == _PARAMETER:
            record = record.arguments[0] if isinstance(record.arguments, tuple) else None
        match record:
            case Call(
                function,
                tuple(
                    (Persistent(tuple(("storage", kind, str(key), _, _))), offset, size, stride, *_)
                ),
            ) if function == _TENSOR:
                pass
            case _:
                raise ValueError("is not a dense tensor")
        match kind:
            case Global("torch", name) if name in _STORAGES:
                dtype = _STORAGES[name]
            case _:
                raise ValueError("is not of float16, bfloat16, float32 or float64")
        numbers = (offset, *size, *stride) if type(size) is type(stride) is tuple else (None,)
        if len(size) != len(stride) or not all(
            type(each) is int and 0 <= each < 1 << 48 for each in numbers
        ):
            raise ValueError("has a shape that cannot be")
        dense = 1
        for length, step in reversed(list(zip(size, stride))):
            if length > 1 and step != dense:
                raise ValueError("is not contiguous: save it with .contiguous()")
            dense *= max(length, 1)
        if len(size) > 8 or not re.fullmatch(r"\w{1,32}", key, re.ASCII):
            raise ValueError("has a shape or a storage that cannot be")
        content = self._member(f"{self._prefix}data/{key}")
        item, count = np.dtype(dtype).itemsize, math.prod(size)
        if (offset + count) * item > len(content):
            raise ValueError(f"has shape {size}, which its {len(content)} bytes cannot hold")
        flat = np.frombuffer(content, dtype, count, offset * item)
        if dtype == "<u2":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(size)


class _View(io.RawIOBase):
    """A memoryview as a file that is only read."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._position = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        if start + offset < 0:
            raise ValueError("a damaged zip archive: a place before its beginning")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self._data[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)
