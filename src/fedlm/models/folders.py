"""Model folders: what a safe one holds, and how the cache builds one exactly once, whatever crashes.

A *model folder* is config.json, tokenizer files and safetensors weights, as `transformers` writes them. Weights in any
format that can run code when opened (.bin, .pt, .pkl) are refused, as is a config that asks for code from a repository.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedlm.errors import ModelError
from fedlm.files import cache_dir, sha256_file, sync_folder, write_json
from fedlm.messages import Tensors

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")
"""Weight files that may hold pickles or that nothing here reads; never opened."""

HELPERS = (".json", ".model", ".txt", ".jinja")
"""Files beside the weights that a model folder carries: configuration, tokenizer, chat template."""

_FLOATS = {"F64", "F32", "F16", "BF16"}
_HEADER_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def local_path(text: str) -> Path:
    """A path as written, '~' filled in; '~name' of a user that does not exist stays, a path that is not there."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  (Path.expanduser raises for such a user)


def models_cache() -> Path:
    """Where converted models lie: one folder per content and dtype."""
    return cache_dir() / "models"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, in shard order.

    Raises:
        ModelError: there are none (only unsafe formats, or nothing), the index is malformed, or a shard that it names
            is missing.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no model folder '{folder}'", fix="give an existing folder or .gguf file")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_config(index).get("weight_map", {})
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ModelError(
                "`weight_map` must map each weight's name to the name of its file",
                where=str(index),
                fix="copy or download the model again",
            )
        files = [folder / Path(shard).name for shard in sorted(set(shards.values()))]
        missing = [f.name for f in files if not f.is_file()]
        if missing or not files:
            raise ModelError(
                f"weight files are missing: {', '.join(missing) or 'the index names none'}", where=str(folder)
            )
        return files
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    unsafe = sorted(f.name for f in folder.iterdir() if f.suffix in UNSAFE)
    if unsafe:
        raise ModelError(
            f"the weights are only there as {', '.join(unsafe[:3])}, a format that can run code when it is opened",
            where=str(folder),
            fix="save the model as safetensors and point to that folder",
        )
    raise ModelError(
        "this folder holds no model.safetensors",
        where=str(folder),
        fix="point to a folder with config.json, tokenizer files and model.safetensors",
    )


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object; ModelError when it is missing or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read ({type(error).__name__})", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} must be a JSON object", where=str(path))
    return value


def check_folder(folder: Path, *, where: str) -> list[Path]:
    """Refuse a folder that is incomplete, unsafe, corrupt, or wants code of its own; return its weight files."""
    files = weight_files(folder)
    if not (folder / "config.json").is_file():
        raise ModelError("the model folder has no config.json", where=where)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file() and "auto_map" in read_config(folder / name):
            raise ModelError(
                f"its {name} has 'auto_map', so it wants to run Python code from its own repository, which fedlm "
                "never does",
                where=where,
                fix="choose a model whose architecture transformers has built in",
            )
    for file in files:
        with open_weights(file):
            pass
    return files


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """`safetensors.safe_open`, memory-mapped on the CPU; a truncated or corrupt file is a ModelError."""
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"the weights file is corrupt or cut short ({error})",
            where=str(file),
            fix="copy or download the model again; if it lies in fedlm's cache, delete its folder",
        ) from error
    with handle as weights:
        yield weights


def stored_dtypes(files: list[Path]) -> set[str]:
    """safetensors' names of the floating dtypes in these files, e.g. {"BF16"}; reads headers only."""
    found = set()
    for file in files:
        with open_weights(file) as weights:
            found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    return found & _FLOATS


def has_dtype(files: list[Path], dtype: torch.dtype) -> bool:
    return stored_dtypes(files) <= {_HEADER_NAMES[dtype]}


def cast(folder: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy a model folder with its floating weights in another dtype, one tensor at a time per file."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in HELPERS and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
    for file in weight_files(folder):
        with open_weights(file) as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
            write_weights(target / file.name, tensors, dtype)
    config = read_config(folder / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(target / "config.json", config)


def write_weights(path: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    """Save tensors as a model's weights, floats in `dtype`, with the metadata that transformers asks for."""
    cast_tensors = {n: (t.to(dtype) if t.is_floating_point() else t).contiguous() for n, t in tensors.items()}
    try:
        save_file(cast_tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the only thing left to fail here is the disk
        raise OSError(str(error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers' progress bars and log are off inside: they break the display of a run, and errors are sentences."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def reason(error: Exception) -> str:
    """What a library says is wrong, as the end of a sentence: its first line, and the second where that says what."""
    first, second, *_ = [*(line.strip() for line in str(error).strip().splitlines()), "", ""]
    return (f"{first} {second}" if first.endswith(":") else first).rstrip(" :,") or type(error).__name__


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`; at the end it is flushed and takes the name, after an error nothing is left.

    So `target`, which must not exist or be empty, is complete whenever it holds anything.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o755)
        temporary.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def build_once(target: Path, build: Callable[[Path], None], *, what: str) -> Path:
    """Build a cache folder exactly once, whatever runs side by side or is killed half-way.

    `build` fills a temporary folder, which is flushed and renamed; others wait on a lock. So `target` is complete
    whenever it exists.

    Raises:
        ModelError: the cache cannot be written (read-only, disk full).
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.is_dir():
                return target
            for stale in target.parent.glob(f".{target.name}.*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
            with new_folder(target) as temporary:
                build(temporary)
    except OSError as error:
        raise ModelError(
            f"cannot write {what}: {error.strerror or error}",
            where=str(target.parent),
            fix="free some space or set FEDLM_CACHE to a folder that can be written",
        ) from error
    return target


def _flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_dir():
            file.chmod(0o755)
            sync_folder(file)
            continue
        file.chmod(0o644)  # cache and exports may be shared between users; safetensors writes 0600
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    sync_folder(folder)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, remembered in the cache for as long as its size, times and inode stay the same."""
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    memo = cache_dir() / "hashes" / f"{name}.json"
    try:
        known = json.loads(memo.read_text())
        if known["stamp"] == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = sha256_file(path)
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, {"stamp": stamp, "sha256": digest})
    except OSError:
        pass  # a read-only cache costs time, not correctness
    return digest


def folder_hash(folder: Path) -> str:
    """One SHA-256 for everything in a model folder that fedlm reads."""
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and f.suffix in (*HELPERS, ".safetensors")]
    lines = "".join(f"{f.name} {file_hash(f)}\n" for f in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def check_hash(path: Path, expected: str | None) -> None:
    """ModelError when a pinned file has another SHA-256."""
    if expected is None:
        return
    found = file_hash(path)
    if found != expected:
        raise ModelError(
            f"the file's SHA-256 is {found}, but {expected} was asked for",
            where=str(path),
            fix="get the right file, or correct `sha256` if you trust this one",
        )
