"""A model of a million parameters, trained on real text in a minute or two: for benches that train hundreds of copies.

Four layers of width 128 (`preset:llama-1m`), a byte-level BPE of 2,048 tokens of the same texts, next-token prediction
by AdamW in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fedlm.models.chat import CHATML
from fedlm.models.presets import config_of
from fedlm.randomness import torch_generator
from fedlm.recipe.presets import PRESETS

VOCABULARY, LENGTH, BATCH, RATE, STEPS = 2048, 64, 16, 3e-3, 300
TOPIC, EARLY = "sports", 1 / 3
"""Of articles, those that `news_model` is trained on."""


def news_model(folder: Path, articles: Sequence[dict[str, str]], *, quick: bool) -> tuple[list[str], list[str]]:
    """Trains the model on a third of the articles on `TOPIC` and of the others, where it is not in this folder yet.

    Returns:
        The texts that are left: on the topic, and others.
    """
    pools = [[a["text"] for a in articles if (a["topic"] == TOPIC) == on] for on in (True, False)]
    early = [pool[: round(EARLY * len(pool))] for pool in pools]
    if not (folder / "tokenizer.json").exists():
        loss = small_model(folder, [*early[0], *early[1]], 5 if quick else STEPS)
        print(f"the model's loss on its own text: {loss:.2f} nats", flush=True)
    return pools[0][len(early[0]) :], pools[1][len(early[1]) :]


def small_model(folder: Path, texts: Sequence[str], steps: int) -> float:
    """Writes model and tokenizer, with ChatML as its template, into this folder.

    Returns:
        The mean loss (nats per token) of the last tenth of the steps.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    stream = torch.tensor([token for text in texts for token in [0, *tokenizer.encode(text)]])

    torch.manual_seed(0)
    model = LlamaForCausalLM(config_of(PRESETS["llama-1m"], tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    draw, losses = torch_generator(0, "windows"), []
    for _ in range(steps):
        starts = torch.randint(0, len(stream) - LENGTH, (BATCH,), generator=draw)
        ids = torch.stack([stream[start : start + LENGTH] for start in starts])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)
