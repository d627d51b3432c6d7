"""Soft prompts against PEFT's own models: logits, loss and gradients, saved folders, generation; and first values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedlm.errors import ModelError
from fedlm.models.adapters import attach, base_only, base_tensors, get_tensors, initial_tensors, set_tensors
from fedlm.models.export import load_adapter, save_adapter, save_merged
from fedlm.models.load import load_base
from fedlm.models.soft_prompts import peft_prompt_config
from fedlm.recipe.schema import AdapterSpec, Recipe, TrainingSpec
from fedlm.training.attention import packed
from fedlm.training.forward import batch_nll, padded_nll, sequence_nll, target_nll
from fedlm.training.packing import pack
from fedlm.training.prefixes import prefix_of, with_prompt
from fedlm.training.sequences import Encoded
from tests.training.helpers import sequence

from .helpers import recipe, trained

KINDS: list[dict[str, Any]] = [
    {"kind": "prompt"},
    {"kind": "p-tuning", "encoder_hidden": 24},
    {"kind": "p-tuning", "encoder": "lstm", "encoder_hidden": 16},
    {"kind": "prefix"},
]
N = 9
names = pytest.mark.parametrize("adapter", KINDS, ids=lambda a: a.get("encoder", a["kind"]))


@pytest.fixture(scope="module")
def sequences() -> list[Encoded]:
    """Two that begin alike, a short one, and one without company."""
    return [sequence((1, 12), (2, 9)), sequence((1, 12), (3, 5)), sequence((4, 6)), sequence((5, 20), answer=7)]


def ours(of: Recipe, scale: float = 0.3) -> Any:
    model = attach(load_base(of.model), of.adapter, of.seed)
    set_tensors(model, trained(of, scale), of.adapter)
    return model


def pefts(of: Recipe, model: Any) -> Any:
    """PEFT's model with the same parameters."""
    from peft import get_peft_model

    theirs = get_peft_model(load_base(of.model), peft_prompt_config(model))
    tensors = joined(get_tensors(model))
    state = {f"prompt_encoder.default.{n.removeprefix('prompt_encoder.')}": t for n, t in tensors.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("prompt_encoder")]
    return theirs


def joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layers of a prefix side by side, as PEFT has them."""
    layers = [tensor for name, tensor in tensors.items() if ".layers." in name]
    return {"prompt_encoder.embedding.weight": torch.cat(layers, 1)} if layers else tensors


def pefts_nll(theirs: Any, item: Encoded) -> torch.Tensor:
    """Losses of the targets by PEFT's forward, on the sequence by itself."""
    ids = torch.from_numpy(item.ids.astype(np.int64))[None]
    logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(item) :]
    where = np.flatnonzero(item.loss)
    return cross_entropy(logits[where - 1].float(), ids[0, where], reduction="none")


