"""A tiny federation over real text that never changes, this project's licence, for attacks: rows that differ."""

from __future__ import annotations

import json
from pathlib import Path

from tests.federation.conftest import Tiny

LICENCE = Path(__file__).parents[2] / "LICENSE"
ROWS, LETTERS = 120, 85

RECIPE = """
name: paged
model: {{source: {model}, dtype: float32}}
adapter: {{kind: full}}
data:
  sources: [{{path: rows.jsonl, columns: {{prompt: prompt, response: response}}}}]
  partition: {{kind: natural, by: site}}
  split: {{validation: 0.2, test: 0.2}}
training: {{optimizer: sgd, steps: 1, batch_size: 1, max_length: 96, lr: 1.0, clip_norm: null}}
federation: {{rounds: 2, workers: 1, algorithm: {{name: fedavg}}}}
"""


def paged(folder: Path, model: Path, shown: int = 10, said: int = 30) -> Tiny:
    """The recipe and its rows, in this folder: so many letters of a piece of the licence, and how it goes on."""
    text = " ".join(LICENCE.read_text().split())
    pieces = [text[i : i + LETTERS].strip() for i in range(0, ROWS * LETTERS, LETTERS)]
    with (folder / "rows.jsonl").open("w") as file:
        for number, piece in enumerate(pieces):
            row = {"prompt": piece[:shown], "response": piece[shown : shown + said], "site": f"site{number % 4}"}
            file.write(json.dumps(row) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model))
    return Tiny(folder)
