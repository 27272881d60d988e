"""A CPU without AVX, as an emulator has it (F-63): no instruction that it lacks is met, and the tokens are the same."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_serve import LLM, SamplingParams
from tiny_models import make_tiny_model

CODE = """
import sys
from hybrid_serve import _kernels
from test_old_cpu import tokens_of
print(_kernels.isa(), tokens_of(sys.argv[1]))
"""


def tokens_of(model: str) -> list[list[int]]:
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    return [output.outputs[0].token_ids for output in LLM(model).generate([[1, 2, 3], [5, 6, 7, 8]], params)]


@pytest.fixture
def emulator() -> str:
    """Its path. Where it is missing, tests that need it skip; where HYBRID_REQUIRE_TOOLS=1 (CI), they fail."""
    found = shutil.which("qemu-x86_64")
    if found is None:
        if os.environ.get("HYBRID_REQUIRE_TOOLS") == "1":
            pytest.fail("qemu-x86_64 is missing (package qemu-user)")
        pytest.skip("qemu-x86_64 is missing")
    return found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="such a CPU is of another kind")
@pytest.mark.timeout(300)
def test_a_cpu_without_avx_gives_the_same_tokens(emulator: str, tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "tiny"))
    found = subprocess.run(
        [emulator, "-cpu", "Nehalem", os.path.realpath(sys.executable), "-c", CODE, model],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == f"baseline {tokens_of(model)}"
