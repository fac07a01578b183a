"""Halts one thread of a process, as if it hung: ``python tests/e2e/lab/halt.py THREAD``.

A signal would stop the whole process; a debugger can stop one thread (ptrace(2)). The thread goes on when this process
ends.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tidegate.lab.processes import Process
from tidegate.lab.topology import Namespace

HALTED = "halted"
_SEIZE, _INTERRUPT = 0x4206, 0x4207  # linux/ptrace.h
_ALL_CHILDREN = 0x40000000  # __WALL of linux/wait.h: also threads of other processes


@contextmanager
def halted(host: Namespace, process: Process, thread: str) -> Iterator[None]:
    """Halts the thread of that name while the block lasts, or until the process is killed."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    number = next(task.name for task in tasks if (task / "comm").read_text().strip() == thread)
    holder = host.popen([sys.executable, __file__, number], name=f"halt-{thread}")
    try:
        holder.wait_for(HALTED)
        yield
    finally:
        holder.stop()


def main() -> None:
    thread = int(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    for request in (_SEIZE, _INTERRUPT):
        if libc.ptrace(request, thread, None, None) != 0:
            sys.exit(f"thread {thread} cannot be halted: {os.strerror(ctypes.get_errno())}")
    os.waitpid(thread, _ALL_CHILDREN)
    print(HALTED, flush=True)
    os.waitpid(thread, _ALL_CHILDREN)  # until it is killed: unless its tracer reaps it, it stays a zombie


if __name__ == "__main__":
    main()
