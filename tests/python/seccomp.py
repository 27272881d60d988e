"""Run as a script: ``seccomp.py NAME ... -- COMMAND``, which these system calls fail with EPERM, as they do where a
container's profile forbids them. Knows numbers of x86-64."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

NUMBERS = {
    "add_key": 248, "bpf": 321, "get_mempolicy": 239, "io_uring_setup": 425, "kcmp": 312, "keyctl": 250, "mbind": 237,
    "memfd_create": 319, "migrate_pages": 256, "mount": 165, "move_pages": 279, "perf_event_open": 298,
    "process_vm_readv": 310, "process_vm_writev": 311, "ptrace": 101, "set_mempolicy": 238, "setns": 308,
    "unshare": 272, "userfaultfd": 323,
}  # fmt: skip
ALLOWED = {"memfd_create"}  # by the default profiles of container runtimes; the others are not
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, MODE_FILTER = 22, 38, 2
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, FAIL = 0x7FFF0000, 0x00050000


def forbid(numbers: list[int]) -> None:
    """For this process and all that it starts."""
    program = [(LOAD_WORD, 0, 0, 0)]
    for number in numbers:
        program += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, FAIL | errno.EPERM)]
    program.append((RETURN, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for words in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, MODE_FILTER, head, 0, 0)):
        if libc.prctl(*words) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    end = sys.argv.index("--")
    forbid([NUMBERS[name] for name in sys.argv[1:end]])
    os.execvp(sys.argv[end + 1], sys.argv[end + 1 :])
