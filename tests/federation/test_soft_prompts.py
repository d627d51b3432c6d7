"""Federations of soft prompts through real silos: they learn, engines and a resumed run agree bit for bit, and what a
run leaves can be talked to, exported and compared with its base."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from fedlm.data.federated import load_data
from fedlm.errors import RecipeError
from fedlm.federation.api import about, new_run
from fedlm.federation.coordinator import run
from fedlm.federation.engines.local import LocalEngine
from fedlm.federation.rundir import RunDir
from fedlm.models.adapters import base_only
from fedlm.recipe.schema import Recipe
from tests.algorithms.observed import federate, final
from tests.federation.conftest import Tiny

ADAPTERS = ("{kind: prompt, prompt_text: was given to the}", "{kind: p-tuning, encoder_hidden: 16}", "{kind: prefix}")


def recipe_of(tiny: Tiny, adapter: str, *more: str) -> Recipe:
    return tiny.recipe(
        f"adapter={adapter}", "federation.algorithm={name: fedavg}", "federation.rounds=2", "training.lr=0.1", *more
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_it_learns_and_ends_in_the_same_bits_on_two_engines(tiny: Tiny, adapter: str, tmp_path: Path) -> None:
    from fedlm.inference.generate import Sampling
    from fedlm.inference.session import open_chat

    recipe = recipe_of(tiny, adapter)
    _, directory = federate(recipe, tiny.base, tmp_path / "here")
    losses = [line["validation"]["loss"] for line in directory.rounds()]
    assert losses[2] < losses[0] - 0.05
    there, data = tmp_path / "there", load_data(recipe, tiny.base)
    with (
        closing(new_run(recipe, there, base=tiny.base, **about(data))) as started,
        closing(LocalEngine(recipe, data, there, base=tiny.base)) as engine,
    ):
        assert run(recipe, engine, started).status == "finished"
    here, other = final(directory), final(RunDir.open(there, write=False))
    assert here.keys() == other.keys()
    assert all(torch.equal(here[name], other[name]) for name in here)
    chat, ids = open_chat(str(there)), torch.arange(9, 30)[None]
    with torch.no_grad():
        adapted = chat.model(input_ids=ids).logits[0, -1]
        with base_only(chat.model):
            plain = chat.model(input_ids=ids).logits[0, -1]
    assert (adapted - plain).abs().max() > 0.1
    assert "".join(chat.reply("was given to", Sampling(max_new_tokens=3)))


def test_a_resumed_run_ends_in_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    """With AdamW's moments kept and compressed updates."""
    recipe = recipe_of(tiny, ADAPTERS[0], "training.keep_optimizer=true", "guards=[{name: int8, error_feedback: true}]")
    _, whole = federate(recipe, tiny.base, tmp_path / "whole")
    _, resumed = federate(recipe, tiny.base, tmp_path / "resumed", interrupt=1)
    tensors, again = final(whole), final(resumed)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_the_base_of_a_prompts_run_has_no_prompt(tiny: Tiny) -> None:
    """`fedlm eval --base` and `fedlm compare` load this for it."""
    from fedlm.federation.silo import Workbench
    from fedlm.models.adapters import base_tensors
    from fedlm.training.forward import sequence_nll
    from fedlm.training.objective import sequences_of

    recipe, plain = recipe_of(tiny, ADAPTERS[0]), tiny.recipe("federation.algorithm={name: fedavg}")
    losses = []
    for of in (recipe, plain):
        bench = Workbench(of, load_data(of, tiny.base))
        bench.load()
        bench.put(base_tensors(of))
        losses.append(sequence_nll(bench.model, sequences_of(bench.training_tokens("site0")), 512)[0])
    assert (losses[0] == losses[1]).all()


@pytest.mark.parametrize(
    "changes, reason",
    [
        (["adapter={kind: prompt}", "federation.algorithm={name: flora}"], "'flora' trains lora, not 'prompt'"),
        (["adapter={kind: prompt, rank: 4}"], "rank: has no effect with 'prompt'"),
        (["adapter={kind: prompt, targets: [q_proj]}"], "targets: has no effect with 'prompt'"),
        (["adapter={kind: prefix, encoder: lstm}"], "encoder: has no effect with 'prefix'"),
        (["adapter={kind: p-tuning, encoder_layers: 3}"], "encoder_layers: has no effect with 'mlp'"),
        (["adapter={kind: p-tuning, prompt_text: hello}"], "prompt_text: has no effect with 'p-tuning'"),
        (["adapter={kind: lora, virtual_tokens: 3}"], "virtual_tokens: has no effect with 'lora'"),
    ],
)
def test_what_cannot_be_is_refused(tiny: Tiny, changes: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        tiny.recipe("federation.algorithm={name: fedavg}", *changes)


def test_a_prompt_that_leaves_no_room_for_the_text(tiny: Tiny) -> None:
    from fedlm.errors import TrainingError
    from fedlm.federation.silo import Workbench

    recipe = recipe_of(tiny, "{kind: prompt, virtual_tokens: 200}")
    with pytest.raises(TrainingError, match="256 positions, of which the prompt takes 200"):
        Workbench(recipe, load_data(recipe, tiny.base)).load()
