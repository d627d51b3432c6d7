"""A tiny pipeline: pre-training of all weights, instruction tuning of an adapter, preference alignment on top."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from tests.federation.conftest import WORDS

PIPELINE = """
name: life
common:
  name: stage
  data:
    split: {{validation: 0.2, test: 0.2}}
    partition: {{kind: natural, by: site}}
  training: {{steps: 2, batch_size: 4, max_length: 96, lr: 0.01}}
  federation: {{rounds: 2, workers: 1, threads: 1}}
stages:
  pretrain:
    task: pretrain
    model: {{source: {model}, dtype: float32}}
    adapter: {{kind: full}}
    training: {{lr: 0.001}}
    data: {{sources: [{{path: text.jsonl, columns: {{text: text}}}}]}}
  instruct:
    task: instruct
    adapter: {{rank: 2}}
    data: {{sources: [{{path: rows.jsonl, columns: {{prompt: prompt, response: response}}}}]}}
  align:
    task: preference
    start: {{adapter: stack}}
    federation: {{rounds: 1}}
    data: {{sources: [{{path: pairs.jsonl, columns: {{prompt: prompt, chosen: chosen, rejected: rejected}}}}]}}
"""


def write(folder: Path, model: Path) -> Path:
    """The pipeline's file, with its rows beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    rows = [
        {"prompt": " ".join(draw.choices(WORDS, k=6)), "response": " ".join(draw.choices(WORDS, k=4)), "site": site}
        for site in [f"site{n % 3}" for n in range(90)]
    ]
    texts = [{"text": f"{r['prompt']} {r['response']}", "site": r["site"]} for r in rows]
    pairs = [
        {"prompt": r["prompt"], "chosen": r["response"], "rejected": o["prompt"], "site": r["site"]}
        for r, o in itertools.pairwise(rows)
    ]
    for name, lines in (("rows", rows), ("text", texts), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "pipeline.yaml").write_text(PIPELINE.format(model=model))
    return folder / "pipeline.yaml"
