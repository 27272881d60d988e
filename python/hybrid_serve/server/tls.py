"""HTTPS: the certificate, and taking up a new one without a restart. Knows no connection."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import ServerConfig
from ..errors import StartupError
from ..shared_memory import anonymous_file


class Certificate:
    """The TLS context of a server. ``reload`` changes it in place: whoever connects next gets the new certificate, and
    who is connected notices nothing."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises StartupError (HS-E041)."""
        self._config = config
        self.paths = [Path(name) for name in (config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs) if name]
        try:
            self.context = self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            what, fix = (
                f"certificate {config.ssl_certfile} cannot be used",
                "--ssl-certfile and --ssl-keyfile of a pair",
            )
            raise StartupError("HS-E041", what, _reason(error), fix) from error

    def reload(self) -> None:
        """Raises ValueError, and keeps what there is, if the files are not a certificate and its key. A CA that was
        removed from --ssl-ca-certs is trusted until the next start."""
        try:
            self._load(self.context)
        except (OSError, ValueError) as error:
            raise ValueError(_reason(error)) from error

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        config = self._config
        with _copies(config.ssl_certfile, config.ssl_keyfile or config.ssl_certfile) as (certificate, key):
            # First into a context of its own: half a pair would stay in one that serves.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
            context.load_cert_chain(certificate, key)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if config.ssl_ca_certs:
            context.load_verify_locations(config.ssl_ca_certs)
        context.verify_mode = ssl.VerifyMode(config.ssl_cert_reqs)
        if config.ssl_ciphers:
            context.set_ciphers(config.ssl_ciphers)
        context.set_alpn_protocols(["http/1.1"])
        return context


@contextmanager
def _copies(*paths: str) -> Iterator[list[str]]:
    """Paths of copies in memory: what is checked is what is loaded, whoever writes the files meanwhile."""
    opened: list[int] = []
    try:
        for path in paths:
            data = Path(path).read_bytes()
            opened.append(anonymous_file("certificate"))
            os.write(opened[-1], data)
        yield [f"/proc/self/fd/{fd}" for fd in opened]
    finally:
        for fd in opened:
            os.close(fd)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return getattr(error, "reason", None) or str(error.args[-1])
    if isinstance(error, OSError):
        return f"{error.filename or ''}: {error.strerror}".lstrip(": ")
    return str(error)


def certificate(config: ServerConfig) -> Certificate | None:
    """None for plain HTTP. Raises StartupError (HS-E041)."""
    if config.ssl_certfile:
        if config.ssl_cert_reqs and not config.ssl_ca_certs:
            why = f"--ssl-cert-reqs {config.ssl_cert_reqs} asks clients for certificates, and nobody may sign them"
            raise StartupError("HS-E041", "client certificates cannot be checked", why, "--ssl-ca-certs FILE")
        return Certificate(config)
    given = [name for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers") if getattr(config, name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise StartupError(
            "HS-E041", f"{flags} without a certificate", "the server would not use TLS", "--ssl-certfile"
        )
    return None
