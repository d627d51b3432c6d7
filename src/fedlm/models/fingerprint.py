"""What a base model and its tokenizer are, in two hashes: equal wherever the same tokens meet the same weights.

Organisations compare them before a run. Files differ where the content does not (shards, order, formatting, the version
of the library that wrote them), so what is hashed is what the files say.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fedlm.files import cache_dir, write_json
from fedlm.models.chat import template_text
from fedlm.models.folders import HELPERS, open_weights, read_config, weight_files
from fedlm.models.load import load_tokenizer, resolve
from fedlm.recipe.schema import ModelSpec

VERSION = 1
"""Of what is hashed and how; part of each hash's memo, not of the hash."""

THREADS = 4
"""Tensors hashed side by side; hashing lets other threads run."""

_NOTES = frozenset(
    [
        "transformers_version",
        "_name_or_path",
        "dtype",
        "torch_dtype",
        "architectures",
        "use_cache",
        "return_dict",
        "id2label",
        "label2id",
        "initializer_range",
    ]
)
"""Entries of config.json that tell who wrote it and how it is run, not what is computed."""


def fingerprint(spec: ModelSpec) -> dict[str, str]:
    """Hex SHA-256 of the base `weights` in the recipe's dtype, with the architecture's numbers, and of the `tokenizer`
    with its chat template.

    Independent of adapter, device, process, and of how the weights are cut into files. Remembered in the cache for as
    long as the model's files stay the same.

    Raises:
        ModelError, PackageError: the model or its tokenizer cannot be had (see `resolve`, `load_tokenizer`).
    """
    folder = resolve(spec)
    template = None if spec.chat_template is None else template_text(spec.chat_template)
    files = {*weight_files(folder), *(f for f in folder.iterdir() if f.suffix in HELPERS)}
    stats = [(file.name, file.stat()) for file in sorted(files)]
    stamp = [VERSION, *([name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats)]
    memo = cache_dir() / "fingerprints" / f"{_sha256([str(folder.resolve()), template])}.json"
    try:
        known = json.loads(memo.read_text())
        if known["stamp"] == stamp:
            return {part: str(known[part]) for part in ("weights", "tokenizer")}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no memo yet, or a damaged one: it is made again
    found = {"weights": weights_hash(folder), "tokenizer": tokenizer_hash(load_tokenizer(spec))}
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, {"stamp": stamp, **found})
    except OSError:
        pass  # a read-only cache costs time, not correctness
    return found


def base_identity(spec: ModelSpec) -> dict[str, str]:
    """Hex SHA-256 of the base `weights`, as `fingerprint` has it, and of the `vocabulary`: the tokenizer without its
    chat template, which may differ between runs that build on one another.

    Raises:
        ModelError, PackageError: as `fingerprint`.
    """
    plain = spec.model_copy(update={"chat_template": None})
    vocabulary = tokenizer_hash(load_tokenizer(plain), template=False)
    return {"weights": fingerprint(plain)["weights"], "vocabulary": vocabulary}


def weights_hash(folder: Path) -> str:
    """SHA-256 over a model folder's tensors (name, dtype, shape, bytes; by name) and its config.json.

    Raises:
        ModelError: the folder's weights or configuration cannot be read.
    """
    lines: dict[str, str] = {}
    for file in weight_files(folder):
        with open_weights(file) as weights, ThreadPoolExecutor(THREADS) as pool:
            names = list(weights.keys())
            # each tensor is a view of the mapped file, so memory stays flat whatever the model's size
            lines.update(
                zip(names, pool.map(lambda name, of=weights: _tensor_line(of.get_tensor(name)), names), strict=True)
            )
    # absent and empty entries mean the same, and which of them are written depends on the library's version
    config = {k: v for k, v in read_config(folder / "config.json").items() if v and k not in _NOTES}
    state = hashlib.sha256(_sha256(config).encode())
    for name in sorted(lines):
        state.update(f"\x1f{name}\x1f{lines[name]}".encode())
    return state.hexdigest()


def _tensor_line(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest}"


def tokenizer_hash(tokenizer: Any, *, template: bool = True) -> str:
    """SHA-256 over all that turns text and messages into token numbers: vocabulary, merges, normalisation, special
    tokens and, where `template`, the chat template."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    what = {
        "model": {k: v for k, v in model.items() if v},
        "added": sorted((t["id"], t["content"], t["special"]) for t in parts["added_tokens"]),
        "rules": [parts.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor")],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id],
        **({"template": tokenizer.chat_template} if template else {}),
    }
    return _sha256(what)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
