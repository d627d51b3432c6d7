"""Golden trajectories: the toy network's model after every round, as it was when these rules were proven right.

A change of a rule shows here even where its closed forms still hold. Where a change is meant:

    pytest tests/algorithms/test_golden.py --regenerate-golden

and the difference of `golden/*.json` is part of the review.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedlm.recipe.schema import AlgorithmSpec

from .outer_toy import OuterToy

FOLDER = Path(__file__).parent / "golden"
ROUNDS = 8
CASES = {
    "diloco": {"name": "diloco"},
    "streaming": {"name": "streaming-diloco", "fragments": 2, "overlap": 1, "mixing": 0.5},
    "eager": {"name": "eager-diloco"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_trajectory_is_the_golden_one(case: str, request: pytest.FixtureRequest) -> None:
    """Within 2e-5 of values around 1: other processors sum in another order, and Adam's first steps enlarge that."""
    toy = OuterToy(AlgorithmSpec(**CASES[case])).run(ROUNDS)
    found = [{name: value.flatten().tolist() for name, value in model.items()} for model in toy.models]
    file = FOLDER / f"{case}.json"
    if request.config.getoption("--regenerate-golden"):
        FOLDER.mkdir(exist_ok=True)
        rounded = [{name: [round(x, 7) for x in values] for name, values in model.items()} for model in found]
        lines = ",\n".join(json.dumps(model) for model in rounded)
        file.write_text(f'{{"spec": {json.dumps(CASES[case])},\n"models": [\n{lines}\n]}}\n')
    golden = json.loads(file.read_text())
    assert golden["spec"] == CASES[case]
    assert len(golden["models"]) == ROUNDS
    for number, (ours, kept) in enumerate(zip(found, golden["models"], strict=True)):
        assert ours.keys() == kept.keys()
        for name, values in kept.items():
            where = f"round {number}, {name}"
            torch.testing.assert_close(
                torch.tensor(ours[name]), torch.tensor(values), rtol=0, atol=2e-5, msg=lambda m, w=where: f"{w}: {m}"
            )
