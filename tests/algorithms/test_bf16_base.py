"""Deltas beside a base in bf16: fp32 from the server's step to the export, in a run that was interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlm.messages import Tensors
from fedlm.models.adapters import lora_layers
from fedlm.models.deltas import deltas_of, is_delta
from fedlm.models.export import load_adapter, save_merged
from fedlm.models.load import load_base
from fedlm.recipe.schema import AdapterSpec
from tests.algorithms.observed import Weights, distance, federate, final
from tests.federation.conftest import Tiny

ROUNDS = 3


def added(tensors: Tensors, adapter: AdapterSpec, layers: Weights) -> Weights:
    """What these values add to each layer's frozen weight, in fp64."""
    found: Weights = {}
    deltas = deltas_of({name: value.double() for name, value in tensors.items()})
    for layer, like in layers.items():
        found[layer] = torch.zeros_like(like)
        if layer in deltas:
            found[layer] += deltas[layer].dense()
        if f"{layer}.lora_B.weight" in tensors:
            a, b = (tensors[f"{layer}.lora_{part}.weight"].double() for part in "AB")
            found[layer] += adapter.scale(len(a)) * b @ a
    return found


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_deltas_stay_fp32(name: str, tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(
        f"federation.algorithm.name={name}",
        "adapter={rank: 4, alpha: 12.0}",
        "model.dtype=bfloat16",
        "training.lr=0.02",
        "data.partition={kind: iid, silos: 2}",
        f"federation.rounds={ROUNDS}",
    )
    engine, run = federate(recipe, tiny.base, tmp_path / "run", interrupt=1)
    errors = [line["aggregation"]["aggregation_error"] for line in run.rounds() if line["round"] >= 0]
    assert len(errors) == ROUNDS and max(errors) < 1e-5, "also after resuming"

    frozen = dict(load_base(recipe.model).named_parameters())
    for layer, module in lora_layers(engine.bench.model).items():
        weight = module.get_base_layer().weight
        assert weight.dtype is torch.bfloat16 and torch.equal(weight, frozen[f"{layer}.weight"])
    for round_ in range(ROUNDS):
        sent, loaded = engine.tensors[round_], next(iter(engine.loaded[round_].values()))
        assert any(is_delta(n) for n in sent) and {value.dtype for value in sent.values()} == {torch.float32}
        # For bf16 products a delta is rounded once, however many rounds it has grown.
        assert distance(loaded, added(sent, recipe.adapter, loaded)) < 2**-8

    kept, exported = final(run), load_adapter(run.adapter, recipe.adapter)
    assert {value.dtype for value in (kept | exported).values()} == {torch.float32}
    best = run.load_checkpoint().progress.best_round  # type: ignore[union-attr]
    wanted = added(engine.tensors[best], recipe.adapter, loaded)
    assert distance(added(exported, recipe.adapter, loaded), wanted) < 1e-6
    save_merged(tmp_path / "merged", exported, recipe)
    whole = load_file(tmp_path / "merged" / "model.safetensors")
    changed = {layer: whole[f"{layer}.weight"].double() - frozen[f"{layer}.weight"].double() for layer in wanted}
    assert distance(changed, wanted) < 1e-6
