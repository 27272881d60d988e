"""One model of several that a server has. Crosses between processes as JSON, like the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec

from .config import Config, Option

# What one model may differ in from the others: groups of config.py, and options of the other groups.
OWN_GROUPS = ("model", "cache", "scheduler", "engine")
OWN_OPTIONS = ("data_parallel_size", "data_parallel_prefix_affinity")
MOST_ENGINES = 99  # of all models together: a path of a socket has room for two digits


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What its place in the file says. Its engines have the numbers from ``first_engine`` on, also while it is not
    loaded; ``config`` is what they are started with, and what the API servers answer its requests by."""

    name: str  # by which clients ask for it
    config: Config
    memory: int = 0
    at_start: bool = False
    first_engine: int = 0

    @property
    def engines(self) -> range:
        return range(self.first_engine, self.first_engine + self.config.parallel.data_parallel_size)


@dataclass(frozen=True)
class FileOnly:
    """What the file says of a model besides options."""

    memory: Annotated[int, Option("bytes that it takes of max_loaded_bytes", "SIZE")] = 0
    at_start: Annotated[bool, Option("it is loaded before the server is ready")] = False


@dataclass(frozen=True)
class Budget:
    """How many models, and how many bytes of them, may be in memory at once; 0: any number."""

    max_models: int = 0
    max_bytes: int = 0

    def holds(self, models: list[ServedModel]) -> bool:
        return not (
            (self.max_models and len(models) > self.max_models)
            or (self.max_bytes and sum(model.memory for model in models) > self.max_bytes)
        )
