"""What a recipe may say of an asynchronous federation, and what is refused at load with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlm.errors import RecipeError
from fedlm.recipe.load import dump_recipe, load_recipe

from .test_load import GOOD

NAME, SPEEDS = "federation.algorithm.name", "federation.speeds"
REFUSED = [
    (
        ["federation.concurrency=2"],
        "concurrency: has no effect with 'fedavg' (it belongs to delayed-nesterov, fedasync, fedbuff)",
    ),
    ([f"{SPEEDS}.sigma=2.0"], "speeds: has no effect with 'fedavg'"),
    (
        ["federation.algorithm.buffer=4"],
        "buffer: has no effect with 'fedavg' (it belongs to delayed-nesterov, fedbuff)",
    ),
    ([f"{NAME}=fedasync", "federation.algorithm.buffer=4"], "buffer: has no effect with 'fedasync'"),
    ([f"{NAME}=fedbuff", "federation.algorithm.mu=0.1"], "mu: has no effect with 'fedbuff'"),
    ([f"{NAME}=fedbuff", "federation.sample=2"], "sample: has no effect with 'fedbuff': say in `concurrency`"),
    ([f"{NAME}=fedbuff", "federation.oversample=0.5"], "oversample: has no effect"),
    ([f"{NAME}=fedasync", "training.keep_optimizer=true"], "keep_optimizer: not with 'fedasync'"),
    ([f"{NAME}=fedasync", "federation.algorithm.server_lr=1.5"], "server_lr: alpha mixes two models"),
    ([f"{NAME}=fedasync", "federation.algorithm.weights=tokens"], "fedasync counts every silo the same"),
    (
        [f"{NAME}=fedbuff", "federation.algorithm.staleness=constant", "federation.algorithm.staleness_a=1.0"],
        "staleness_a: has no effect with `staleness: constant`",
    ),
    (
        [f"{NAME}=fedbuff", "federation.algorithm.staleness_b=2"],
        "staleness_b: has no effect without `staleness: hinge`",
    ),
    ([f"{NAME}=fedbuff", "federation.algorithm.max_staleness=-1"], "max_staleness"),
    ([f"{NAME}=fedbuff", "federation.concurrency=5"], "concurrency: 5 silos cannot work at once where there are 4"),
    (
        [f"{NAME}=fedasync", "federation.algorithm.max_staleness=2"],
        "max_staleness: with 4 silos at work at once and a server step for every update, even equally fast ones are "
        "3 steps late, and 2 are allowed",
    ),
    ([f"{NAME}=fedbuff", f"{SPEEDS}.kind=pareto", f"{SPEEDS}.sigma=2.0"], "sigma: has no effect with 'pareto'"),
    ([f"{NAME}=fedbuff", f"{SPEEDS}.shape=2.0"], "shape: has no effect with 'lognormal'"),
    ([f"{NAME}=fedbuff", f"{SPEEDS}.log=x.jsonl"], "log: has no effect with 'lognormal' (it belongs to recorded)"),
    ([f"{NAME}=fedbuff", f"{SPEEDS}.kind=recorded"], "log: name the rounds.jsonl"),
    (
        [f"{NAME}=fedbuff", f"{SPEEDS}={{kind: recorded, log: x, silos: {{a: 1.0}}}}"],
        "silos: has no effect with 'recorded'",
    ),
    ([f"{NAME}=fedbuff", f"{SPEEDS}.silos={{a: 0.0}}"], "greater than 0"),
    (
        [f"{NAME}=fedbuff", "data={at_silos: true}", f"{SPEEDS}.seconds=2.0"],
        "speeds: has no effect over a network",
    ),
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=[changes[-1] for changes, _ in REFUSED])
def test_refused_with_its_reason(recipe: Path, changes: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, changes)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        [f"{NAME}=fedasync", "federation.algorithm.mu=0.1", "federation.algorithm.server_lr=1.0"],
        [f"{NAME}=fedasync", "federation.algorithm.max_staleness=3"],  # 3 of the other silos
        [f"{NAME}=fedasync", "federation.algorithm.max_staleness=0", "federation.concurrency=1"],
        [f"{NAME}=fedbuff", "federation.algorithm.buffer=4", "federation.algorithm.max_staleness=0"],
        [f"{NAME}=fedbuff", "federation.algorithm.weights=tokens", "federation.algorithm.staleness=hinge"],
        [f"{NAME}=fedbuff", f"{SPEEDS}={{kind: pareto, shape: 1.1, silos: {{silo-1: 40.0}}}}"],
        [f"{NAME}=fedbuff", f"{SPEEDS}={{kind: recorded, log: runs/a/rounds.jsonl}}"],
    ],
)
def test_allowed_and_written_out_whole(recipe: Path, tmp_path: Path, changes: list[str]) -> None:
    loaded = load_recipe(recipe, changes)
    (tmp_path / "again.yaml").write_text(dump_recipe(loaded))
    assert load_recipe(tmp_path / "again.yaml") == loaded
