"""Fingerprints of models: of the content alone, whoever wrote the files; any change that matters shows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedlm.models.fingerprint
from fedlm.models.fingerprint import fingerprint
from tests.models.helpers import spec

WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))


def rewrite(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}, indent=7))


def test_another_folder_other_files_same_content(tiny_model_dir: Path, copy: Path) -> None:
    """Two shards instead of one file, another writer's notes and defaults in config.json, merges written otherwise."""
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, copy / file, metadata={"format": "pt"})
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    rewrite(copy, transformers_version="5.0.0", _name_or_path="elsewhere", some_new_default=None)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [" ".join(m) for m in tokenizer["model"]["merges"]]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert fingerprint(spec(copy)) == fingerprint(spec(tiny_model_dir))


def test_one_changed_number_shows(copy: Path) -> None:
    before = fingerprint(spec(copy))
    tensors = load_file(copy / "model.safetensors")
    tensors[WEIGHT][3, 4] += 1e-6
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    after = fingerprint(spec(copy))
    assert after["weights"] != before["weights"] and after["tokenizer"] == before["tokenizer"]


def test_the_architectures_numbers_count(copy: Path) -> None:
    """The same weights under another epsilon are another model."""
    before = fingerprint(spec(copy))
    rewrite(copy, rms_norm_eps=1e-3)
    assert fingerprint(spec(copy))["weights"] != before["weights"]


def test_the_tokenizers_parts_count(copy: Path) -> None:
    seen = [fingerprint(spec(copy))]
    file = copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    merges = tokenizer["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    file.write_text(json.dumps(tokenizer))
    seen.append(fingerprint(spec(copy)))
    seen.append(fingerprint(spec(copy, chat_template="chatml")))
    (copy / "my.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    seen.append(fingerprint(spec(copy, chat_template=str(copy / "my.jinja"))))
    (copy / "my.jinja").write_text("{% for m in messages %}{{ m['content'] }}.{% endfor %}")
    seen.append(fingerprint(spec(copy, chat_template=str(copy / "my.jinja"))))
    assert len({f["tokenizer"] for f in seen}) == 5 and len({f["weights"] for f in seen}) == 1


def test_storage_types_are_different_bases(tiny_model_dir: Path) -> None:
    single, half = (fingerprint(spec(tiny_model_dir, dtype=d)) for d in ("float32", "bfloat16"))
    assert single["weights"] != half["weights"] and single["tokenizer"] == half["tokenizer"]


def test_remembered_until_a_file_changes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(spec(copy))
    with monkeypatch.context() as patch:
        patch.setattr(fedlm.models.fingerprint, "weights_hash", lambda _: pytest.fail("hashed again"))
        assert fingerprint(spec(copy)) == first
    tensors = load_file(copy / "model.safetensors")
    tensors[WEIGHT] = torch.zeros_like(tensors[WEIGHT])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(spec(copy)) != first


def test_a_damaged_memo_is_made_again(copy: Path, own_cache: Path) -> None:
    first = fingerprint(spec(copy))
    (memo,) = (own_cache / "fingerprints").iterdir()
    memo.write_text('{"stamp": [')
    assert fingerprint(spec(copy)) == first


def test_the_same_in_another_process(tiny_model_dir: Path) -> None:
    code = (
        "from fedlm.models.fingerprint import fingerprint; from fedlm.recipe.schema import ModelSpec; import sys;"
        "print(*fingerprint(ModelSpec(source=sys.argv[1], dtype='float32')).values())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tiny_model_dir)],
        capture_output=True,
        text=True,
        check=True,
        env={"FEDLM_CACHE": str(tiny_model_dir.parent / "cache-of-another"), "PYTHONHASHSEED": "7", "PATH": ""},
    )
    assert run.stdout.split() == list(fingerprint(spec(tiny_model_dir)).values())
