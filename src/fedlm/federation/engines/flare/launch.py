"""Start a program of ours or of NVFlare's as a child that never outlives its supervisor.

    python -m fedlm.federation.engines.flare.launch MODULE [ARGUMENTS...]

The supervisor holds the other end of this process's standard input and never writes to it. When that end closes, the
supervisor is gone, however it went, and this process ends too. Imports nothing but the standard library: it stands in
front of processes that must stay small.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading

ORPHANED = 75
"""Exit code of a process whose supervisor is gone."""


def _watch(descriptor: int) -> None:
    try:
        while os.read(descriptor, 4096):
            pass
    except OSError:
        os._exit(ORPHANED)  # an unreadable pipe says the same as a closed one
    os._exit(ORPHANED)


def main() -> None:
    """Run the module named by the first argument as `python -m` would."""
    os.umask(0o077)  # whatever it writes is this user's own
    descriptor = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # the program itself, and what it starts, has no keyboard
    os.close(null)
    threading.Thread(target=_watch, args=[descriptor], name="supervisor", daemon=True).start()
    module, sys.argv = sys.argv[1], sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
