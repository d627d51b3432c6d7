"""Adapters: names, first values, and what they compute at the start, against plain transformers and PEFT."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MptConfig, MptForCausalLM

from fedlm.errors import ModelError
from fedlm.models.adapters import attach, base_only, get_tensors, initial_tensors, set_tensors, trainable
from fedlm.models.load import load_base
from fedlm.recipe.schema import AdapterSpec

from .helpers import recipe, spec, trained

KINDS = ["lora", "ia3", "full"]
IDS = torch.arange(3, 60).reshape(3, 19)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_the_logits_are_the_base_models(tiny_model_dir: Path, kind: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, attn_implementation="sdpa")
    model = attach(load_base(spec(tiny_model_dir)), AdapterSpec(kind=kind), 0)
    assert torch.equal(logits(model), logits(plain.eval()))


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_an_adapter_is_fp32_over_a_bf16_base_and_can_be_switched_off(tiny_model_dir: Path, kind: str) -> None:
    of = recipe(tiny_model_dir, {"kind": kind}, dtype="bfloat16")
    plain = logits(load_base(of.model))
    model = attach(load_base(of.model), of.adapter, 0)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    set_tensors(model, trained(of, 0.5), of.adapter)
    assert not torch.equal(logits(model), plain)
    with base_only(model):
        assert torch.equal(logits(model), plain)


def test_full_weights_are_private_fp32_with_ties_kept(tiny_model_dir: Path) -> None:
    of = recipe(tiny_model_dir, {"kind": "full"}, dtype="bfloat16")
    model = attach(load_base(of.model), of.adapter, 0)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in get_tensors(model), "tied weights are exchanged once"
    before = logits(load_base(of.model))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(1.0)
    assert torch.equal(logits(load_base(of.model)), before), "training must not write to the mapped file"
    with pytest.raises(ModelError, match="no adapter to switch off"), base_only(model):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_first_tensors_need_no_weights_and_equal_the_attached_ones(tiny_model_dir: Path, kind: str) -> None:
    of = recipe(tiny_model_dir, {"kind": kind}, seed=7)
    first = initial_tensors(of)
    attached = get_tensors(attach(load_base(of.model), of.adapter, of.seed))
    assert list(first) == list(attached)
    assert all(torch.equal(first[n], attached[n]) and first[n].dtype == torch.float32 for n in first)


@pytest.mark.slow
def test_first_values_do_not_depend_on_process_or_generator_state(tiny_model_dir: Path) -> None:
    code = (
        "import torch, hashlib; torch.manual_seed(99)\n"
        "from tests.models.helpers import recipe\n"
        "from fedlm.models.adapters import initial_tensors\n"
        f"t = initial_tensors(recipe({str(tiny_model_dir)!r}, seed=3))\n"
        "print(hashlib.sha256(b''.join(v.numpy().tobytes() for v in t.values())).hexdigest())"
    )
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    attach(load_base(spec(tiny_model_dir)), AdapterSpec(), 3)
    assert torch.equal(torch.get_rng_state(), state), "attaching must not move the global generator"


def test_seeds_differ_and_a_is_uniform_within_its_bound(tiny_model_dir: Path) -> None:
    one, two = (initial_tensors(recipe(tiny_model_dir, seed=s)) for s in (0, 1))
    for name, value in one.items():
        if ".lora_A." in name:
            bound = value.shape[1] ** -0.5
            assert not torch.equal(value, two[name])
            assert value.abs().max() <= bound
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        else:
            assert not value.any()


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_names_are_pefts_saved_names_and_go_back_through_peft(tiny_model_dir: Path, kind: str) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    of = recipe(tiny_model_dir, {"kind": kind})
    model = attach(load_base(of.model), of.adapter, 0)
    saved = get_peft_model_state_dict(model)
    assert {"base_model.model." + n for n in get_tensors(model)} == set(saved)
    tensors = trained(of)
    report = set_peft_model_state_dict(model, {"base_model.model." + n: t for n, t in tensors.items()})
    assert not report.unexpected_keys
    assert all(torch.equal(tensors[n], t) for n, t in get_tensors(model).items())


def test_tensors_are_copies_and_setting_is_strict(tiny_model_dir: Path) -> None:
    model = attach(load_base(spec(tiny_model_dir)), AdapterSpec(), 0)
    tensors = get_tensors(model)
    name = next(iter(tensors))
    tensors[name].zero_()
    assert trainable(model)[name].any()
    for bad, words in (
        ({k: v for k, v in tensors.items() if k != name}, "1 missing"),
        (tensors | {"other": torch.zeros(1)}, "1 unknown, e.g. other"),
        (tensors | {name: torch.zeros(1)}, r"has shape \[1\]"),
    ):
        with pytest.raises(ModelError, match=words):
            set_tensors(model, bad, AdapterSpec())
    assert trainable(model)[name].any(), "a refused set writes nothing"


def test_a_target_that_matches_nothing_lists_what_exists(tiny_model_dir: Path) -> None:
    for kind in ("lora", "ia3"):
        with pytest.raises(
            ModelError, match=r"'query'.*down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v"
        ):
            attach(load_base(spec(tiny_model_dir)), AdapterSpec(kind=kind, targets=["q_proj", "query"]), 0)


def test_a_target_tied_to_the_embeddings_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match="shares its weight"):
        attach(load_base(spec(tiny_model_dir)), AdapterSpec(targets=["lm_head"]), 0)


def test_targets_may_be_full_names(tiny_model_dir: Path) -> None:
    adapter = AdapterSpec(targets=["model.layers.1.self_attn.q_proj"])
    model = attach(load_base(spec(tiny_model_dir)), adapter, 0)
    assert {n.rsplit(".", 2)[0] for n in trainable(model)} == {"model.layers.1.self_attn.q_proj"}


def test_all_linear_is_every_linear_layer_but_the_output(tiny_model_dir: Path) -> None:
    model = attach(load_base(spec(tiny_model_dir)), AdapterSpec(rank=2), 0)
    assert len(trainable(model)) == 2 * 2 * 7  # A and B, 2 layers, 7 matrices
    assert not any("lm_head" in n for n in trainable(model))


def test_ia3_scales_keys_values_and_the_input_of_the_last_feed_forward_layer(tiny_model_dir: Path) -> None:
    model = attach(load_base(spec(tiny_model_dir)), AdapterSpec(kind="ia3"), 0)
    shapes = {n.split(".")[-2]: tuple(p.shape) for n, p in trainable(model).items()}
    assert shapes == {"k_proj": (32, 1), "v_proj": (32, 1), "down_proj": (1, 128)}


def test_ia3_asks_for_targets_where_the_architecture_is_unknown() -> None:
    model = MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=64))
    with pytest.raises(ModelError, match=r"architecture 'mpt'.*Wqkv, down_proj"):
        attach(model, AdapterSpec(kind="ia3"), 0)
    adapted = attach(model, AdapterSpec(kind="ia3", targets=["Wqkv", "down_proj"]), 0)
    assert {tuple(p.shape) for p in trainable(adapted).values()} == {(96, 1), (1, 128)}


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_gpt2s_transposed_layers_take_adapters(kind: str) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)).eval()
    model.requires_grad_(False)
    plain = logits(model)
    adapted = attach(model, AdapterSpec(kind=kind), 0)
    assert torch.equal(logits(adapted), plain)
    assert trainable(adapted)
