"""Arenas: the memory that the scheduler writes batches to, which another process can map, too."""

from __future__ import annotations

import mmap
import os
import weakref

from ..shared_memory import anonymous_file


class SharedArena(mmap.mmap):
    """Zeroed memory with a file descriptor, ``fd``, that is closed with it. Knows nothing of its columns.
    Pages are taken when first written: capacity that no batch uses costs nothing."""

    fd: int

    @staticmethod
    def of_size(num_bytes: int) -> SharedArena:
        fd = anonymous_file("hybrid-serve-arena")
        os.ftruncate(fd, num_bytes)
        return SharedArena.of_file(fd)

    @staticmethod
    def of_file(fd: int) -> SharedArena:
        """The same memory in the process that was given ``fd``, which is the arena's from then on."""
        arena = SharedArena(fd, os.fstat(fd).st_size)
        arena.fd = fd
        weakref.finalize(arena, os.close, fd)
        return arena
