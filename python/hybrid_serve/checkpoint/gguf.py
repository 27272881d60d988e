"""GgufFile: the header of a GGUF file, checked in full before anything is used; knows bytes and types, not models.

Every count, length, offset and size is compared with the file's size before it is used, so a lying header costs a
message, not memory. Arrays are skipped over while parsing and decoded when asked for.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .failures import corrupt, unreadable

MAGIC = b"GGUF"
MAX_STRINGS = 1 << 22  # of one array; the largest vocabularies have 2^18 tokens and 2^19 merges
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_DIMS = 4

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_SCALAR_TYPES = {number: np.dtype(name) for number, name in _SCALARS.items()}

# ggml type -> (name, elements a block, bytes a block). Listed beyond what `dequantize` reads, for better messages.
TENSOR_TYPES = {
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34), 9: ("q8_1", 32, 40), 10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144), 13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210), 15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98), 19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1), 25: ("i16", 1, 2), 26: ("i32", 1, 4), 27: ("i64", 1, 8), 28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56), 30: ("bf16", 1, 2), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17),
}  # fmt: skip


class GgufTensor(NamedTuple):
    """``shape`` is in numpy's order (rows first), the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int  # in the file
    num_bytes: int


@dataclass(frozen=True)
class GgufArray:
    """An array of the metadata, not decoded yet."""

    path: Path
    data: mmap.mmap  # not the GgufFile: a cycle would keep the file mapped until the next garbage collection
    key: str
    element_type: int
    length: int
    offset: int

    def numbers(self) -> NDArray[Any]:
        """Raises StartupError if the elements are strings."""
        if self.element_type == _STRING:
            raise corrupt(self.path, f"key {self.key!r} has strings where numbers are expected")
        return np.frombuffer(self.data, _SCALAR_TYPES[self.element_type], self.length, self.offset)

    def strings(self) -> list[str]:
        """Raises StartupError if the elements are not strings or not UTF-8."""
        if self.element_type != _STRING:
            raise corrupt(self.path, f"key {self.key!r} has numbers where strings are expected")
        data, position, size_of = self.data, self.offset, struct.Struct("<Q").unpack_from
        found: list[str] = []
        try:
            for _ in range(self.length):
                end = position + 8 + size_of(data, position)[0]
                found.append(data[position + 8 : end].decode())
                position = end
        except UnicodeDecodeError:
            why = f"string {len(found)} of key {self.key!r} at byte {position} is not UTF-8"
            raise corrupt(self.path, why) from None
        return found


MetadataValue = int | float | bool | str | GgufArray


