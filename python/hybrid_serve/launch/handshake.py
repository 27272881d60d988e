"""Whether a child that says HELLO belongs to this server. Knows one message, no socket."""

from __future__ import annotations

from .. import __version__
from ..wire import PROTOCOL_VERSION, Hello, StartupFailure, api_identity, engine_identity
from .plan import ProcessSpec


def refusal(hello: Hello, identity: bytes, specs: list[ProcessSpec], config_digest: str) -> StartupFailure | None:
    """Why not; None: it does. A child of another version or configuration must not serve beside the others."""
    expected = {"engine": engine_identity, "api": api_identity}.get(hello.role)
    is_planned = any((spec.role, spec.index) == (hello.role, hello.index) for spec in specs)
    problem = ""
    if expected is None or not is_planned or identity != expected(hello.index):
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
