"""safetensors files: zero-copy reads, shards, and that a broken or hostile file is one StartupError, quickly (F-52)."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hybrid_serve.checkpoint.checkpoint import open_checkpoint
from hybrid_serve.checkpoint.hub import ResolvedModel
from hybrid_serve.checkpoint.safetensors import SafetensorsSource
from hybrid_serve.errors import StartupError
from hybrid_serve.models import family_of
from hybrid_serve.models.weights import check_tensors
from tiny_models import make_tiny_model


def load(folder: Path) -> None:
    checkpoint = open_checkpoint(ResolvedModel(folder, "hf"))
    assert checkpoint.source is not None
    check_tensors(checkpoint.spec, family_of(checkpoint.spec), checkpoint.source)


def refused(folder: Path) -> StartupError:
    start = time.monotonic()
    with pytest.raises(StartupError) as caught:
        load(folder)
    assert time.monotonic() - start < 5
    assert caught.value.failure.exit_code == 11
    return caught.value


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Splits the folder's weights over ``count`` files with an index; returns the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts: list[dict[str, np.ndarray[Any, Any]]] = [{} for _ in range(count)]
    weight_map = {}
    for index, (name, values) in enumerate(sorted(tensors.items())):
        parts[index % count][name] = values
        weight_map[name] = f"model-{index % count + 1:05}-of-{count:05}.safetensors"
    for index, part in enumerate(parts):
        save_file(part, folder / f"model-{index + 1:05}-of-{count:05}.safetensors")
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_tensor_of_the_wanted_type_is_a_view_of_the_file(tmp_path: Path) -> None:
    source = SafetensorsSource(make_tiny_model(tmp_path))
    values = source.read("model.norm.weight", "float32")
    assert not values.flags.owndata
    assert not values.flags.writeable
    expected = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    source.close()
    np.testing.assert_array_equal(values, expected)  # stays valid after close


def test_shards_read_as_one(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    expected = load_file(folder / "model.safetensors")
    shard(folder)
    save_file({"other": np.zeros(3, np.float32)}, folder / "consolidated.safetensors")  # not in the index: ignored
    load(folder)
    source = SafetensorsSource(folder)
    for name, values in expected.items():
        np.testing.assert_array_equal(source.read(name, "float32"), values)


def test_a_missing_shard_is_named_with_a_tensor_of_it(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refused(folder).failure.why


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    weight_map = shard(folder)
    name = "model.norm.weight"
    other = "model-00001-of-00003.safetensors"
    assert weight_map[name] != other
    write_index(folder, weight_map | {name: other})
    assert name in refused(folder).failure.why
    write_index(folder, weight_map | {name: "../model.safetensors"})
    assert "../model.safetensors" in refused(folder).failure.why
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1, 2]}')
    assert "weight_map" in refused(folder).failure.why


def test_a_tensor_in_two_files_without_an_index_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    shutil.move(folder / "model.safetensors", folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    assert "also in a.safetensors" in refused(folder).failure.why


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    chooser = random.Random(0)
    for end in [*range(16), *(chooser.randrange(len(content)) for _ in range(64)), len(content) - 1]:
        path.write_bytes(content[:end])
        assert "model.safetensors" in refused(folder).failure.what
    path.write_bytes(content + b"\0")
    assert "end" in refused(folder).failure.why


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES: dict[str, bytes] = {
    "header of 2^63 bytes": file_of({}, length=2**63),
    "header past the end": file_of({}, length=100),
    "header is not JSON": file_of(b"{'a': 1}"),
    "header is not UTF-8": file_of(b'{"\xff": 1}'),
    "header is a list": file_of([1, 2]),
    "header nested deeply": file_of(b"[" * 100000),
    "header with a huge number": file_of(b'{"a": ' + b"9" * 5000 + b"}"),
    "entry without offsets": file_of({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "entry with more": file_of({"a": F32 | {"code": "x"}}, bytes(8)),
    "entry is a string": file_of({"a": "b"}, bytes(8)),
    "unknown type": file_of({"a": F32 | {"dtype": "F31"}}, bytes(8)),
    "type is a list": file_of({"a": F32 | {"dtype": ["F32"]}}, bytes(8)),
    "negative size": file_of({"a": F32 | {"shape": [-2]}}, bytes(8)),
    "size is a float": file_of({"a": F32 | {"shape": [2.0]}}, bytes(8)),
    "size is true": file_of({"a": F32 | {"shape": [True, 2]}}, bytes(8)),
    "sizes whose product overflows": file_of({"a": F32 | {"shape": [2**61, 2**61]}}, bytes(8)),
    "shape and bytes differ": file_of({"a": F32 | {"shape": [3]}}, bytes(8)),
    "offsets reversed": file_of({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8)),
    "offsets past the end": file_of({"a": F32 | {"data_offsets": [8, 16]}}, bytes(8)),
    "overlapping tensors": file_of({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12)),
    "a hole between tensors": file_of({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20)),
    "bytes that belong to nobody": file_of({"a": F32}, bytes(16)),
    "the same tensor twice": file_of(json.dumps({"a": F32, "b": F32}).replace('"b"', '"a"').encode(), bytes(8)),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(tmp_path: Path, lie: str) -> None:
    folder = make_tiny_model(tmp_path)
    (folder / "model.safetensors").write_bytes(LIES[lie])
    failure = refused(folder).failure
    assert failure.code == "HS-E022"
    assert "model.safetensors" in failure.what


def test_random_mutations_of_the_header_are_valid_or_a_startup_error(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    chooser, exit_codes = random.Random(2), []
    for _ in range(300):
        data = bytearray(content)
        for _ in range(chooser.randrange(1, 4)):
            data[chooser.randrange(header)] = chooser.choice([chooser.randrange(256), *b'0123456789[]{},:"'])
        path.write_bytes(data)
        try:
            load(folder)
        except StartupError as error:
            exit_codes.append(error.failure.exit_code)
    assert len(exit_codes) > 100
    assert set(exit_codes) == {11}


def test_a_quantised_tensor_type_is_refused_with_advice(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((96, 64), np.int8)
    save_file(tensors, folder / "model.safetensors")
    failure = refused(folder).failure
    assert (failure.code, "I8" in failure.what, "GGUF" in failure.fix) == ("HS-E023", True, True)
