"""A GGUF file becomes a safetensors folder, once.

GGUF is the format of llama.cpp: one file with quantised weights, tokenizer and chat template. Training needs plain
tensors, so the weights are dequantised to fp32 and stored in the recipe's dtype. The model that `transformers` builds
from a GGUF keeps `is_quantized` and refuses `save_pretrained`; so the state is written directly, with a configuration
from which the quantisation is removed, and tied weights once.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import torch

from fedlm.errors import ModelError
from fedlm.files import write_json
from fedlm.models.folders import quiet, reason, write_weights

MAGIC = b"GGUF"


def check_gguf(path: Path) -> None:
    """Refuse a file that is no GGUF, or that ends before the last tensor its header names."""
    from gguf import GGUFReader

    try:
        with path.open("rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise ModelError(f"cannot read the GGUF file: {error.strerror}", where=str(path)) from error
    if magic != MAGIC:
        raise ModelError("this is not a GGUF file (its first bytes are not 'GGUF')", where=str(path))
    try:
        reader = GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except Exception as error:  # the reader raises whatever numpy does on bytes that are not there
        raise corrupt(path, error) from error
    if end > path.stat().st_size:
        raise corrupt(path, None)


def corrupt(path: Path, error: Exception | None) -> ModelError:
    reason = f" ({type(error).__name__})" if error is not None else ""
    return ModelError(
        f"the GGUF file is corrupt or cut short{reason}", where=str(path), fix="copy or download it again"
    )


def convert(path: Path, target: Path, dtype: torch.dtype) -> None:
    """Write `path` as a model folder into the existing, empty folder `target`.

    Raises:
        ModelError: the file is no GGUF, is cut short, or holds an architecture that transformers cannot read.
    """
    check_gguf(path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Alone in a folder, so that nothing lying beside the file (an adapter, a configuration) is picked up with it.
    # transformers draws a progress bar of its own on stderr, which no setting turns off.
    with tempfile.TemporaryDirectory() as alone, quiet(), contextlib.redirect_stderr(io.StringIO()):
        (Path(alone) / "model.gguf").symlink_to(path.resolve())
        source: dict[str, Any] = {"gguf_file": "model.gguf", "trust_remote_code": False, "local_files_only": True}
        try:
            with torch.random.fork_rng(devices=[]):
                model = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, **source)
            tokenizer = AutoTokenizer.from_pretrained(alone, **source)
        except Exception as error:  # any failure in here is about this file's content
            raise ModelError(
                f"transformers cannot read this GGUF file: {reason(error)}",
                where=str(path),
                fix="choose a file of an architecture that transformers reads from GGUF, or the model's own folder",
            ) from error
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    state = model.state_dict()
    if config.get("tie_word_embeddings"):
        for name in model._tied_weights_keys or {}:
            state.pop(name, None)
    write_weights(target / "model.safetensors", state, dtype)
    write_json(target / "config.json", config)
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
