"""Peak memory of the process in which a silo trains LoRA on a CPU, predicted from sizes alone.

A process holds, at the end of a forward pass, the program itself, the mapped base weights, the adapter (values as
received and as trained, two moments of AdamW; gradients come when the activations go), the activations that the
backward pass will read, and the logits of some targets. The activations are counted tensor by tensor as this package's
forward pass keeps them (`fused_lora`, `fused_norm`, `short_attention`, `head`): for a decoder block with RMSNorm,
grouped attention and a gated feed-forward part, which is what Llama, Mistral and Qwen have. Others are counted as if.

Four figures are fitted to measurements, not derived: what the program takes, and the three of what the C library's heap
loses between tensors that stay and tensors that go. `benchmarks/memory_plan.py` compares prediction and measurement.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlm.errors import ModelError
from fedlm.recipe.schema import Recipe, TrainingSpec
from fedlm.training.attention import SHORT, causal_model
from fedlm.training.fused_lora import SIBLINGS
from fedlm.training.head import CHUNK
from fedlm.training.loop import MICRO_TOKENS

if TYPE_CHECKING:
    from torch.nn import Module

PROGRAM = 535 * 10**6
"""Bytes of a process with torch, transformers, peft and datasets after some optimiser steps of a tiny model."""

TOKENIZER = 1500
"""Bytes of a loaded tokenizer for each entry of the vocabulary."""

HOLES = 0.54
"""What the heap loses between activations that stay, as a share of them. It grows over the first ten steps or so."""

WORKING = 40
"""What it loses to values that come and go in every block, in the size of the feed-forward part's inner activations."""

LOST_LOGITS = 3
"""Blocks of logits that it loses in the course of a round: what is freed between two blocks is in part taken before
the next, which then needs new room. Blocks beyond `MAPPED` are not the heap's."""

MAPPED = 32 * 2**20
"""Bytes from which the GNU C library always maps a block by itself, and gives it back when it is freed."""

BLOCK = re.compile(r"\.(\d+)\.")
"""The number of a decoder block in a tensor's or module's name."""


