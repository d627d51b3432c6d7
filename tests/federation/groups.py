"""Groups that disagree: the same pairs of answers, of which half of the groups like one and half the other."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe

MONEY, SCHOOL, OTHER = ("bank", "money", "lent"), ("school", "books", "science"), ("was", "given", "and", "to", "the")

RECIPE = """
name: groups
task: group-preference
model: {{source: {model}, dtype: float32, device: cpu}}
adapter: {{kind: predictor, width: 64, layers: 2}}
data:
  sources: [{{path: pairs.jsonl, columns: {{prompt: text, chosen: good, rejected: bad}}}}]
  partition: {{kind: natural, by: group}}
  split: {{validation: 0.25, test: 0}}
training: {{steps: 4, batch_size: 24, max_length: 96, lr: 0.005, schedule: linear}}
federation: {{rounds: 40, workers: 1}}
evaluation: {{every: 40}}
"""


class Groups:
    """The folder of the recipe and of its rows: groups g0 and g2 like answers about money, g1 and g3 about school."""

    def __init__(self, base: Path, model: Path) -> None:
        self.base = base
        (base / "recipe.yaml").write_text(RECIPE.format(model=model))
        pairs = drawn(60, 0)
        with (base / "pairs.jsonl").open("w") as rows, (base / "opinions.jsonl").open("w") as opinions:
            for prompt, money, school in pairs:
                for i in range(4):
                    good, bad = (money, school) if i % 2 == 0 else (school, money)
                    row = {"text": prompt, "good": good, "bad": bad, "group": f"g{i}"}
                    rows.write(json.dumps(row) + "\n")
                    votes = {good: 6, bad: 1, **({"the": 3} if len(prompt) % 2 else {})}
                    told = {"text": prompt, "options": list(votes), "votes": list(votes.values()), "group": f"g{i}"}
                    opinions.write(json.dumps(told) + "\n")

    def recipe(self, *changes: str) -> Recipe:
        return load_recipe(self.base / "recipe.yaml", changes)


def drawn(number: int, seed: int) -> list[tuple[str, str, str]]:
    """Prompts, each with an answer about money and one about school."""
    draw = random.Random(seed)

    def answer(words: tuple[str, ...]) -> str:
        return " ".join(draw.sample([draw.choice(words), *draw.choices(OTHER, k=2)], k=3))

    return [(" ".join(draw.choices(OTHER, k=3)), answer(MONEY), answer(SCHOOL)) for _ in range(number)]


OPINIONS = "data.sources=[{path: opinions.jsonl, columns: {question: text, choices: options, shares: votes}}]"
"""The same as distributions over two or three choices, given as counts."""
