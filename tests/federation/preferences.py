"""A tiny federation whose rows are preferences, in each form that they come in."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from tests.federation.conftest import WORDS

RECIPE = """
name: tiny-preference
task: preference
model: {{source: {model}, dtype: float32}}
adapter: {{rank: 2, alpha: 6}}
data:
  sources: [{{path: pairs.jsonl, columns: {{prompt: prompt, chosen: chosen, rejected: rejected, label: aim}}}}]
  partition: {{kind: natural, by: site}}
  split: {{validation: 0.2, test: 0.2}}
training: {{steps: 2, batch_size: 4, max_length: 96, lr: 0.01}}
federation: {{rounds: 2, workers: 1}}
"""


class Preferences:
    """The folder of the recipe and its rows; chosen answers speak of science, rejected ones of money."""

    def __init__(self, base: Path, model: Path) -> None:
        self.base = base
        (base / "recipe.yaml").write_text(RECIPE.format(model=model))
        draw = random.Random(0)

        def text(n: int, *more: str) -> str:
            return " ".join([*draw.choices(WORDS, k=n), *more])

        with (base / "pairs.jsonl").open("w") as pairs, (base / "judged.jsonl").open("w") as judged:
            for number in range(72):
                about = {"site": f"site{0 if number % 3 else 1}", "aim": "helpful" if number % 4 else "harmless"}
                row = {
                    "prompt": text(5),
                    "chosen": text(1 + number % 3, "science"),
                    "rejected": text(1 + number % 2, "money"),
                }
                pairs.write(json.dumps(row | about) + "\n")
                wanted = number % 5 > 1
                one = {"prompt": row["prompt"], "response": row["chosen" if wanted else "rejected"], "good": wanted}
                judged.write(json.dumps(one | about) + "\n")

    def recipe(self, *changes: str) -> Recipe:
        return load_recipe(self.base / "recipe.yaml", changes)


JUDGED = (
    "data.sources=[{path: judged.jsonl, columns: {prompt: prompt, response: response, desirable: good, label: aim}}]"
)