@dataclass(frozen=True)
class Linear:
    """A linear layer that has an adapter: y [d_out] = W x [d_in]."""

    name: str
    d_in: int
    d_out: int

    @property
    def block(self) -> int | None:
        return block_of(self.name)

    @property
    def kind(self) -> str:
        """The name without its place, such as 'q_proj'."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Shape:
    """The sizes of a base model on which memory depends."""

    weights: int
    """Numbers in the base, tied ones once."""
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    blocks: int
    linears: tuple[Linear, ...]
    """Those with an adapter."""


@dataclass(frozen=True)
class Footprint:
    """Bytes by what they are for; `total` is the predicted peak."""

    program: int
    weights: int
    adapter: int
    activations: int
    logits: int
    heap: int
    """What the heap loses to its own holes."""

    @property
    def total(self) -> int:
        return self.program + self.weights + self.adapter + self.activations + self.logits + self.heap


def block_of(name: str) -> int | None:
    """The decoder block that a tensor or module of this name belongs to; None outside of blocks.

    >>> block_of("model.layers.12.mlp.up_proj.lora_A.weight")
    12
    """
    match = BLOCK.search(name)
    return int(match[1]) if match else None


def shape_of(recipe: Recipe) -> Shape:
    """The sizes of a recipe's base model and of its LoRA layers, without loading any weights.

    Raises:
        ModelError: the model cannot be found, or its configuration does not say its sizes.
    """
    from fedlm.models.adapters import skeleton

    return shape_from(skeleton(recipe))


def shape_from(model: Module) -> Shape:
    """The sizes of a model with LoRA layers. Raises ModelError as `shape_of`."""
    from fedlm.models.adapters import lora_layers

    config: Any = causal_model(model).config
    sizes: dict[str, int] = {}
    for name in ("hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers"):
        value = getattr(config, name, None)
        if not isinstance(value, int):
            raise ModelError(
                f"memory cannot be planned: this model's configuration has no number '{name}'",
                fix="say rank, layers or targets in federation.capacity, in place of memory",
            )
        sizes[name] = value
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    return Shape(
        weights=sum(p.numel() for name, p in causal_model(model).named_parameters() if ".lora_" not in name),
        hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocab=sizes["vocab_size"],
        blocks=sizes["num_hidden_layers"],
        linears=tuple(Linear(name, m.in_features, m.out_features) for name, m in sorted(lora_layers(model).items())),
    )


def numbers(shape: Shape, rank: int, trained: Callable[[Linear], bool] = lambda _: True) -> int:
    """Numbers in the LoRA factors of these layers."""
    return sum(rank * (linear.d_in + linear.d_out) for linear in shape.linears if trained(linear))


def footprint(
    shape: Shape,
    training: TrainingSpec,
    dtype: str,
    rank: int,
    trained: Callable[[Linear], bool],
    *,
    dropout: bool = False,
) -> Footprint:
    """Predicted peak of one silo's training process.

    Args:
        training: its `max_length`, `batch_size`, `micro_batch_size`, `packing`, `gradient_checkpointing` and optimiser
            count. Sequences are taken to be as long as `max_length` allows.
        dtype: of the base weights and the activations, 'bfloat16' or 'float32'.
        rank: of the LoRA factors.
        trained: which LoRA layers are trained.
        dropout: adapters drop inputs, so that layers run as PEFT has them and keep more.
    """
    width = 2 if dtype == "bfloat16" else 4
    tokens = forward_tokens(training)
    adapter = 4 * numbers(shape, rank)
    trains = 4 * numbers(shape, rank, trained)
    moments = {"adamw": 2, "sgd": 1 if training.momentum else 0}[training.optimizer]
    layers: dict[int | None, list[Linear]] = {}
    for linear in shape.linears:
        if trained(linear):
            layers.setdefault(linear.block, []).append(linear)
    lowest = min((block for block in layers if block is not None), default=0)
    by_block = [
        tokens
        * _kept_per_token(shape, training.max_length, width, rank, layers.get(block, []), dropout, block == lowest)
        for block in range(lowest, shape.blocks)
    ]
    if training.gradient_checkpointing:
        kept = len(by_block) * tokens * shape.hidden * width + max(by_block, default=0)
    else:
        kept = sum(by_block)
    kept += numbers(shape, rank, trained) * width  # factors in the activations' type
    logits = 8 * min(CHUNK, tokens) * shape.vocab + shape.vocab * shape.hidden * width
    blocks = [min(CHUNK, tokens) * shape.vocab * each for each in (width, 4)]  # as computed, and in fp32
    block = max((size for size in blocks if size < MAPPED), default=0)
    return Footprint(
        program=PROGRAM + TOKENIZER * shape.vocab,
        weights=shape.weights * width,
        adapter=2 * adapter + moments * trains,
        activations=kept,
        logits=logits,
        heap=round(HOLES * kept + WORKING * tokens * shape.intermediate * width) + LOST_LOGITS * block,
    )


def forward_tokens(training: TrainingSpec) -> int:
    """Most tokens of one forward pass."""
    longest = training.max_length
    if training.micro_batch_size is not None:
        return training.micro_batch_size * longest
    return min(training.batch_size, max(1, MICRO_TOKENS // longest)) * longest


def _kept_per_token(
    shape: Shape,
    length: int,
    width: int,
    rank: int,
    trained: list[Linear],
    dropout: bool,
    lowest: bool,
) -> int:
    """Bytes that one block keeps of a token for the backward pass.

    Args:
        trained: its layers that are trained.
        lowest: no block below has any.
    """
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = (1 if lowest else 2) * (shape.hidden * width + 4)
    attention = (query + 2 * key) * width
    attention += shape.heads * length * width if length <= SHORT else query * width + 4 * shape.heads
    if lowest and not any(linear.kind in SIBLINGS[0] for linear in trained):
        attention = 0  # it needs no gradient
    gated = 3 * shape.intermediate * width
    inputs = products = 0
    seen: set[tuple[str, int]] = set()
    for linear in trained:
        products += rank * width
        group = _group(linear)
        if dropout:
            inputs += linear.d_in * (1 + width)  # a mask and what it leaves, for each layer by itself
        elif group not in seen:
            inputs += linear.d_in * width
            seen.add(group)
    return norms + attention + gated + inputs + products


def _group(linear: Linear) -> tuple[str, int]:
    """Layers of one group read the same tensor."""
    for family in SIBLINGS:
        if linear.kind in family:
            return family[0], linear.d_in
    return linear.name, linear.d_in
