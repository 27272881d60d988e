"""GGUF files: what is read, and that a broken or hostile file is one StartupError, quickly (F-53, ADV-55)."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from hybrid_serve.checkpoint.checkpoint import open_checkpoint
from hybrid_serve.checkpoint.gguf import GgufArray, GgufFile
from hybrid_serve.checkpoint.hf_spec import spec_of_folder
from hybrid_serve.checkpoint.hub import ResolvedModel
from hybrid_serve.errors import StartupError
from hybrid_serve.models import family_of
from hybrid_serve.models.weights import check_tensors
from tiny_gguf import write_tiny_gguf
from tiny_models import CHAT_TEMPLATE, FAMILIES, make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_gguf(make_tiny_model(folder / "hf"), folder / "tiny.gguf", "Q8_0")


def load(path: Path) -> None:
    """All that a start reads before weights: header, metadata, tensor table, arrays, and every tensor's bytes."""
    checkpoint = open_checkpoint(ResolvedModel(path, "gguf"))
    assert checkpoint.source is not None
    check_tensors(checkpoint.spec, family_of(checkpoint.spec), checkpoint.source)
    file = GgufFile(path)
    for value in file.metadata.values():
        if isinstance(value, GgufArray):
            value.strings() if value.element_type == 8 else value.numbers()
    for tensor in file.tensors.values():
        assert file.bytes_of(tensor).nbytes == tensor.num_bytes


def refused(path: Path, content: bytes) -> StartupError:
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(StartupError) as caught:
        load(path)
    assert time.monotonic() - start < 5
    assert caught.value.failure.exit_code == 11
    return caught.value


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_reads_as_the_folder_it_was_made_from(tmp_path: Path, family: str) -> None:
    folder = make_tiny_model(tmp_path / "hf", family)
    checkpoint = open_checkpoint(ResolvedModel(write_tiny_gguf(folder, tmp_path / "tiny.gguf"), "gguf"))
    expected = spec_of_folder(folder)
    found = checkpoint.spec
    for name in (
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "vocab_size",
        "intermediate_size",
    ):
        assert getattr(found, name) == getattr(expected, name)
    assert (found.tie_embeddings, found.eos_token_ids, found.dtype) == (expected.tie_embeddings, (2,), "float32")
    assert found.rope == expected.rope
    assert found.rms_norm_eps == pytest.approx(expected.rms_norm_eps)
    assert checkpoint.source is not None
    for name, values in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(checkpoint.source.read(name, "float32"), values, err_msg=name)


