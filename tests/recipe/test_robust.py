"""Rules against bad silos in a recipe: what cannot be withstood or kept is refused at load, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlm.errors import RecipeError
from fedlm.recipe.load import load_recipe
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.robust import updates_per_round
from fedlm.recipe.schema import Recipe

from .test_load import GOOD

RULE = "federation.algorithm"
PRODUCT = f"{RULE}.robust_on=product"
UNKNOWN = "data.partition={kind: natural, by: site}"
FEWEST = {"krum": 7, "multi-krum": 7, "median": 5, "trimmed-mean": 5, "bulyan": 11, "rfa": 5, "flame": 5}
"""With two bad ones, by the papers."""


@pytest.fixture
def load(tmp_path: Path):
    def _load(name: str, *changes: str, silos: int = 8) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(GOOD)
        return load_recipe(path, [f"data.partition.silos={silos}", f"{RULE}.name={name}", *changes])

    return _load


def refused(load, *arguments, **options) -> str:
    with pytest.raises(RecipeError) as caught:
        load(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", FEWEST)
def test_silos_among_which_bad_ones_are_withstood_are_the_papers(name: str, load) -> None:
    two = f"{RULE}.byzantine=2"
    assert load(name, two, silos=FEWEST[name]).federation.algorithm.updates_needed() == FEWEST[name]
    few = FEWEST[name] - 1
    said = f"byzantine: '{name}' withstands 2 bad ones among at least {FEWEST[name]}, and a round has {few}"
    assert said in refused(load, name, two, silos=few)
    assert said in refused(load, name, two, f"federation.sample={few}", silos=20)
    assert said in refused(load, name, two, UNKNOWN, f"federation.sample={few}")
    load(name, two, UNKNOWN), load(name, two, UNKNOWN, "federation.sample=0.5")  # the round will say


def test_what_a_round_is_made_of(load) -> None:
    for changes, updates in (
        ([], 8),
        (["federation.sample=5"], 5),
        (["federation.sample=0.6"], 5),
        ([UNKNOWN], None),
        ([UNKNOWN, "federation.sample=5"], 5),
    ):
        assert updates_per_round(load("fedavg", *changes)) == updates


def test_one_bad_silo_is_withstood_where_nothing_is_said(load) -> None:
    assert load("median").federation.algorithm.byzantine == 1
    assert "withstands 1 bad ones among at least 5, and a round has 4" in refused(load, "krum", silos=4)
    assert load("trimmed-mean", f"{RULE}.byzantine=0", silos=1).federation.algorithm.updates_needed() == 1


def test_groups_are_what_a_rule_counts(load) -> None:
    load("krum", f"{RULE}.groups=5")
    said = "byzantine: 'krum' withstands 1 bad ones among at least 5, and there are 4 groups"
    assert said in refused(load, "krum", f"{RULE}.groups=4")
    assert "groups: 9 groups cannot be made of a round's 8 silos" in refused(load, "krum", f"{RULE}.groups=9")
    assert "greater than or equal to 2" in refused(load, "krum", f"{RULE}.groups=1")
    for name in ("flame", "foolsgold", "fltrust", "fedavg"):
        assert f"groups: has no effect with '{name}'" in refused(load, name, f"{RULE}.groups=2", f"{RULE}.root=silo-0")


def test_multi_krum_averages_no_more_than_it_scores(load) -> None:
    load("multi-krum", f"{RULE}.selected=5")
    said = "selected: of 8 with 1 bad ones at most 5 can be averaged"
    assert said in refused(load, "multi-krum", f"{RULE}.selected=6")
    assert "selected: has no effect with 'krum'" in refused(load, "krum", f"{RULE}.selected=3")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (["adapter={kind: ia3}"], "robust_on: 'product' is of LoRA's factors, and adapter.kind is 'ia3'"),
        ([f"{RULE}.groups=5"], "groups: not with `robust_on: product`"),
        (["training.keep_optimizer=true"], "keep_optimizer: not with `robust_on: product`"),
        (["guards=[{name: int8, error_feedback: true}]"], "error_feedback: not with `robust_on: product`"),
        (
            ["federation.downlink={send: changed, guards: [{name: int8}]}"],
            "downlink.guards: not with `robust_on: product`",
        ),
    ],
)
def test_products_cannot_be_kept_by_factors(changes: list[str], wanted: str, load) -> None:
    load("median", PRODUCT, "guards=[{name: int8}]", "federation.downlink={send: changed}", f"{RULE}.recompress=8")
    assert wanted in refused(load, "median", PRODUCT, *changes)
    load("median", *changes)


def test_rules_that_keep_updates_keep_no_products(load) -> None:
    for name in ("centred-clipping", "foolsgold"):
        assert f"robust_on: 'product' not with '{name}': {ALGORITHMS[name].no_product}" in refused(load, name, PRODUCT)
    assert "noise: must be 0 with `robust_on: product`" in refused(load, "flame", PRODUCT)
    load("flame", PRODUCT, f"{RULE}.noise=0")
    assert "robust_on: has no effect with 'fedavg'" in refused(load, "fedavg", PRODUCT)
    assert "recompress: has no effect without `robust_on" in refused(load, "krum", f"{RULE}.recompress=8")


def test_the_trusted_silo_is_named_and_always_there(load) -> None:
    root = f"{RULE}.root=b"
    load("fltrust", root)
    assert "root: name the silo that the coordinator trusts" in refused(load, "fltrust")
    assert "sample: not with 'fltrust': the trusted silo 'b'" in refused(load, "fltrust", root, "federation.sample=4")
    with pytest.raises(RecipeError, match="there is no silo 'b'"):
        _with_silos(load, root)
    assert "root: has no effect with 'krum'" in refused(load, "krum", root)


def _with_silos(load, root: str) -> Recipe:
    recipe = load("fltrust", root)
    found = recipe.model_dump(exclude_unset=True)
    sources = found["data"]["sources"]
    found["data"] = {"silos": [{"name": name, "sources": sources} for name in ("a", "bb")]}
    try:
        return Recipe.model_validate(found)
    except ValueError as error:
        raise RecipeError(str(error)) from None


@pytest.mark.parametrize("name", [n for n, method in ALGORITHMS.items() if "robust_on" in method.options])
def test_no_rule_can_be_masked_as_one_sum(name: str) -> None:
    """Each looks at updates, or at groups' means, one by one."""
    assert not ALGORITHMS[name].linear
    assert ALGORITHMS[name].equal_weights is (name not in ("rfa", "norm-bound"))
