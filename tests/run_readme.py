"""Run every ```bash block of README.md, in order, in a copy of the working tree: what the README promises must work.

A block marked ```bash no-ci is not run, but listed. The blocks share one folder; each is one `bash -euo pipefail`.

    python tests/run_readme.py [README.md] [--list]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Block:
    """A fenced block: its first line in the file, its commands, and whether it is to be run."""

    line: int
    text: str
    run: bool


def blocks(markdown: str) -> list[Block]:
    """All ```bash blocks, in order."""
    found = []
    for match in re.finditer(r"^```bash([^\n]*)\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL):
        marks = match[1].split()
        unknown = set(marks) - {"no-ci"}
        if unknown:
            raise SystemExit(f"unknown mark on a bash block: {', '.join(sorted(unknown))}")
        found.append(Block(markdown.count("\n", 0, match.start()) + 2, match[2], not marks))
    return found


def copy_tree(target: Path) -> None:
    """What a clone would hold: tracked files, and new ones that git doesn't ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source = ROOT / name
        if name and source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the README's commands.")
    parser.add_argument("readme", nargs="?", type=Path, default=ROOT / "README.md")
    parser.add_argument("--list", action="store_true", help="show the blocks, run nothing")
    options = parser.parse_args()
    found = blocks(options.readme.read_text(encoding="utf-8"))
    if not any(block.run for block in found):
        raise SystemExit(f"{options.readme} has no bash block to run")
    with tempfile.TemporaryDirectory(prefix="fedlm-readme-") as name:
        folder = Path(name)
        if not options.list:
            copy_tree(folder)
        venv = Path(sys.prefix)
        # else `make` in the copy would install, and this environment would point to the copy from then on
        target = f"{venv}/.stamp-dev"
        if not options.list and subprocess.run(["make", "--question", f"VENV={venv}", target], cwd=ROOT).returncode:
            raise SystemExit("the environment is not up to date: run `make setup` first")
        environment = os.environ | {"PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}", "VENV": str(venv)}
        for block in found:
            title = f"{options.readme.name}:{block.line}"
            print(f"---- {title}{'' if block.run else ' NOT RUN (no-ci)'}\n{block.text.rstrip()}", flush=True)
            if options.list or not block.run:
                continue
            start = time.monotonic()
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text], cwd=folder, env=environment, stdin=subprocess.DEVNULL
            )
            print(f"---- {title}: exit {done.returncode} after {time.monotonic() - start:.0f} s", flush=True)
            if done.returncode != 0:
                return 1
    skipped = [block for block in found if not block.run]
    print(f"README: {len(found) - len(skipped)} blocks run, {len(skipped)} not run (no-ci)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
