"""SafetensorsFile and SafetensorsSource: mapped files, whose headers are checked in full before anything is read."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .failures import corrupt, unreadable, unsupported
from .tensors import NUMPY_TYPES, Array, FloatName, TensorInfo, convert

MAX_HEADER_BYTES = 100 * 2**20
INDEX_NAME = "model.safetensors.index.json"
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
_FLOATS: dict[str, FloatName] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class SafeTensor(NamedTuple):
    dtype: str  # the file's word for it
    shape: tuple[int, ...]
    start: int  # in the file
    end: int


def read_json(path: Path, data: bytes | None = None) -> dict[str, Any]:
    """A JSON object from a file of the model (or from ``data``, part of it). Raises StartupError naming the file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
        return found

    try:
        content = json.loads(path.read_bytes() if data is None else data, object_pairs_hook=unique)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"its JSON is broken: {error}"[:300]) from None
    if not isinstance(content, dict):
        raise corrupt(path, f"its JSON is a {type(content).__name__}, not an object")
    return content


class SafetensorsFile:
    """One mapped file: name -> type, shape, place."""

    def __init__(self, path: Path) -> None:
        """Raises StartupError (HS-E022) unless the header describes every byte of the file exactly once."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size < 8:
                    raise corrupt(path, f"it has {self.size} bytes, the header's length alone has 8")
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise unreadable(path, error) from error
        header_bytes = int.from_bytes(self.data[:8], "little")
        if header_bytes > min(MAX_HEADER_BYTES, self.size - 8):
            raise corrupt(path, f"its header claims {header_bytes} bytes (at byte 0), the file has {self.size}")
        header = read_json(path, self.data[8 : 8 + header_bytes])
        header.pop("__metadata__", None)
        self.data_start = 8 + header_bytes
        self.tensors = {name: self._entry(name, value) for name, value in header.items()}
        self._check_coverage()

    def view(self, name: str) -> Array:
        """The tensor as stored: float32, float16 or (bfloat16) uint16; read-only. Raises KeyError."""
        entry = self.tensors[name]
        dtype = np.dtype(NUMPY_TYPES[_FLOATS[entry.dtype]])
        count = (entry.end - entry.start) // dtype.itemsize
        if entry.start % dtype.itemsize == 0 or count == 0:
            return np.frombuffer(self.data, dtype, count, entry.start).reshape(entry.shape)
        # Old writers did not pad the header: numpy views must be aligned for the kernels, hence the copy.
        raw = np.frombuffer(self.data, np.uint8, entry.end - entry.start, entry.start)
        return raw.copy().view(dtype).reshape(entry.shape)

    def _entry(self, name: str, value: Any) -> SafeTensor:
        def fail(why: str) -> Exception:
            return corrupt(self.path, f"tensor {name!r} {why}")

        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise fail("has a header entry without dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
            raise fail(f"has the unknown type {dtype!r}")
        if not _are_sizes(shape) or len(shape) > 8 or not _are_sizes(offsets) or len(offsets) != 2:
            raise fail(f"has shape {shape!r} and offsets {offsets!r}"[:200])
        num_bytes = _ITEM_BYTES[dtype]
        for dim in shape:
            num_bytes *= dim
        start, end = offsets
        if end - start != num_bytes:
            raise fail(f"({dtype} {shape}) needs {num_bytes} bytes, its offsets {offsets} give {end - start}")
        if self.data_start + end > self.size:
            raise fail(f"ends at byte {self.data_start + end}, the file at {self.size}")
        return SafeTensor(dtype, tuple(shape), self.data_start + start, self.data_start + end)

    def _check_coverage(self) -> None:
        end, before = self.data_start, "the header"
        for name, entry in sorted(self.tensors.items(), key=lambda item: item[1].start):
            if entry.start != end:
                relation = "overlaps" if entry.start < end else "leaves a hole after"
                raise corrupt(self.path, f"tensor {name!r} at byte {entry.start} {relation} {before} (ends at {end})")
            end, before = entry.end, f"tensor {name!r}"
        if end != self.size:
            raise corrupt(self.path, f"its tensors end at byte {end}, the file at {self.size}")


class SafetensorsSource:
    """The tensors of a folder, in one file or in shards; a TensorSource."""

    def __init__(self, folder: Path) -> None:
        """Raises StartupError for a missing shard, a tensor that its shard lacks, or one that two files have."""
        self.label = folder.name
        self._files: dict[str, SafetensorsFile] = {}
        index = folder / INDEX_NAME
        if index.exists():
            self._open_index(folder, index)
            return
        paths = [folder / "model.safetensors"]
        if not paths[0].exists():
            paths = sorted(folder.glob("*.safetensors"))
        for path in paths:
            file = SafetensorsFile(path)
            for name in file.tensors:
                if name in self._files:
                    raise corrupt(path, f"tensor {name!r} is also in {self._files[name].path.name}")
                self._files[name] = file

    def describe(self, name: str) -> TensorInfo | None:
        file = self._files.get(name)
        if file is None:
            return None
        entry = file.tensors[name]
        if entry.dtype not in _FLOATS:
            raise unsupported(
                f"{file.path.name} has a tensor of type {entry.dtype}",
                f"tensor {name!r}; F32, BF16 and F16 can be read",
                "use the model's bfloat16 variant, or a GGUF file of it",
            )
        return TensorInfo(entry.shape, _FLOATS[entry.dtype], entry.end - entry.start)

    def read(self, name: str, dtype: FloatName) -> Array:
        file = self._files[name]
        return convert(file.view(name), _FLOATS[file.tensors[name].dtype], dtype)

    def close(self) -> None:
        self._files.clear()

    def _open_index(self, folder: Path, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise corrupt(index, "it has no weight_map from tensor names to file names")
        opened: dict[str, SafetensorsFile] = {}
        for name, file_name in weight_map.items():
            if file_name not in opened:
                # A plain name only: an index must not make us open files elsewhere.
                if Path(file_name).name != file_name or not (folder / file_name).is_file():
                    raise corrupt(index, f"shard {file_name!r}, which holds tensor {name!r}, is missing")
                opened[file_name] = SafetensorsFile(folder / file_name)
            if name not in opened[file_name].tensors:
                raise corrupt(index, f"tensor {name!r} is not in {file_name}, though the index says so")
            self._files[name] = opened[file_name]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**62 for each in value)
