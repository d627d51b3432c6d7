"""What a process says of its own memory."""

from __future__ import annotations

import subprocess
import sys

MEGABYTE = 2**20


def test_the_peak_is_the_process_s_own_and_not_its_parent_s() -> None:
    """A parent of 300 MB starts a child that needs a few: the kernel's figure of resource usage is inherited."""
    script = """
import subprocess, sys
held = bytearray(b"x") * (300 << 20)
child = "from fedlm.federation.memory import peak_rss; print(peak_rss())"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 5 * MEGABYTE < int(done.stdout) < 200 * MEGABYTE


def test_the_peak_grows_with_what_is_touched() -> None:
    script = """
from fedlm.federation.memory import peak_rss
before = peak_rss()
held = bytearray(b"x") * (100 << 20)
print(peak_rss() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 99 * MEGABYTE < int(done.stdout) < 130 * MEGABYTE
