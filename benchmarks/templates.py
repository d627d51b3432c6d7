"""Bench: every recipe that comes with fedlm, run as it is by the commands that a user gives.

    python benchmarks/templates.py --out runs/templates [--only news,prompt] [--dtype float32]

Reported for each: seconds from the command to its end (reading data and the report included, downloads not: run it
twice, or `fedlm models fetch` before), the most memory of all its processes together where a run reports it, and the
figure that its task is judged by, before and after. Finished ones in --out are not run again; one that was interrupted
goes on. Asked: minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fedlm.files import write_json
from fedlm.recipe.starters import DEFAULT, pipelines, read_template, templates
from fedlm.report.facts import read_run

TOKENIZER = {"pretrain-scratch": "tokenizers/speeches"}
"""Of templates that train one first, where they look for it."""

COMMANDS = {"prompt-search": ["prompt", "search"], "in-context": ["prompt", "icl"]}

FIGURES = ("accuracy", "generation_accuracy", "reward_accuracy", "exact_match", "rougeL", "reward", "loss")
"""The first that a run has is what it is judged by."""


def commands(name: str, run_dir: Path) -> list[list[str]]:
    """What a user gives after `fedlm`, in the folder of the recipe."""
    file, verb = f"{name}.yaml", ["pipeline"] if name in pipelines() else COMMANDS.get(name, ["run"])
    begun = any((run_dir / meta).is_file() for meta in ("run.json", "pipeline.json"))
    if begun and verb == ["run"]:
        return [["run", "--resume", str(run_dir)]]
    first = [["tokenizer", "train", file, "--out", TOKENIZER[name]]] if name in TOKENIZER and not begun else []
    return [*first, [*verb, file, "--run-dir", str(run_dir), *(["--resume"] if begun else [])]]


def run(name: str, folder: Path, dtype: str) -> dict[str, Any]:
    """Run a template, and say what it took and gave.

    Raises:
        SystemExit: a command failed; its output is in the folder.
    """
    run_dir = (folder / "runs" / name).resolve()
    text = read_template(name).replace("dtype: bfloat16", f"dtype: {dtype}")
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    program, began = Path(sys.executable).parent / "fedlm", time.monotonic()
    for command in commands(name, run_dir):
        with (folder / f"{name}.log").open("a") as log:
            status = subprocess.run([program, *command], cwd=folder, stdout=log, stderr=log, check=False).returncode
        if status:
            raise SystemExit(f"fedlm {' '.join(command)} failed: see {folder / name}.log")
    found: dict[str, Any] = {"seconds": time.monotonic() - began, "memory": None}
    if (run_dir / "run.json").is_file() and name not in COMMANDS:
        found["memory"] = read_run(run_dir).peak("peak_pss")
    evaluation = run_dir / "evaluation.json"
    if evaluation.is_file() and name not in COMMANDS:
        outcome = json.loads(evaluation.read_text())
        figure = next(f for f in FIGURES if f in outcome["final"])
        found |= {"figure": figure, **{which: outcome[which].get(figure) for which in ("base", "final")}}
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row for each template."""
    lines = [
        "| template | time | memory | figure on test rows | before | after |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for name, r in results.items():
        values = ["" if r.get(which) is None else f"{r[which]:.3f}" for which in ("base", "final")]
        minutes = f"{r['seconds'] / 60:.1f} min"
        memory = f"{r['memory'] / 2**30:.1f} GiB" if r["memory"] else ""
        lines.append(f"| {name} | {minutes} | {memory} | {r.get('figure', '')} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="names, with commas; default: all")
    parser.add_argument("--dtype", default="bfloat16", help="of SmolLM2: float32 where the processor has no bf16")
    options = parser.parse_args()
    names = [name for name in [*templates(), *pipelines()] if name != DEFAULT]
    if unknown := set((options.only or "").split(",")) - {*names, ""}:
        raise SystemExit(f"no such template: {', '.join(sorted(unknown))} (there are {', '.join(names)})")
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in options.only.split(",") if options.only else names:
        if name not in results:
            print(f"{name} …", flush=True)
            results[name] = run(name, options.out, options.dtype)
            write_json(kept, results)
    print(table(results))


if __name__ == "__main__":
    main()
