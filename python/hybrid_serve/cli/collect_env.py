"""``collect-env``: what a bug report needs to know about this machine and build; lacks never make it fail."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from .usage import Parser, dashed

CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
TIMEOUT = 30.0  # seconds for a program that we ask

# In a child: importing an extension can end the process (a wrong CPU, a broken library), and that is what we report.
_ASK_KERNELS = """
import sys
sys.path.insert(0, sys.argv[1])
from hybrid_serve import _core, _kernels
print(_kernels.isa(), _kernels.num_threads(), _kernels.cuda_architectures())
"""


def collect_env(argv: list[str]) -> int:
    """Prints the facts, as lines or (``--json``) as one JSON object."""
    parser = Parser("hybrid-serve collect-env", "Prints what a bug report needs to know.")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    arguments = parser.parse_args(dashed(argv))
    found = facts()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for section, values in found.items():
        print(section)
        for name, value in values.items():
            text = ", ".join(str(item) for item in value) if isinstance(value, list) else value
            print(f"  {name:<20} {'none' if text in (None, '') else text}")
    return 0


def facts() -> dict[str, dict[str, Any]]:
    """Section -> name -> value. None: not known here."""
    return {
        "hybrid-serve": {"version": __version__, "place": str(Path(__file__).parents[1]), **_build()},
        "system": {
            "os": _os_name(),
            "kernel": platform.release(),
            "libc": " ".join(platform.libc_ver()).strip() or None,
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "executable": sys.executable,
        },
        "cpu": _cpu(),
        "memory": _memory(),
        "gpu": _gpu(),
        "packages": _packages(),
    }


def _build() -> dict[str, Any]:
    ask = [sys.executable, "-c", _ASK_KERNELS, str(Path(__file__).parents[2])]
    try:
        asked = subprocess.run(ask, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"kernels": f"not usable: {error}"}
    if asked.returncode < 0:
        return {"kernels": f"not usable: importing them ends the process with signal {-asked.returncode}"}
    if asked.returncode:
        return {"kernels": f"not usable: {(asked.stderr.strip() or 'no message').splitlines()[-1]}"}
    isa, threads, *architectures = asked.stdout.split()
    return {"kernels": "usable", "cpu_kernels": isa, "cpu_threads": int(threads), "cuda_kernels": architectures}


def _os_name() -> str:
    try:
        return str(platform.freedesktop_os_release()["PRETTY_NAME"])
    except (OSError, KeyError):
        return f"{platform.system()} {platform.version()}"


def _cpu() -> dict[str, Any]:
    text = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    return {
        "model": model[1] if model else platform.processor() or None,
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cgroup_cpu_max": _read("/sys/fs/cgroup/cpu.max").strip() or None,
        "flags": [flag for flag in CPU_FLAGS if flag in has],
    }


def _memory() -> dict[str, Any]:
    text = _read("/proc/meminfo")
    sizes = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return {
        "total_bytes": sizes.get("MemTotal"),
        "available_bytes": sizes.get("MemAvailable"),
        "cgroup_limit_bytes": int(limit) if limit.isdigit() else None,
        "huge_pages": (re.findall(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled")) or [None])[0],
        "shared_bytes": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
    }


def _gpu() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    return {
        "devices": output_lines(query),
        "topology": output_lines(["nvidia-smi", "topo", "-m"]),
        "nvcc": next((line for line in output_lines(["nvcc", "--version"]) if "release" in line), None),
    }


def _packages() -> dict[str, str | None]:
    """Version of each package that ours requires (None: not installed), read from metadata: nothing is imported."""
    names = {_name(line) for line in _requirements()}
    return {name: _version(name) for name in sorted(names | {"torch", "transformers"})}


def optional_packages() -> set[str]:
    """Those that only an extra requires."""
    return {_name(line) for line in _requirements() if "extra ==" in line}


def too_old() -> list[str]:
    """Packages that are installed in a version below the one required, as "name version, needs version"."""
    found = []
    for line in _requirements():
        least, name = re.search(r">=\s*([\d.]+)", line), _name(line)
        version = _version(name)
        if least and version and "extra ==" not in line and _numbers(version) < _numbers(least[1]):
            found.append(f"{name} {version}, needs {least[1]}")
    return found


def _requirements() -> list[str]:
    try:
        return metadata.requires("hybrid-serve") or []
    except metadata.PackageNotFoundError:
        return []  # used from a source tree


def _name(requirement: str) -> str:
    return re.split(r"[\s;<>=!~\[(]", requirement, maxsplit=1)[0]


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, without zeros at its end: 1.10.0rc1 is (1, 10)."""
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def output_lines(command: list[str]) -> list[str]:
    """What a program prints; nothing where it is not installed or fails."""
    if not shutil.which(command[0]):
        return []
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in asked.stdout.splitlines() if line.strip()] if asked.returncode == 0 else []


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
