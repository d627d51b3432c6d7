"""Kills a federation again and again and resumes it: a process of its own that imports once and forks each attempt.

    python kill_driver.py RECIPE '[{"root": "RUN_DIR", "seed": 0, "kills": 2, "set": ["a.b=c"]}, ...]'

Runs the recipe of each case uninterrupted in RUN_DIR/whole, then in RUN_DIR/killed with so many kills (SIGKILL to the
whole process group but the workers, which must end by themselves) at random moments of the measured duration, each
followed by a resume. Prints a JSON list, an object for each case: how many kills hit a live run, and the SHA-256 of
both final adapters and checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path


def attempt(recipe_file: Path, changes: list[str], run_dir: Path, resume: bool) -> int:
    """Fork a process that runs or resumes; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        from fedlm.federation.api import run_recipe
        from fedlm.recipe.load import load_recipe

        recipe = load_recipe(recipe_file, changes)
        run_recipe(recipe, base=recipe_file.parent, run_dir=run_dir, resume=resume)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def finish(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise SystemExit(f"a run failed with status {status}")


def result(run_dir: Path) -> dict[str, str]:
    """Hashes of what must not depend on kills: final tensors, and everything in rounds.jsonl but times and memory."""
    files = sorted([*run_dir.glob("adapter/*"), *run_dir.glob("checkpoints/*/*.safetensors")])
    found = {str(f.relative_to(run_dir)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    found["rounds"] = hashlib.sha256(json.dumps(rounds(run_dir)).encode()).hexdigest()
    return found


def rounds(run_dir: Path) -> list[object]:
    kept = []
    for line in (run_dir / "rounds.jsonl").read_text().splitlines():
        record = json.loads(line)
        silos = {n: [s["loss"], s["tokens"], s["bytes_up"], s["bytes_down"]] for n, s in record["silos"].items()}
        validation = record["validation"] and record["validation"]["loss"]
        kept.append([record["round"], record["sampled"], record["replied"], record["loss"], validation, silos])
    return kept


def lines(run_dir: Path) -> int:
    """Rounds that are written down, and whatever is being written."""
    file = run_dir / "rounds.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def main() -> None:
    recipe_file, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    # Everything heavy is imported before the first fork, so that an attempt starts in no time.
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch

    import fedlm.comparison
    import fedlm.federation.coordinator
    import fedlm.federation.engines.local
    import fedlm.models.export
    import fedlm.training.loop  # noqa: F401

    torch.set_num_threads(1)
    found = []
    for case in cases:
        found.append(killed_and_whole(recipe_file, Path(case["root"]), case["seed"], case["kills"], case["set"]))
    print(json.dumps(found))


def killed_and_whole(recipe_file: Path, root: Path, seed: int, kills: int, changes: list[str]) -> dict[str, object]:
    draw = random.Random(seed)
    whole, killed = root / "whole", root / f"killed-{seed}"
    started = time.monotonic()
    if not (whole / "adapter").exists():
        finish(attempt(recipe_file, changes, whole, resume=False))
        (root / "duration").write_text(str(time.monotonic() - started))
    duration = float((root / "duration").read_text())

    hits = 0
    for _ in range(kills):
        pid = attempt(recipe_file, changes, killed, resume=(killed / "run.json").exists())
        until = time.monotonic() + draw.uniform(0.0, duration)
        # Before its last round at the latest: the machine may be faster now than when the duration was measured.
        while time.monotonic() < until and lines(killed) < lines(whole) - 1:
            time.sleep(0.005)
        gone, _ = os.waitpid(pid, os.WNOHANG)
        if gone == 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            hits += 1
    finish(attempt(recipe_file, changes, killed, resume=(killed / "run.json").exists()))
    return {"hits": hits, "duration": duration, "whole": result(whole), "killed": result(killed)}


if __name__ == "__main__":
    main()
