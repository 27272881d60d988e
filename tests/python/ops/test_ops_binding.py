"""How tensors reach the kernels: no copy, any DLPack producer, the GIL released, clear errors."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hybrid_serve
from hybrid_serve import _kernels, ops

FLOAT_TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_a_kernel_writes_into_the_memory_of_a_torch_tensor(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 64).to(dtype), torch.ones(64, dtype=dtype)
    whole = torch.zeros(5, 100, dtype=dtype)
    address = whole.data_ptr()
    _kernels.rms_norm(whole[1:4, 8:72], x, weight, None, 1e-5, False)
    assert whole.data_ptr() == address
    expected = torch.nn.functional.rms_norm(x.float(), (64,), eps=1e-5)
    torch.testing.assert_close(whole[1:4, 8:72].float(), expected, atol=2e-2, rtol=1e-2)
    whole[1:4, 8:72] = 0
    assert not whole.any(), "the kernel wrote outside of its output"


def test_numpy_arrays_are_read_and_written_in_place() -> None:
    out, x, weight = np.zeros((2, 8), np.float32), np.full((2, 8), 3, np.float32), np.full(8, 2, np.float32)
    _kernels.rms_norm(out, x, weight, None, 0.0, False)
    np.testing.assert_allclose(out, 2.0, rtol=1e-6)


def test_a_read_only_array_is_an_input_but_not_an_output() -> None:
    x = np.ones((2, 8), np.float32)
    x.flags.writeable = False
    out = np.zeros((2, 8), np.float32)
    _kernels.rms_norm(out, x, np.ones(8, np.float32), None, 0.0, False)
    assert out.sum() == pytest.approx(16.0)
    with pytest.raises(ValueError, match="an output tensor is read-only"):
        _kernels.rms_norm(x, out, np.ones(8, np.float32), None, 0.0, False)


class OldProducer:
    """Speaks DLPack as it was before version 1.0: no keyword arguments, an unversioned capsule."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __dlpack__(self, stream: None = None) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_a_producer_from_before_dlpack_1_works() -> None:
    out = np.zeros((2, 8), np.float32)
    ones = np.ones(8, np.float32)
    _kernels.rms_norm(OldProducer(out), OldProducer(np.ones((2, 8), np.float32)), ones, None, 0.0, False)
    assert out.sum() == pytest.approx(16.0)


def test_a_parameter_is_a_tensor() -> None:
    weight = torch.nn.Parameter(torch.full((8,), 2.0), requires_grad=False)
    out = ops.rms_norm(torch.ones(1, 8), weight, 0.0)
    torch.testing.assert_close(out, torch.full((1, 8), 2.0))


def test_exported_memory_is_given_back_after_the_call() -> None:
    array = np.ones((2, 8), np.float32)
    before = sys.getrefcount(array)
    for _ in range(5):
        _kernels.rms_norm(array, array, np.ones(8, np.float32), None, 0.0, False)
        with pytest.raises(ValueError, match="weight has shape"):
            _kernels.rms_norm(array, array, np.ones(7, np.float32), None, 0.0, False)
    assert sys.getrefcount(array) == before


def test_wrong_tensors_raise_value_error_with_the_numbers() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=re.escape("rms_norm: weight has shape [7], expected [8]")):
        ops.rms_norm(x, torch.ones(7), 0.0)
    with pytest.raises(ValueError, match="rms_norm: weight is bfloat16, expected float32"):
        ops.rms_norm(x, weight.bfloat16(), 0.0)
    with pytest.raises(ValueError, match="unsupported dtype: DLPack code 2, 64 bits"):
        ops.rms_norm(x, weight.double(), 0.0)
    with pytest.raises(ValueError, match="rms_norm: x is missing"):
        _kernels.rms_norm(torch.empty(2, 8), None, weight, None, 0.0, False)
    with pytest.raises(ValueError, match="tensor has 7 dimensions, at most 6"):
        ops.rms_norm(torch.ones(1, 1, 1, 1, 1, 1, 1), weight, 0.0)
    with pytest.raises(ValueError, match="neither may be negative"):
        _kernels.packed_size(-1, 8)
    with pytest.raises(ValueError, match=re.escape("embedding: ids holds 5, expected values in [0, 5)")):
        ops.embedding(torch.tensor([5], dtype=torch.int32), ops.pack_weight(torch.ones(5, 8)))


def test_what_is_no_tensor_raises_type_error() -> None:
    with pytest.raises(TypeError, match=r"expected a tensor .* got list"):
        _kernels.silu_mul([1.0], torch.ones(1, 2))


def test_other_threads_run_while_a_kernel_does() -> None:
    weight = ops.pack_weight(torch.ones(512, 1024))
    x, out = torch.ones(512, 1024), torch.empty(512, 512)
    turns, turns_during_call, done = 0, 0, False

    def call_until_seen() -> None:
        nonlocal turns_during_call, done
        deadline = time.monotonic() + 20
        while turns_during_call == 0 and time.monotonic() < deadline:
            before = turns
            _kernels.linear(out, x, weight.data, None, weight.n, weight.k)
            turns_during_call = turns - before
        done = True

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # from here on, a thread runs only when another one lets go
    try:
        caller = threading.Thread(target=call_until_seen)
        caller.start()
        while not done:
            turns += 1
            time.sleep(0)
        caller.join()
    finally:
        sys.setswitchinterval(interval)
    assert turns_during_call > 0


def test_two_threads_may_call_kernels_at_once() -> None:
    weight = ops.pack_weight(torch.randn(640, 256))
    x = torch.randn(8, 256)
    expected = ops.linear(x, weight)
    results: list[bool] = []

    def call_often() -> None:
        results.append(all(torch.equal(ops.linear(x, weight), expected) for _ in range(200)))

    threads = [threading.Thread(target=call_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 3


def stub_signatures() -> dict[str, list[str]]:
    stub = ast.parse((Path(hybrid_serve.__file__).parent / "_kernels.pyi").read_text())
    return {node.name: [a.arg for a in node.args.args] for node in stub.body if isinstance(node, ast.FunctionDef)}


def test_the_stub_lists_the_functions_of_the_module_with_their_arguments() -> None:
    module = {
        name: re.findall(r"(\w+): ", (getattr(_kernels, name).__doc__ or "").partition("(")[2].partition(" ->")[0])
        for name in dir(_kernels)
        if not name.startswith("_")
    }
    assert module == stub_signatures()


def test_the_number_of_threads_changes_speed_not_results() -> None:
    weight, x = ops.pack_weight(torch.randn(700, 96).bfloat16()), torch.randn(33, 96).bfloat16()
    results = []
    for threads in (1, 2, 3):
        _kernels.set_num_threads(threads)
        assert _kernels.num_threads() == threads
        results.append(ops.linear(x, weight))
    _kernels.set_num_threads(0)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def isa_of_a_process_with(wanted: str) -> subprocess.CompletedProcess[str]:
    code = "from hybrid_serve import _kernels; print(_kernels.isa())"
    paths = [str(Path(hybrid_serve.__file__).parent.parent)]
    environment = {"HYBRID_CPU_ISA": wanted, "PYTHONPATH": ":".join(paths), "PATH": ""}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_picks_the_instruction_set() -> None:
    """F-63"""
    assert isa_of_a_process_with("baseline").stdout.strip() == "baseline"
    assert isa_of_a_process_with("").stdout.strip() == _kernels.isa()
    refused = isa_of_a_process_with("mmx")
    assert refused.returncode != 0
    assert "ValueError: HYBRID_CPU_ISA is 'mmx', but this CPU runs: baseline" in refused.stderr