def test_the_tokenizer_metadata_is_decoded_on_demand(tiny: Path) -> None:
    file = GgufFile(tiny)
    tokens = file.array("tokenizer.ggml.tokens")
    assert tokens is not None
    assert tokens.strings()[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert len(tokens.strings()) == tokens.length == 512
    types = file.array("tokenizer.ggml.token_type")
    assert types is not None
    assert types.numbers()[:4].tolist() == [3, 3, 3, 1]
    assert file.string("tokenizer.chat_template") == CHAT_TEMPLATE
    assert file.array("no.such.key") is None


def test_a_wrong_type_of_a_key_is_named(tiny: Path) -> None:
    file = GgufFile(tiny)
    with pytest.raises(StartupError, match=r"general\.architecture"):
        file.integer("general.architecture")
    with pytest.raises(StartupError, match=r"llama\.block_count"):
        file.string("llama.block_count")
    with pytest.raises(StartupError, match="missing"):
        file.number("llama.no_such_key")


def test_a_truncated_file_is_refused_wherever_it_ends(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    chooser = random.Random(0)
    ends = [*range(32), *(chooser.randrange(len(content)) for _ in range(64)), len(content) - 1]
    for end in ends:
        refused(tmp_path / "cut.gguf", content[:end])


HEADER = b"GGUF" + struct.pack("<I", 3)


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def counts(tensors: int, keys: int) -> bytes:
    return HEADER + struct.pack("<QQ", tensors, keys)


ARCHITECTURE = key(b"general.architecture", 8, string(b"llama"))
LIES = {
    "bad magic": b"GGML" + bytes(100),
    "version 1": b"GGUF" + struct.pack("<I", 1) + bytes(100),
    "big-endian": b"GGUF" + struct.pack(">I", 3) + bytes(100),
    "2^32 keys": counts(0, 2**32) + bytes(100),
    "2^63 tensors": counts(2**63, 0) + bytes(100),
    "string of 2^63 bytes": counts(0, 1) + string(b"a", 2**63) + bytes(100),
    "string past the end": counts(0, 1) + key(b"a", 8, string(b"abc", 200)) + bytes(100),
    "key is not UTF-8": counts(0, 1) + key(b"\xff\xfe", 4, bytes(4)) + bytes(100),
    "unknown value type": counts(0, 1) + key(b"a", 13, bytes(8)) + bytes(100),
    "array of 2^60 numbers": counts(0, 1) + key(b"a", 9, struct.pack("<IQ", 4, 2**60)) + bytes(100),
    "array of 2^62 strings": counts(0, 1) + key(b"a", 9, struct.pack("<IQ", 8, 2**62)) + bytes(100),
    "array whose string is past the end": counts(0, 1) + key(b"a", 9, struct.pack("<IQ", 8, 2) + string(b"", 999)),
    "nested arrays": counts(0, 1) + key(b"a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 1)) + bytes(100),
    "the same key twice": counts(0, 2) + 2 * key(b"a", 4, bytes(4)) + bytes(100),
    "no dimensions": counts(1, 0) + tensor(b"t", [], 0, 0) + bytes(100),
    "five dimensions": counts(1, 0) + tensor(b"t", [1] * 5, 0, 0) + bytes(100),
    "an empty dimension": counts(1, 0) + tensor(b"t", [4, 0], 0, 0) + bytes(100),
    "dimensions whose product overflows": counts(1, 0) + tensor(b"t", [2**32, 2**32, 2], 0, 0) + bytes(100),
    "unknown tensor type": counts(1, 0) + tensor(b"t", [32], 200, 0) + bytes(100),
    "a row of half a block": counts(1, 0) + tensor(b"t", [16, 2], 2, 0) + bytes(100),
    "offset past the end": counts(1, 0) + tensor(b"t", [4], 0, 2**40) + bytes(100),
    "offset that wraps around": counts(1, 0) + tensor(b"t", [4], 0, 2**64 - 32) + bytes(100),
    "unaligned offset": counts(1, 0) + tensor(b"t", [4], 0, 4) + bytes(100),
    "overlapping tensors": counts(2, 0) + tensor(b"t", [16], 0, 0) + tensor(b"u", [16], 0, 32) + bytes(300),
    "the same tensor twice": counts(2, 0) + 2 * tensor(b"t", [8], 0, 0) + bytes(300),
    "alignment 0": counts(0, 1) + key(b"general.alignment", 4, bytes(4)) + bytes(100),
    "alignment is a string": counts(0, 1) + key(b"general.alignment", 8, string(b"x")) + bytes(100),
    "no architecture": counts(0, 0) + bytes(100),
    "unknown architecture": counts(0, 1) + key(b"general.architecture", 8, string(b"mamba")) + bytes(100),
    "architecture without anything else": counts(0, 1) + ARCHITECTURE + bytes(100),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(tmp_path: Path, lie: str) -> None:
    error = refused(tmp_path / "lie.gguf", LIES[lie])
    assert error.failure.code in ("HS-E022", "HS-E023")
    assert "lie.gguf" in error.failure.what


def test_random_mutations_are_either_a_valid_file_or_a_startup_error(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    header = 20000  # metadata and tensor table; the rest are weights
    chooser = random.Random(1)
    mutate: list[Callable[[bytearray, int], None]] = [
        lambda data, at: data.__setitem__(at, chooser.randrange(256)),
        lambda data, at: data.__setitem__(
            slice(at, at + 8), struct.pack("<Q", chooser.choice([0, 2**31, 2**63, 2**64 - 1]))
        ),
        lambda data, at: data.__delitem__(slice(at, at + chooser.randrange(1, 40))),
        lambda data, at: data.__setitem__(slice(at, at), bytes(chooser.randrange(1, 40))),
    ]
    path, exit_codes = tmp_path / "mutant.gguf", []
    start = time.monotonic()
    for _ in range(400):
        data = bytearray(content)
        for _ in range(chooser.randrange(1, 4)):
            chooser.choice(mutate)(data, chooser.randrange(header))
        path.write_bytes(data)
        try:
            load(path)
        except StartupError as error:
            exit_codes.append(error.failure.exit_code)
    assert len(exit_codes) > 100
    assert set(exit_codes) == {11}
    assert time.monotonic() - start < 60


def test_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "hf")
    path = write_tiny_gguf(folder, tmp_path / "tiny.gguf")
    content = path.read_bytes()
    error = refused(tmp_path / "other.gguf", content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    assert "model.layers.1.mlp.up_proj.weight" in error.failure.why
    wrong = content.replace(
        b"llama.feed_forward_length\x04\x00\x00\x00\x60", b"llama.feed_forward_length\x04\x00\x00\x00\x40"
    )
    error = refused(tmp_path / "other.gguf", wrong)
    assert "[96, 64]" in error.failure.why
    assert "[64, 64]" in error.failure.why
