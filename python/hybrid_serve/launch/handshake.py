"""Whether a child that says HELLO belongs to this server. Knows one message, no socket."""

from __future__ import annotations

from collections.abc import Sequence

from .. import __version__
from ..wire import PROTOCOL_VERSION, EngineFacts, Hello, StartupFailure
from .plan import ProcessSpec


def refusal(hello: Hello, identity: bytes, specs: list[ProcessSpec], config_digest: str) -> StartupFailure | None:
    """Why not; None: it does. A child of another version or configuration must not serve beside the others."""
    is_planned = any((spec.role, spec.index, spec.identity) == (hello.role, hello.index, identity) for spec in specs)
    problem = ""
    if not is_planned:
        problem = f"{hello.role} {hello.index} is not one of this server's processes"
    elif (hello.protocol, hello.version) != (PROTOCOL_VERSION, __version__):
        problem = (
            f"it has version {hello.version}, protocol {hello.protocol}; "
            f"this is version {__version__}, protocol {PROTOCOL_VERSION}"
        )
    elif hello.config_digest != config_digest:
        problem = f"its configuration has digest {hello.config_digest}, this server's {config_digest}"
    if not problem:
        return None
    what = f"process {hello.pid} was refused at the handshake"
    return StartupFailure("HS-E201", what, problem, "install one version, and start the server again", 20)


def device_refusal(facts: Sequence[EngineFacts | None]) -> StartupFailure | None:
    """Of the engines of one machine, as far as they are known: where it has fewer GPUs, some would run on the CPU."""
    devices = [each.device for each in facts if each is not None]
    if len({device.split()[0] for device in devices}) <= 1:
        return None
    why, fix = f"they run on {', '.join(devices)}", "--data-parallel-size-local of the number of GPUs at most"
    return StartupFailure("HS-E025", "the engines do not have the same kind of device", why, fix, 2)


def node_refusal(hello: Hello, ranks: Sequence[int], engine_digest: str) -> StartupFailure | None:
    """Why headless engines may not join the head that waits for ``ranks``; None: they may."""
    wanted = range(hello.index, hello.index + hello.count)
    problem, fix = "", "--data-parallel-start-rank and -size-local must fit the head's --data-parallel-size"
    if hello.role != "node" or hello.count < 1:
        problem = f"{hello.role} {hello.index} is not a node of headless engines"
    elif (hello.protocol, hello.version) != (PROTOCOL_VERSION, __version__):
        problem = (
            f"they have version {hello.version}, protocol {hello.protocol}; "
            f"the head has version {__version__}, protocol {PROTOCOL_VERSION}"
        )
        fix = "install one version on all machines"
    elif not set(wanted) <= set(ranks):
        problem = f"they have the ranks {list(wanted)[:16]}, the head waits for {list(ranks)}"
    elif hello.config_digest != engine_digest:
        problem = f"their options of model, cache, scheduler and engine have digest {hello.config_digest}, "
        problem += f"the head's {engine_digest}"
        fix = "give both the same model and the same options of these groups"
    if not problem:
        return None
    return StartupFailure("HS-E204", "the head refuses these engines", problem, fix, 20)
