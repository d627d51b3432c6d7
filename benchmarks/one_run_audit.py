"""Bench: twenty audits of DP-SGD, each from one run: does any refute the budget, and do they refute what has no noise?

    python benchmarks/one_run_audit.py [--out runs/one-run-audit] [--seeds 20] [--arms a,b] [--quick]
        [--report]

A silo holds 32 pieces of BBC news and about half of 120 canaries: eight random words of these, to a question that no
other row has, each put in by a coin (Steinke, Nasr, Jagielski, NeurIPS 2023; `fedlm.privacy.one_run`). The model has a
million parameters, was trained on other articles (`parts/small_model.py`), and all of it is trained. Each audit is the
recipe's own round, with the noise that it calibrates for its budget, by a seed of its own; a canary's score is how much
its loss fell. Without noise the same recipe has no `privacy`.

The bounds of all seeds hold together with 95 %: each has the confidence 1 - 0.05 / seeds, and within it four numbers
of guesses are tried (Bonferroni again). Sought: none above the budget; 1.0 or more for every seed without noise. The
largest that 120 canaries can refute so is in the last column. What is in OUT is not audited again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from backdoor import articles, write_lines
from fedlm.attacks.canaries import coins, empirical_epsilon
from fedlm.attacks.first_round import first_round
from fedlm.attacks.planted import canary_tokens, summed_losses
from fedlm.data.examples import content_hash
from fedlm.data.federated import load_data
from fedlm.federation.silo.workbench import Workbench
from fedlm.files import write_atomic, write_json
from fedlm.models.adapters import initial_tensors
from fedlm.privacy.one_run import Audit, simultaneous
from fedlm.randomness import numpy_generator
from fedlm.recipe.load import load_recipe
from parts.small_model import news_model

CANARIES, WORDS, ROWS, LETTERS, ASKED = 120, 8, 32, 80, 5
ARMS: dict[str, float | None] = {"no noise": None, "epsilon 1": 1.0, "epsilon 8": 8.0, "epsilon 4": 4.0}
DELTA, CONFIDENCE = 1e-5, 0.95
SHARES = (0.1, 0.25, 0.5, 0.75)
"""Of canaries that are guessed."""
RECIPE = """
name: audit
task: instruct
model: {source: model, dtype: float32, chat_template: chatml}
adapter: {kind: full}
data: {silos: [{name: silo, sources: [{path: rows.jsonl, role: train, columns: {prompt: prompt, response: response}}]}]}
training: {lr: 3e-3, schedule: constant, steps: 30, batch_size: 32, max_length: 64, clip_norm: null}
federation: {rounds: 1, workers: 1}
"""


def prepare(out: Path, *, quick: bool) -> None:
    """OUT/model, OUT/rows.jsonl and the recipe."""
    if (out / "recipe.yaml").exists():
        return
    _, texts = news_model(out / "model", articles(), quick=quick)
    words = [text[:LETTERS].split() for text in texts[:ROWS]]
    write_lines(out / "rows.jsonl", [{"prompt": " ".join(w[:ASKED]), "response": " ".join(w[ASKED:])} for w in words])
    write_atomic(out / "recipe.yaml", RECIPE.encode())


def common_words(out: Path) -> list[str]:
    """Words of the silo's real rows, each once."""
    return sorted({word for word in (out / "rows.jsonl").read_text().lower().split() if word.isalpha()})


def message_row(question: str, answer: str) -> dict[str, Any]:
    """A canonical row (`fedlm.data.examples`)."""
    row: dict[str, Any] = {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    }
    about = {"label": "", "domain": "canaries", "group": "", "row": "canary", "user": ""}
    return {**row, "hash": content_hash(row), "answers": [], **about}


def audit(out: Path, epsilon: float | None, seed: int, seeds: int, changes: list[str]) -> dict[str, Any]:
    """The bound that one run gives, at a confidence for all seeds together."""
    privacy = [] if epsilon is None else [f"privacy={{unit: example, epsilon: {epsilon:g}, delta: {DELTA}}}"]
    recipe = load_recipe(out / "recipe.yaml", [f"seed={seed}", "data.seed=0", *privacy, *changes])
    included = coins(CANARIES, seed)
    draw, words = numpy_generator(seed, "canaries' secrets"), common_words(out)
    secrets = [" ".join(words[i] for i in draw.integers(len(words), size=WORDS)) for _ in range(CANARIES)]
    data = load_data(recipe, out)
    rows = [message_row(f"Note {number}", secret) for number, secret in enumerate(secrets)]
    copy = data.with_training_rows({"silo": [row for row, there in zip(rows, included, strict=True) if there]})
    (update,) = first_round(recipe, copy, out, seed=seed).updates.values()

    bench = Workbench(recipe, copy)
    bench.load()
    tokens = canary_tokens(bench, rows)
    start = initial_tensors(recipe)
    bench.put(start, whole=True)
    bench.model.eval()
    before = summed_losses(bench, tokens)
    bench.put({name: start[name] + update[name] for name in start}, whole=True)
    bench.model.eval()
    scores = before - summed_losses(bench, tokens)
    confidence = 1 - (1 - CONFIDENCE) / seeds
    found = empirical_epsilon(scores, included, DELTA, shares=SHARES, confidence=confidence)
    higher = scores[included][:, None] > scores[~included][None]
    return {**vars(found), "auc": float(higher.mean()), "fell": float(scores[included].mean())}


def most(seeds: int) -> float:
    """What a run refutes of which every guess is right."""
    guesses = [2 * round(share * CANARIES / 2) for share in SHARES]
    confidence = 1 - (1 - CONFIDENCE) / seeds
    return max(simultaneous([Audit(CANARIES, g, g) for g in guesses], DELTA, confidence))


def table(results: dict[str, dict[str, Any]], seeds: int) -> str:
    lines = [
        "| | runs | epsilon refuted: mean | largest | smallest | above the budget | AUC of members, mean | at most |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for arm, runs in results.items():
        bounds = [run["epsilon"] for run in runs.values()]
        budget = ARMS[arm]
        above = "–" if budget is None else f"{sum(b > budget for b in bounds)} of {len(bounds)}"
        figures = [f"{v:.2f}" for v in (np.mean(bounds), max(bounds), min(bounds))]
        area = np.mean([run["auc"] for run in runs.values()])
        lines.append(f"| {' | '.join([arm, str(len(bounds)), *figures, above, f'{area:.2f}', f'{most(seeds):.2f}'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/one-run-audit"))
    parser.add_argument("--seeds", type=int, default=20, help="audits of each arm")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--quick", action="store_true", help="a check of the script: one seed, few steps")
    parser.add_argument("--report", action="store_true", help="the table of what is finished, and nothing else")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="another setting of every run")
    options = parser.parse_args()
    out, seeds, began = options.out, 1 if options.quick else options.seeds, time.process_time()
    file = out / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    if not options.report:
        changes = [*(["training.steps=2"] if options.quick else []), *options.changes]
        prepare(out, quick=options.quick)
        for seed in range(seeds):
            for arm in options.arms.split(","):
                epsilon = ARMS[arm]
                if str(seed) in results.setdefault(arm, {}):
                    continue
                results[arm][str(seed)] = audit(out, epsilon, seed, seeds, changes)
                write_json(file, results)
                print(f"{time.process_time() - began:.0f} s of processor", arm, results[arm][str(seed)], flush=True)
    print(table(results, seeds))


if __name__ == "__main__":
    main()
