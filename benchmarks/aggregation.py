"""Bench d: how fast updates are folded, beside the machine's own copy bandwidth in the same run.

Both are counted as bytes read per second. 'fold' is `Accumulator.add` over the silos' updates; 'check + fold' judges
every update first, as a round does. Updates come as one buffer (as a safetensors file loads) or as tensors of their
own. Measurements take turns and the best of several counts, since other work only ever makes them slower.

    python benchmarks/aggregation.py [--silos 50] [--repeats 5] [--threads N] [--full]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise

import torch

from fedlm.algorithms.base import Accumulator
from fedlm.federation.updates import check_update
from fedlm.messages import Tensors

HIDDEN, KEYS, INNER, LAYERS, VOCABULARY = 576, 192, 1536, 30, 49152
"""SmolLM2-135M."""

LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}

Shapes = dict[str, torch.Size]


def lora_shapes(rank: int) -> Shapes:
    """A and B of all 210 linear modules."""
    shapes: Shapes = {}
    for layer in range(LAYERS):
        for module, (out, into) in LINEAR.items():
            name = f"model.layers.{layer}.{module}"
            shapes[f"{name}.lora_A.weight"] = torch.Size((rank, into))
            shapes[f"{name}.lora_B.weight"] = torch.Size((out, rank))
    return shapes


def full_shapes() -> Shapes:
    """All weights, the embeddings once (they are tied)."""
    shapes: Shapes = {
        "model.embed_tokens.weight": torch.Size((VOCABULARY, HIDDEN)),
        "model.norm.weight": torch.Size((HIDDEN,)),
    }
    for layer in range(LAYERS):
        for module, size in LINEAR.items():
            shapes[f"model.layers.{layer}.{module}.weight"] = torch.Size(size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = torch.Size((HIDDEN,))
    return shapes


def make_update(shapes: Shapes, dtype: torch.dtype, seed: int, *, one_buffer: bool) -> Tensors:
    names = sorted(shapes)
    ends = list(accumulate((shapes[name].numel() for name in names), initial=0))
    buffer = torch.randn(ends[-1], generator=torch.Generator().manual_seed(seed)).mul_(1e-3).to(dtype)
    views = {name: buffer[a:b].view(shapes[name]) for name, (a, b) in zip(names, pairwise(ends), strict=True)}
    return views if one_buffer else {name: view.clone() for name, view in views.items()}


def bandwidth(work: Callable[[], None], bytes_read: int) -> float:
    """GB/s of one measurement."""
    began = time.perf_counter()
    work()
    return bytes_read / (time.perf_counter() - began) / 1e9


def measure(
    shapes: Shapes, dtype: torch.dtype, silos: int, distinct: int, repeats: int, *, one_buffer: bool
) -> dict[str, float]:
    """Best GB/s of copy, fold, and check + fold over `silos` updates, `distinct` of which differ (to bound memory)."""
    updates = [make_update(shapes, dtype, seed, one_buffer=one_buffer) for seed in range(distinct)]
    size = sum(tensor.nbytes for tensor in updates[0].values())
    sources = [torch.randn(size // 4) for _ in range(distinct)]
    target = torch.zeros(size // 4)

    def each() -> Iterator[Tensors]:
        return (updates[i % distinct] for i in range(silos))

    def copy() -> None:
        for i in range(silos):
            target.copy_(sources[i % distinct])

    def fold() -> None:
        for update in each():
            accumulator.add(update, 7.0)

    def check_and_fold() -> None:
        for update in each():
            check_update("silo", update, shapes, 7.0, max_weight=1e3)
            accumulator.add(update, 7.0)

    best = {"copy": 0.0, "fold": 0.0, "check + fold": 0.0}
    for _ in range(repeats):
        accumulator = Accumulator()
        accumulator.add(updates[0], 1.0)  # its memory is there before the clock runs
        for name, work in (("copy", copy), ("fold", fold), ("check + fold", check_and_fold)):
            best[name] = max(best[name], bandwidth(work, silos * size))
    return best | {"MB": size / 1e6, "tensors": float(len(shapes))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--silos", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--full", action="store_true", help="also full weights, 538 MB fp32 and 269 MB bf16 (3 GB of memory)"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = [
        (
            f"LoRA r={rank}, {layout}",
            lora_shapes(rank),
            torch.float32,
            options.silos,
            options.silos,
            layout == "one buffer",
        )
        for rank in (16, 32)
        for layout in ("one buffer", "tensors apart")
    ]
    if options.full:
        cases += [
            ("full weights, fp32", full_shapes(), torch.float32, 4, 2, True),
            ("full weights, bf16", full_shapes(), torch.bfloat16, 4, 2, True),
        ]
    rows = []
    for name, shapes, dtype, silos, distinct, one_buffer in cases:
        found = measure(shapes, dtype, silos, distinct, options.repeats, one_buffer=one_buffer)
        rows.append({"case": name, "silos": silos, **found, "ratio": found["fold"] / found["copy"]})
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}))
        return
    print(f"{torch.get_num_threads()} threads; GB/s of updates read; goal: fold >= 0.5x copy")
    print(
        f"{'':30} {'MB':>6} {'tensors':>7} {'copy':>6} {'fold':>6} {'check+fold':>10} {'fold/copy':>9} {'c+f/copy':>9}"
    )
    for row in rows:
        print(
            f"{row['case']:30} {row['MB']:6.1f} {row['tensors']:7.0f} {row['copy']:6.1f} {row['fold']:6.1f} "
            f"{row['check + fold']:10.1f} {row['ratio']:8.2f}x {row['check + fold'] / row['copy']:8.2f}x"
        )


if __name__ == "__main__":
    main()
