"""Peak memory of a whole run: the proportional set size (PSS) of this process and its children, sampled in a thread.

PSS counts a page shared by n processes as 1/n in each, so that a base model mapped by every worker counts once.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import psutil


def peak_rss() -> int:
    """Highest resident size of this process so far, in bytes.

    Linux hands `getrusage`'s figure down to a process that another one starts: a small worker of a large coordinator
    would report the coordinator's size. The kernel's own mark of this program's memory begins anew.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_pss(pid: int) -> int:
    """PSS of one process in bytes (its resident size where the system reports no PSS); 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def release_freed() -> None:
    """Give memory that was freed back to the system, after a phase that needed much for a moment.

    The C library and Arrow keep freed pages for later; with tens of thousands of silos that is most of what reading the
    data took.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()


class MemorySampler:
    """Samples the run's PSS every `interval` seconds; `take()` gives the peak since the last call.

    The kernel walks every mapped page for one sample, a fifth of a second for two workers with a model, so the pause
    grows with what a sample took: sampling costs at most one percent of one core.
    """

    def __init__(self, interval: float = 0.5) -> None:
        self._interval = interval
        self._peak = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedlm-memory", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def take(self) -> int:
        """Bytes at the highest sample since the last call; always includes a sample of this moment."""
        self._sample()
        with self._lock:
            peak, self._peak = self._peak, 0
        return peak

    def _sample(self) -> None:
        total = process_pss(os.getpid())
        for child in psutil.Process().children(recursive=True):
            total += process_pss(child.pid)
        with self._lock:
            self._peak = max(self._peak, total)

    def _run(self) -> None:
        pause = self._interval
        while not self._stop.wait(pause):
            began = time.thread_time()
            try:
                self._sample()
            except psutil.Error:
                continue
            pause = max(self._interval, 100 * (time.thread_time() - began))
