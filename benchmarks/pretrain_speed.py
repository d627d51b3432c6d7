"""Bench: tokens per second of full-weight pre-training of a small Llama, against a plain torch loop.

    OMP_NUM_THREADS=1 python benchmarks/pretrain_speed.py [--steps 20] [--repeats 3] [--batch 8] [--length 128]

The model has 4 layers of width 128 and a vocabulary of 2,048 (1.0 M parameters), fp32, AdamW. The plain loop feeds
`[batch, length]` to transformers' own forward (no padding, no packing, `sdpa`), takes the cross entropy, clips and
steps. fedlm's loop trains on the same sequences through `fedlm.training.loop.train`. Both see the same number of tokens
a step; sides alternate over the repeats and the medians count, by the clock and by processor time (which others' work
on the machine changes less). Also: what laying out a batch (`pack`) costs of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

VOCABULARY = 2048


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def sequences(count: int, length: int) -> Any:
    from fedlm.training.encode import TokenSet
    from fedlm.training.sequences import Encoded

    draw = np.random.default_rng(0)
    loss = np.arange(length) > 0
    return TokenSet.of(Encoded(draw.integers(0, VOCABULARY, length).astype(np.int32), loss) for _ in range(count))


Clocks = tuple[float, float]
"""Seconds, by the clock and by processor time."""


def now() -> Clocks:
    return time.perf_counter(), time.process_time()


def since(then: Clocks) -> Clocks:
    wall, processor = now()
    return wall - then[0], processor - then[1]


def ours(data: Any, steps: int, batch: int, length: int) -> Clocks:
    """Of `steps` steps, after a few to warm up."""
    from fedlm.recipe.schema import TrainingSpec
    from fedlm.training.loop import Window, train

    net = model()
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    spec = TrainingSpec(steps=5, batch_size=batch, max_length=length, lr=1e-3, order="stream")
    train(net, parameters, data, spec, Window(0, 1), generator_key=(0, "silo"), rule=None)
    spec = spec.model_copy(update={"steps": steps})
    began = now()
    train(net, parameters, data, spec, Window(0, 1), generator_key=(0, "silo"), rule=None)
    return since(began)


def plain(data: Any, steps: int, batch: int, length: int) -> Clocks:
    net = model().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
    tokens = torch.from_numpy(data.ids.astype(np.int64)).view(-1, length)
    began = now()
    for step in range(5 + steps):
        if step == 5:
            began = now()
        ids = tokens[torch.arange(step * batch, (step + 1) * batch) % len(tokens)]
        logits = net(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    return since(began)


def packing(data: Any, batch: int) -> float:
    """Milliseconds of laying out one batch."""
    from fedlm.training.packing import pack

    chosen = [data[i].sequences[0] for i in range(batch)]
    began = time.perf_counter()
    for _ in range(50):
        pack(chosen)
    return (time.perf_counter() - began) / 50 * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 20), ("repeats", 3), ("batch", 8), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    data = sequences(64 * args.batch, args.length)
    tokens = args.steps * args.batch * args.length
    found: dict[str, list[Clocks]] = {"fedlm": [], "plain": []}
    for _ in range(args.repeats):
        for name, side in (("fedlm", ours), ("plain", plain)):
            found[name].append(side(data, args.steps, args.batch, args.length))

    def rates(clock: int) -> dict[str, Any]:
        middle = {name: tokens / statistics.median(times[clock] for times in all_) for name, all_ in found.items()}
        return {**{k: round(v) for k, v in middle.items()}, "ratio": round(middle["fedlm"] / middle["plain"], 3)}

    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in model().parameters()),
                "threads": torch.get_num_threads(),
                "tokens_per_second": rates(0),
                "tokens_per_processor_second": rates(1),
                "pack_ms": round(packing(data, args.batch), 3),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
