"""``keys FILE``: makes the key that a head and its headless engines share."""

from __future__ import annotations

from pathlib import Path

from .usage import Parser, UsageError, dashed


def keys(argv: list[str]) -> int:
    """Never writes over a file."""
    parser = Parser(
        "hybrid-serve keys",
        "Makes a key file for --data-parallel-key-file. Copy it to every machine of the deployment, and to no other:\n"
        "whoever has it can give work to its engines and read what they do.",
    )
    parser.add_argument("FILE", nargs="?", type=Path, help="must not exist; only you will be able to read it")
    path = parser.parse_args(dashed(argv)).FILE
    if path is None:
        raise UsageError("which FILE?")
    from ..curve import make_key_file  # only here: help needs no sockets

    try:
        make_key_file(path)
    except FileExistsError:
        raise UsageError(f"{path} exists; give another name, or remove it first") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    print(f"{path}: made. Start the head with --data-parallel-size N --data-parallel-size-local L")
    print(f"--data-parallel-address ADDRESS --data-parallel-key-file {path}, and the others with --headless as well.")
    return 0