class GgufFile:
    """Metadata and tensor table of one file, which stays mapped while this object or an array read from it lives."""

    def __init__(self, path: Path | str) -> None:
        """Raises StartupError (HS-E022) for anything that is not a valid GGUF file of version 2 or 3."""
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size < 24:
                    raise corrupt(self.path, f"it has {self.size} bytes, a GGUF header alone has 24")
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise unreadable(self.path, error) from error
        self.metadata: dict[str, MetadataValue] = {}
        self.tensors: dict[str, GgufTensor] = {}
        _Parser(self).parse()

    def bytes_of(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        """A read-only view of the tensor's bytes in the file."""
        return np.frombuffer(self.data, np.uint8, tensor.num_bytes, tensor.offset)

    def integer(self, key: str, default: int | None = None) -> int:
        """Raises StartupError if the key is missing (and has no default) or is not an integer."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, value, "a number")
        return float(value)

    def string(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def array(self, key: str) -> GgufArray | None:
        """None if the key is missing."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, GgufArray):
            raise self._wrong(key, value, "an array")
        return value

    def _wrong(self, key: str, value: object, expected: str) -> Exception:
        if value is None:
            return corrupt(self.path, f"key {key!r} is missing")
        return corrupt(self.path, f"key {key!r} is {value!r}, expected {expected}")


class _Parser:
    """One pass over the header; ``position`` never passes ``size``."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.data = file.data
        self.size = file.size
        self.position = 0

    def fail(self, why: str) -> Exception:
        return corrupt(self.file.path, f"{why} (at byte {self.position} of {self.size})")

    def take(self, num_bytes: int, what: str) -> int:
        """Moves over ``num_bytes``; returns where they start."""
        start = self.position
        if num_bytes > self.size - start:
            raise self.fail(f"{what} needs {num_bytes} bytes, the file ends before")
        self.position = start + num_bytes
        return start

    def u32(self, what: str) -> int:
        return int(struct.unpack_from("<I", self.data, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack_from("<Q", self.data, self.take(8, what))[0])

    def string(self, what: str) -> str:
        length = self.u64(f"the length of {what}")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def parse(self) -> None:
        magic = self.data[: self.take(4, "the magic") + 4]
        if magic != MAGIC:
            raise self.fail(f"it begins with {magic!r} instead of {MAGIC!r}")
        version = self.u32("the version")
        if version not in (2, 3):
            raise self.fail(f"version {version} is not supported, 2 and 3 are (a big-endian file shows a huge number)")
        num_tensors, num_keys = self.u64("the number of tensors"), self.u64("the number of keys")
        if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
            raise self.fail(f"{num_tensors} tensors and {num_keys} keys are more than a model has")
        for index in range(num_keys):
            self.parse_key(index)
        self.parse_tensors(num_tensors)

    def parse_key(self, index: int) -> None:
        key = self.string(f"the name of key {index}")
        if key in self.file.metadata:
            raise self.fail(f"key {key!r} occurs twice")
        kind = self.u32(f"the type of key {key!r}")
        self.file.metadata[key] = self.parse_array(key) if kind == _ARRAY else self.parse_value(key, kind)

    def parse_value(self, key: str, kind: int) -> MetadataValue:
        if kind == _STRING:
            return self.string(f"the value of key {key!r}")
        dtype = _SCALAR_TYPES.get(kind)
        if dtype is None:
            raise self.fail(f"key {key!r} has the unknown type {kind}")
        start = self.take(dtype.itemsize, f"the value of key {key!r}")
        value = np.frombuffer(self.data, dtype, 1, start)[0].item()
        return bool(value) if kind == _BOOL else value

    def parse_array(self, key: str) -> GgufArray:
        element_type, length = self.u32(f"the type of array {key!r}"), self.u64(f"the length of array {key!r}")
        found = GgufArray(self.file.path, self.data, key, element_type, length, self.position)
        if element_type == _STRING:
            self.skip_strings(key, length)
        elif element_type in _SCALAR_TYPES:
            self.take(length * _SCALAR_TYPES[element_type].itemsize, f"array {key!r} of {length} elements")
        else:
            raise self.fail(f"array {key!r} has elements of type {element_type}, which is unknown or nested")
        return found

    def skip_strings(self, key: str, length: int) -> None:
        if length > MAX_STRINGS or length * 8 > self.size - self.position:
            raise self.fail(f"array {key!r} claims {length} strings")
        size_of, data, position, last = struct.Struct("<Q").unpack_from, self.data, self.position, self.size - 8
        for index in range(length):
            if position > last:
                raise self.fail(f"string {index} of array {key!r} lies past the end of the file")
            position += 8 + size_of(data, position)[0]
        if position > self.size:
            raise self.fail(f"the last string of array {key!r} ends past the end of the file")
        self.position = position

    def parse_tensors(self, count: int) -> None:
        entries = [self.parse_tensor(index) for index in range(count)]
        alignment = self.file.integer("general.alignment", 32)
        if alignment < 8 or alignment > 1 << 16 or alignment % 8:
            raise self.fail(f"general.alignment is {alignment}")
        data_start = -(-self.position // alignment) * alignment
        for name, shape, kind, relative, num_bytes in entries:
            offset = data_start + relative
            if relative % alignment or offset + num_bytes > self.size:
                raise self.fail(
                    f"tensor {name!r} claims {num_bytes} bytes at offset {offset}; "
                    f"the file has {self.size} bytes, alignment {alignment}"
                )
            if name in self.file.tensors:
                raise self.fail(f"tensor {name!r} occurs twice")
            self.file.tensors[name] = GgufTensor(name, shape, kind, offset, num_bytes)
        self.check_overlaps()

    def parse_tensor(self, index: int) -> tuple[str, tuple[int, ...], str, int, int]:
        name = self.string(f"the name of tensor {index}")
        num_dims = self.u32(f"the number of dimensions of tensor {name!r}")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.fail(f"tensor {name!r} has {num_dims} dimensions")
        dims = [self.u64(f"a dimension of tensor {name!r}") for _ in range(num_dims)]
        number = self.u32(f"the type of tensor {name!r}")
        relative = self.u64(f"the offset of tensor {name!r}")
        if number not in TENSOR_TYPES:
            raise self.fail(f"tensor {name!r} has the unknown type {number}")
        kind, block, block_bytes = TENSOR_TYPES[number]
        num_elements = 1
        for dim in dims:
            num_elements *= dim
        if num_elements == 0 or dims[0] % block:
            raise self.fail(f"tensor {name!r} of type {kind} has dimensions {dims}")
        return name, tuple(reversed(dims)), kind, relative, num_elements // block * block_bytes

    def check_overlaps(self) -> None:
        end, before = 0, ""
        for tensor in sorted(self.file.tensors.values(), key=lambda each: each.offset):
            if tensor.offset < end:
                raise self.fail(f"tensor {tensor.name!r} at offset {tensor.offset} overlaps tensor {before!r}")
            end, before = tensor.offset + tensor.num_bytes, tensor.name
