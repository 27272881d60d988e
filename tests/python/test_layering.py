"""Who may import whom: the table of the architecture as data, and the tree measured against it.

Server side and engine side meet only in wire and config, so that an API server never loads torch and an engine never
loads a web framework. The same for C++: the core knows no op, nothing knows the bindings.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "hybrid_serve"
MAX_LINES = 420

BOTTOM = {"wire", "config", "problems", "served", "catalogue", "control_group", "errors", "logging"}
MEMORY = {"shared_memory", "heartbeat", "flight"}  # of several processes
JOINS = {"sockets", "session", "curve"}  # API servers and engines
# Layer (a module or folder of hybrid_serve) -> layers it may import, besides itself. A new layer needs a line here.
MAY_IMPORT: dict[str, set[str]] = {
    "ranges": set(),
    "config": set(),
    "problems": {"config", "ranges"},
    "served": {"config"},
    "wire": set(),
    "logging": set(),
    "catalogue": set(),
    "errors": {"catalogue", "control_group", "wire"},
    "_core": set(),
    "_kernels": set(),
    "checkpoint": {"config", "errors", "logging"},
    "ops": {"_kernels"},
    "layers": {"ops", "checkpoint"},  # the checkpoint's description of itself: rotary scaling, activation
    "models": {"layers", "ops", "checkpoint", "config", "errors"},
    # The sampler fills columns of its own, so there is nothing for ops.py to allocate.
    "runner": {"models", "layers", "ops", "_kernels", "checkpoint", "control_group", "config", "errors", "logging"},
    "curve": BOTTOM,
    "sockets": {"curve", *BOTTOM},
    "session": set(),
    "flight": set(),
    "heartbeat": {"config", "flight", "shared_memory"},
    "parallel": {"sockets", "config"},
    "shared_memory": {"errors"},
    "control_group": set(),
    "live": {"config", "problems", "shared_memory"},
    "engine": {"_core", "runner", "parallel", *JOINS, *MEMORY, "checkpoint", *BOTTOM},
    "client": {"shared_memory", *JOINS, *BOTTOM},
    "text": {"checkpoint", *BOTTOM},
    "server": {"client", "text", "checkpoint", "live", "shared_memory", *BOTTOM},
    "launch": {"checkpoint", "sockets", "curve", *MEMORY, "live", *BOTTOM},
    # Of runner and models the parts without torch: `fit` counts with the engine's own arithmetic.
    # And `replay` runs the scheduler itself.
    "cli": {"launch", "client", "text", "checkpoint", "runner", "models", "curve", "flight", "_core", *BOTTOM},
    "llm": {"engine", "runner", "models", "text", "checkpoint", "client", "launch", "_core", *BOTTOM},
    "__main__": {"cli"},
}
# The package itself may name anything that it hands out, lazily.
MAY_IMPORT["__init__"] = {"llm", "wire"}

# Package of others -> the only layers that may import it; packages that are not listed are free.
ONLY_IN: dict[str, set[str]] = {
    "torch": {"ops", "layers", "models", "runner", "engine", "llm"},
    "transformers": {"text"},  # imports torch, hence only for a model that has no tokenizer.json
    "starlette": {"server"},
    "uvicorn": {"server"},
    "zmq": {"sockets", "curve", "client", "engine", "parallel", "launch"},
    "ray": {"launch"},
    "pickle": set(),  # no object serialiser anywhere
    "marshal": set(),
    "shelve": set(),
    "cloudpickle": set(),
    "dill": set(),
    "pydantic": set(),
}

# Module -> what a fresh interpreter must not have loaded after importing it.
LIGHT: dict[str, set[str]] = {
    "hybrid_serve": {"torch", "numpy", "zmq", "msgspec"},
    "hybrid_serve.cli.main": {"torch", "numpy", "zmq", "msgspec", "starlette"},
    "hybrid_serve.cli.options": {"torch", "numpy", "zmq", "starlette", "ray"},
    "hybrid_serve.cli.fit": {"torch", "zmq", "starlette"},
    "hybrid_serve.cli.doctor": {"torch", "numpy", "zmq", "starlette"},
    "hybrid_serve.cli.keys": {"torch", "zmq", "starlette"},
    "hybrid_serve.cli.ps": {"torch", "numpy", "zmq", "starlette"},
    "hybrid_serve.cli.batch.command": {"torch", "zmq", "starlette"},
    "hybrid_serve.cli.bench.serve": {"torch", "zmq", "starlette"},
    "hybrid_serve.launch.supervisor": {"torch", "starlette", "ray", "hybrid_serve._core", "hybrid_serve._kernels"},
    "hybrid_serve.server.app": {"torch", "transformers", "ray", "hybrid_serve._core", "hybrid_serve._kernels"},
}


def layer(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, inside functions and TYPE_CHECKING blocks too."""
    package = ["hybrid_serve", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import config` names a module in the alias, `from .config import Config` does not: both are kept.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def forbidden(file: Path) -> list[str]:
    """The imports of one file that the tables do not allow, each as a line for the reader."""
    mine, wrong = layer(file), []
    for line, name in imports(file):
        first, *rest = name.split(".")
        if first == "hybrid_serve":
            other = rest[0] if rest else "__init__"
            is_layer = (PACKAGE / other).is_dir() or any(PACKAGE.glob(f"{other}.py*"))
            # Otherwise it is an attribute of the package itself, such as __version__.
            if is_layer and other != mine and other not in MAY_IMPORT.get(mine, set()):
                wrong.append(f"{file.name}:{line}: {mine} must not import {other}")
        elif mine not in ONLY_IN.get(first, {mine}):
            wrong.append(f"{file.name}:{line}: {mine} must not import {first}")
    return wrong


PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", PYTHON_FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_import_goes_downwards(file: Path) -> None:
    assert layer(file) in MAY_IMPORT, f"a new layer {layer(file)}: say in MAY_IMPORT what it may import"
    assert forbidden(file) == []


def test_the_table_has_no_cycle() -> None:
    seen: set[str] = set()
    while ready := [name for name, below in MAY_IMPORT.items() if name not in seen and below <= seen]:
        seen.update(ready)
    assert seen == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("where", "source", "complaint"),
    [
        ("server/x.py", "import torch.nn", "server must not import torch"),
        ("server/x.py", "def f():\n    from torch import nn", "server must not import torch"),
        ("server/x.py", "from ..ops import linear", "server must not import ops"),
        ("server/x.py", "from .. import ops", "server must not import ops"),
        ("server/deep/x.py", "from ... import _kernels", "server must not import _kernels"),
        ("server/deep/x.py", "from ...ops import linear", "server must not import ops"),
        ("engine/x.py", "import hybrid_serve.wire, hybrid_serve.ops", "engine must not import ops"),
        ("wire.py", "from .config import Config", "wire must not import config"),
        ("engine/x.py", "import pickle", "engine must not import pickle"),
        ("server/x.py", "from .. import __version__\nfrom ..wire import Kind\nfrom . import y\nimport starlette", None),
        ("server/deep/x.py", "from ..y import z\nfrom ...config import Config", None),
    ],
)
def test_a_forbidden_import_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, source: str, complaint: str | None
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    for name in ("wire.py", "config.py", "ops.py", "_kernels.pyi"):
        (tmp_path / name).touch()
    file = tmp_path / where
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    found = forbidden(file)
    assert [line.partition(": ")[2] for line in found] == ([complaint] if complaint else [])


# A row counts from the day its folder exists; afterwards a module that is gone fails.
@pytest.mark.parametrize("module", [name for name in LIGHT if (ROOT / "python" / Path(*name.split(".")[:2])).is_dir()])
def test_a_light_module_stays_light(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & LIGHT[module] == set()


# --- C++ ---

CPP = ROOT / "cpp"
# Folder -> folders whose headers it may include, besides its own.
MAY_INCLUDE: dict[str, set[str]] = {
    "common": set(),
    "core": {"common"},
    "ops": {"common"},
    "bind": {"common", "core", "ops"},
    "cuda": {"common", "ops"},
}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
FOREIGN = re.compile(r"^(torch|ATen|c10|pybind11|Python\.h|cuda|cublas|nccl|zmq)")
CPP_FILES = sorted(
    file for top in (CPP, ROOT / "cuda") for file in top.rglob("*") if file.suffix in {".h", ".cpp", ".cu", ".cuh"}
)


def cpp_folder(file: Path) -> str:
    return "cuda" if file.is_relative_to(ROOT / "cuda") else file.relative_to(CPP).parts[0]


def forbidden_includes(folder: str, text: str) -> list[str]:
    """The includes of a source of ``folder`` that the table does not allow."""
    wrong = []
    for kind, name in INCLUDE.findall(text):
        if kind == "<":
            # Only bind/ knows Python, only cuda/ knows CUDA, nobody knows torch: tensors come by DLPack.
            allowed = {"bind": ("pybind11", "Python.h"), "cuda": ("cuda", "cublas", "nccl")}.get(folder, ())
            if FOREIGN.match(name) and not name.startswith(allowed):
                wrong.append(name)
        elif (top := name.split("/")[0]) in MAY_INCLUDE and top != folder and top not in MAY_INCLUDE[folder]:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("file", CPP_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_include_goes_downwards(file: Path) -> None:
    assert cpp_folder(file) in MAY_INCLUDE
    assert forbidden_includes(cpp_folder(file), file.read_text()) == []


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("core", '"ops/ops.h"'),
        ("core", '"bind/dlpack.h"'),
        ("core", "<pybind11/pybind11.h>"),
        ("ops", '"core/batch.h"'),
        ("ops", "<torch/extension.h>"),
        ("ops", "<cuda_runtime.h>"),
        ("bind", "<torch/extension.h>"),
        ("cuda", '"bind/dlpack.h"'),
    ],
)
def test_a_forbidden_include_is_found(folder: str, name: str) -> None:
    assert forbidden_includes(folder, f"#pragma once\n#include {name}\n#include <vector>\n") == [name[1:-1]]


def test_relative_includes_cannot_climb() -> None:
    climbing = [str(file) for file in CPP_FILES if re.search(r'#\s*include\s*"\.\./', file.read_text())]
    assert climbing == []


# --- Every file ---

SOURCES = sorted(
    file
    for top in ("python", "cpp", "cuda", "tests", "benchmarks")
    for file in (ROOT / top).rglob("*")
    if file.suffix in {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}
)


def test_no_file_is_longer_than_a_reader_bears() -> None:
    assert [f"{file}: {lines}" for file in SOURCES if (lines := len(file.read_text().splitlines())) > MAX_LINES] == []


def test_every_file_has_a_noun_for_a_name() -> None:
    nameless = re.compile(r"^(utils?|helpers?|misc|common)$")
    assert [str(file) for file in SOURCES if nameless.match(file.stem)] == []


# What people read, the start of a process as the system has it, or a number above earlier processes'; no deadline.
WALL_CLOCK = {
    "server/timeline.py", "server/context.py", "server/endpoints/completions.py", "server/endpoints/chat.py",
    "server/tracing.py", "text/chat_template.py", "cli/ps.py", "launch/evidence.py", "launch/listener.py",
    "session.py",
}  # fmt: skip


def test_no_deadline_is_of_a_clock_that_can_be_set() -> None:
    """F-61: a jump of the clock by an hour changes no timeout."""
    reads = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\.now|^from time import .*\btime\b", re.MULTILINE)
    found = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if reads.search(file.read_text())}
    assert found == WALL_CLOCK


def runs_text(tree: ast.AST) -> list[int]:
    """Lines with a call that makes code or objects of bytes, or gives a text to a shell."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            is_shell = any(word.arg == "shell" for word in node.keywords)
            if name == "yaml.load" and ast.unparse(node).endswith("yaml.BaseLoader)"):
                continue  # lists, maps and texts, nothing else
            if name in {"eval", "exec", "torch.load", "yaml.load", "os.system", "os.popen", "numpy.load"} or is_shell:
                found.append(node.lineno)
    return found


def test_nothing_makes_code_of_bytes() -> None:
    """ADV-01; serialisers of objects are in ONLY_IN, where nobody may import them."""
    calls = ("eval(x)", "exec(x)", "torch.load(f)", "yaml.load(f)", "os.system(x)", "run(x, shell=True)")
    assert all(runs_text(ast.parse(call)) for call in calls)
    assert {file.name: runs_text(ast.parse(file.read_text())) for file in PYTHON_FILES} == {
        file.name: [] for file in PYTHON_FILES
    }
