"""What leaves fedlm, read by plain PEFT and plain transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedlm.models.export
from fedlm.errors import ModelError
from fedlm.messages import Tensors
from fedlm.models.adapters import attach, get_tensors, set_tensors
from fedlm.models.export import base_name, load_adapter, save_adapter, save_merged
from fedlm.models.folders import stored_dtypes
from fedlm.models.load import load_base, resolve
from fedlm.recipe.schema import Recipe

from .helpers import recipe, spec, trained

IDS = torch.arange(3, 60).reshape(3, 19)
ADAPTERS = [
    {"kind": "lora"},
    {"kind": "lora", "rank": 3, "alpha": 5.5, "targets": ["q_proj", "model.layers.1.mlp.up_proj"]},
    {"kind": "ia3"},
    {"kind": "full"},
]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def ours(of: Recipe, tensors: Tensors) -> torch.Tensor:
    model = attach(load_base(of.model), of.adapter, of.seed)
    set_tensors(model, tensors, of.adapter)
    return logits(model.eval())


@pytest.mark.parametrize("adapter", ADAPTERS[:3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_peft_gives_the_same_logits(
    tiny_model_dir: Path, tmp_path: Path, adapter: dict[str, object], dtype: str
) -> None:
    of = recipe(tiny_model_dir, adapter, dtype=dtype)
    tensors = trained(of, 0.1)
    save_adapter(tmp_path / "adapter", tensors, of)
    base = AutoModelForCausalLM.from_pretrained(resolve(of.model), dtype=getattr(torch, dtype))
    before = logits(base)
    theirs = logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    assert torch.equal(theirs, ours(of, tensors))
    assert not torch.equal(theirs, before)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_saved_comes_back(tiny_model_dir: Path, tmp_path: Path, adapter: dict[str, object]) -> None:
    of = recipe(tiny_model_dir, adapter)
    tensors = trained(of)
    save_adapter(tmp_path / "adapter", tensors, of)
    back = load_adapter(tmp_path / "adapter", of.adapter)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], t) for n, t in tensors.items())


def test_full_weights_are_saved_as_a_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    of = recipe(tiny_model_dir, {"kind": "full"}, dtype="bfloat16")
    tensors = trained(of)
    save_adapter(tmp_path / "model", tensors, of)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert plain.dtype == torch.float32
    assert torch.equal(logits(plain), ours(of, tensors))


def test_the_config_names_the_source_and_no_path_of_this_machine(tiny_model_dir: Path, tmp_path: Path) -> None:
    of = recipe(tiny_model_dir)
    save_adapter(tmp_path / "adapter", trained(of), of)
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == tiny_model_dir.name
    assert str(tiny_model_dir.parent) not in text
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["inference_mode"]
    hub = spec("hub:owner/name", revision="a" * 40)
    assert base_name(hub) == ("owner/name", "a" * 40)
    assert base_name(spec("pypi:a==1!b.gguf", sha256="0" * 64)) == ("pypi:a==1!b.gguf", None)
    assert base_name(spec("models/tiny")) == ("models/tiny", None)


def test_tensors_of_another_adapter_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    tensors = trained(recipe(tiny_model_dir, {"rank": 4}))
    with pytest.raises(ModelError, match=r"has shape \[4, 64\], the model has \[8, 64\]"):
        save_adapter(tmp_path / "adapter", tensors, recipe(tiny_model_dir))
    assert not (tmp_path / "adapter").exists()


def test_a_corrupt_adapter(tiny_model_dir: Path, tmp_path: Path) -> None:
    of = recipe(tiny_model_dir)
    folder = tmp_path / "adapter"
    save_adapter(folder, trained(of), of)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="corrupt or cut short"):
        load_adapter(folder, of.adapter)
    file.unlink()
    with pytest.raises(ModelError, match="neither adapter_model"):
        load_adapter(folder, of.adapter)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_merged_weights_are_a_plain_model(tiny_model_dir: Path, tmp_path: Path, adapter: dict[str, object]) -> None:
    of = recipe(tiny_model_dir, adapter)
    tensors = trained(of, 0.1)
    assert save_merged(tmp_path / "merged", tensors, of) == 0.0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(plain) - ours(of, tensors)).abs().max() < 1e-5
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert (tmp_path / "merged" / "generation_config.json").is_file()


def test_merging_leaves_the_base_folder_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    before = (tiny_model_dir / "model.safetensors").read_bytes()
    of = recipe(tiny_model_dir)
    save_merged(tmp_path / "merged", trained(of), of)
    assert (tiny_model_dir / "model.safetensors").read_bytes() == before


def test_a_small_change_is_kept_in_fp32_and_its_loss_in_bf16_is_measured(tiny_model_dir: Path, tmp_path: Path) -> None:
    """At |dW|/|W| near 1e-3 rounding to bf16 destroys most of dW; the figure is the one measured by hand."""
    of = recipe(tiny_model_dir, dtype="bfloat16")
    tensors = trained(of, 0.0)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        n: 2e-5 * torch.randn(t.shape, generator=generator) if ".lora_B." in n else t for n, t in tensors.items()
    }
    loss = save_merged(tmp_path / "small", tensors, of, "bfloat16")
    assert stored_dtypes([tmp_path / "small" / "model.safetensors"]) == {"BF16"}
    save_merged(tmp_path / "exact", tensors, of)
    base, exact, small = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).state_dict()
        for f in (resolve(of.model), tmp_path / "exact", tmp_path / "small")
    )
    changed = [n for n in base if not torch.equal(base[n], exact[n])]
    assert changed
    lost = sum((small[n] - exact[n]).double().square().sum() for n in changed)
    moved = sum((exact[n] - base[n]).double().square().sum() for n in changed)
    assert loss == pytest.approx(float((lost / moved) ** 0.5), rel=1e-6)
    assert loss > 0.5


@pytest.mark.parametrize("own", [True, False])
def test_a_whole_model_carries_the_recipes_template(tiny_model_dir: Path, tmp_path: Path, own: bool) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    if not own:
        (base / "chat_template.jinja").unlink()
    (tmp_path / "mine.jinja").write_text("mine")
    template = str(tmp_path / "mine.jinja")
    for name, save, kind in (("merged", save_merged, "lora"), ("full", save_adapter, "full")):
        of = recipe(base, {"kind": kind}, chat_template=template)
        save(tmp_path / name, trained(of), of)
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == "mine"


def test_a_tokenizer_with_several_templates_keeps_them(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "one", "tool_use": "two"}
    tokenizer.save_pretrained(base)
    of = recipe(base)
    save_merged(tmp_path / "merged", trained(of), of)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("save", [save_adapter, save_merged])
def test_an_export_never_overwrites(tiny_model_dir: Path, tmp_path: Path, save: Callable[..., Any]) -> None:
    (tmp_path / "precious").write_text("text")
    of = recipe(tiny_model_dir)
    for taken in (tmp_path, tmp_path / "precious"):
        with pytest.raises(ModelError, match="not empty"):
            save(taken, trained(of), of)
    with pytest.raises(ModelError, match="cannot be written"):
        save(tmp_path / "precious" / "new", trained(of), of)
    assert (tmp_path / "precious").read_text() == "text"
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", trained(of), of)
    assert load_adapter(tmp_path / "empty", of.adapter)


@pytest.mark.parametrize(
    ("save", "kind", "fails"),
    [
        (save_adapter, "lora", "write_atomic"),
        (save_adapter, "full", "write_tensors"),
        (save_merged, "lora", "write_tensors"),
    ],
)
def test_an_export_that_fails_half_way_leaves_nothing(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: Callable[..., Any],
    kind: str,
    fails: str,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    of = recipe(tiny_model_dir, {"kind": kind})
    tensors = trained(of)
    monkeypatch.setattr(fedlm.models.export, fails, full)
    before = set(tmp_path.iterdir())
    with pytest.raises(ModelError, match="No space left on device"):
        save(tmp_path / "out", tensors, of)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_smollm2_in_plain_peft_gives_fedlms_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLM_CACHE")  # the user's cache, so that the model is fetched and converted once
    of = recipe("smollm2-135m-instruct", dtype="bfloat16")
    tensors = trained(of, 0.01)
    save_adapter(tmp_path / "adapter", tensors, of)
    base = AutoModelForCausalLM.from_pretrained(resolve(of.model), dtype=torch.bfloat16)
    theirs = logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    assert torch.equal(theirs, ours(of, tensors))
    model = attach(load_base(of.model), of.adapter, of.seed)
    first = trained(of, 0.0)
    assert all(torch.equal(tensor, first[name]) for name, tensor in get_tensors(model).items())