@names
@pytest.mark.parametrize("share", [True, False])
def test_packed_losses_and_gradients_are_pefts(
    tiny_model_dir: Path, adapter: dict[str, Any], share: bool, sequences: list[Encoded]
) -> None:
    of = recipe(tiny_model_dir, adapter | {"virtual_tokens": N})
    model = ours(of)
    theirs = pefts(of, model)
    expected = torch.cat([pefts_nll(theirs, s) for s in sequences])
    expected.mean().backward()
    with packed(model):
        batch = pack(with_prompt(model, sequences), share=share)
        found = target_nll(model, batch)
    found.mean().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    theirs_by_name = {n.replace("prompt_encoder.default.", "prompt_encoder."): p for n, p in theirs.named_parameters()}
    gradients = joined({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs_by_name[name].grad, atol=1e-5, rtol=1e-4)


@names
def test_a_padded_batch_is_the_packed_one(
    tiny_model_dir: Path, adapter: dict[str, Any], sequences: list[Encoded]
) -> None:
    model = ours(recipe(tiny_model_dir, adapter | {"virtual_tokens": N}))
    with torch.no_grad():
        losses = [batch_nll_of(model, sequences, packing) for packing in (True, False)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    sums = [sequence_nll(model, sequences, 64, packing=packing)[0] for packing in (True, False)]
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-4)


def batch_nll_of(model: Any, sequences: list[Encoded], packing: bool) -> torch.Tensor:
    if not packing:
        return padded_nll(model, sequences)
    with packed(model):
        return batch_nll(model, sequences, TrainingSpec(steps=1))


def test_the_prompt_is_computed_once_for_all_sequences(tiny_model_dir: Path, sequences: list[Encoded]) -> None:
    model = ours(recipe(tiny_model_dir, {"kind": "prompt", "virtual_tokens": N}))
    assert pack(with_prompt(model, sequences)).ids.shape[1] == pack(sequences).ids.shape[1] + N
    one_each = pack(with_prompt(model, sequences), share=False)
    assert one_each.ids.shape[1] == pack(sequences, share=False).ids.shape[1] + len(sequences) * N


def test_an_examples_gradient_is_its_own(tiny_model_dir: Path, sequences: list[Encoded]) -> None:
    """Not shared, every sequence has rows of its own, so that the sum's gradient is that of its parts."""
    model = ours(recipe(tiny_model_dir, {"kind": "prompt", "virtual_tokens": N}))
    found = []
    for chosen in [sequences, *([s] for s in sequences)]:
        model.zero_grad()
        with packed(model):
            target_nll(model, pack(with_prompt(model, chosen), share=False)).sum().backward()
        found.append(model.prompt_encoder.embedding.weight.grad.clone())
    torch.testing.assert_close(found[0], sum(found[1:]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[1], found[2])


@names
def test_cached_generation_is_pefts(tiny_model_dir: Path, adapter: dict[str, Any]) -> None:
    """Two prompts, padded on the left, token by token on the cache, as evaluation and chat write."""
    of = recipe(tiny_model_dir, adapter | {"virtual_tokens": N})
    model = ours(of).eval()
    theirs = pefts(of, model).eval()
    prompts = [list(range(30, 42)), list(range(50, 57))]
    ids = torch.tensor([prompts[0], [2] * 5 + prompts[1]])
    mask = (torch.arange(12) >= torch.tensor([[0], [5]])).long()
    steps: list[torch.Tensor] = []
    past, position, token, seen = None, (mask.cumsum(1) - 1).clamp(min=0), ids, mask
    with torch.no_grad():
        for _ in range(4):
            out = model(
                input_ids=token, attention_mask=seen, position_ids=position, past_key_values=past, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            past = out.past_key_values
            steps.append(out.logits[:, -1])
            token = out.logits[:, -1:].argmax(-1)
            seen, position = torch.cat([seen, torch.ones_like(token)], 1), position[:, -1:] + 1
        for row, prompt in enumerate(prompts):
            text = prompt
            for logits in steps:
                wanted = theirs(input_ids=torch.tensor([text])).logits[0, -1]
                torch.testing.assert_close(logits[row], wanted, atol=1e-4, rtol=1e-4)
                text = [*text, int(wanted.argmax())]


@pytest.mark.parametrize("adapter", [*KINDS, {"kind": "prompt-projection", "intrinsic_dim": 40}], ids=str)
def test_an_exported_folder_is_pefts_and_returns(tiny_model_dir: Path, adapter: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    of = recipe(tiny_model_dir, adapter | {"virtual_tokens": N})
    tensors = trained(of, 0.3)
    save_adapter(tmp_path / "adapter", tensors, of)
    model = attach(load_base(of.model), of.adapter, of.seed)
    set_tensors(model, load_adapter(tmp_path / "adapter", of.adapter), of.adapter)
    assert all(torch.equal(t, tensors[n]) for n, t in get_tensors(model).items())
    theirs = PeftModel.from_pretrained(load_base(of.model), tmp_path / "adapter")
    ids = torch.arange(3, 60).reshape(3, 19)
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -19:]
        found = model(input_ids=ids).logits[:, -19:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="cannot be merged"):
        save_merged(tmp_path / "merged", tensors, of)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "prompt-projection"])
def test_a_prompt_begins_as_ordinary_words(tiny_model_dir: Path, kind: str) -> None:
    """The model with a fresh prompt gives the logits that the base gives after the same words."""
    from fedlm.models.load import load_tokenizer

    of = recipe(tiny_model_dir, {"kind": kind, "virtual_tokens": N, "prompt_text": "the patient was given"})
    model, ids = attach(load_base(of.model), of.adapter, 0), torch.arange(20, 50)[None]
    words = load_tokenizer(of.model)("the patient was given")["input_ids"]
    words = (words * N)[:N]
    with torch.no_grad():
        found = model(input_ids=ids).logits[0, -30:]
        wanted = load_base(of.model)(input_ids=torch.cat([torch.tensor([words]), ids], 1)).logits[0, -30:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", [*KINDS, {"kind": "prompt-projection"}], ids=str)
def test_first_values_are_keyed_and_the_base_is_behind_a_switch(tiny_model_dir: Path, adapter: dict[str, Any]) -> None:
    of, other = (recipe(tiny_model_dir, adapter, seed=s, dtype="bfloat16") for s in (3, 4))
    first, again, different = initial_tensors(of), initial_tensors(of), initial_tensors(other)
    assert all(torch.equal(first[n], again[n]) and first[n].dtype is torch.float32 for n in first)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = load_base(of.model)(input_ids=ids).logits
        model, moved = (attach(load_base(o.model), o.adapter, o.seed) for o in (of, other))
        assert not torch.equal(model(input_ids=ids).logits, moved(input_ids=ids).logits)
        assert adapter["kind"] == "prompt-projection" or any(not torch.equal(first[n], different[n]) for n in first)
        with base_only(model):
            assert torch.equal(model(input_ids=ids).logits, plain)
        set_tensors(model, base_tensors(of) | first, of.adapter)
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert prefix_of(model, pack([sequence((1, 9))])) is None
        set_tensors(model, first, of.adapter)
        assert not torch.equal(model(input_ids=ids).logits[:, -37:], plain)


def test_what_a_projected_prompt_can_be(tiny_model_dir: Path) -> None:
    """z ~ N(0, I) gives rows whose entries deviate as word embeddings do; z = 0 the first words."""
    model = attach(load_base(recipe(tiny_model_dir).model), AdapterSpec(kind="prompt-projection", intrinsic_dim=200), 0)
    weight = model.get_input_embeddings().weight
    encoder = model.prompt_encoder
    assert torch.equal(model.rows(), encoder.p0)
    with torch.no_grad():
        encoder.z.copy_(torch.randn(200, generator=torch.Generator().manual_seed(0)))
        moved = (model.rows() - encoder.p0).std()
    assert float(moved) == pytest.approx(float(weight.square().mean().sqrt()), rel=0.15)


def test_too_many_virtual_tokens_are_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match="256 virtual tokens leave no room in the model's 256 positions"):
        attach(load_base(recipe(tiny_model_dir).model), AdapterSpec(kind="prompt", virtual_tokens=256), 0)
