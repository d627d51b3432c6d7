"""DiLoCo and its relatives through the real coordinator, silos and messages, on a tiny model that is trained whole."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.data.federated import load_data
from fedlm.errors import RecipeError
from fedlm.federation.api import run_recipe
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo import Workbench
from fedlm.messages import Event, Tensors
from fedlm.models.adapters import adapter_parameters
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from fedlm.training.batches import batches
from fedlm.training.objective import Likelihood, Tools
from tests.federation.conftest import WORDS, Tiny
from tests.federation.test_kill import drive

RECIPE = """
name: outer
task: pretrain
model: {{source: {model}, dtype: float32}}
adapter: {{kind: full}}
data:
  sources: [{{path: rows.jsonl, columns: {{text: text}}}}]
  partition: {{kind: natural, by: site}}
  split: {{validation: 0.1, test: 0.0}}
training: {{steps: 2, batch_size: 4, max_length: 48, lr: 3e-3, schedule: constant, keep_optimizer: true}}
federation: {{rounds: 6, workers: 1, algorithm: {{name: diloco}}, downlink: {{send: changed}}}}
evaluation: {{every: 6}}
"""
LAYERS = 8
STREAMING = ("federation.algorithm.name=streaming-diloco", "federation.algorithm.fragments=4")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Tiny:
    """A Llama of eight small layers, and two silos with text."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    base = tmp_path_factory.mktemp("deep")
    config = LlamaConfig.from_pretrained(tiny_model_dir)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = LAYERS, 32, 64
    config.head_dim = 8
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(base / "model")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(base / "model")
    draw = random.Random(0)
    with (base / "rows.jsonl").open("w") as file:
        for number in range(60):
            text = " ".join(draw.choices(WORDS, k=20))
            file.write(json.dumps({"text": text, "site": f"site{number % 2}"}) + "\n")
    (base / "recipe.yaml").write_text(RECIPE.format(model=base / "model"))
    return Tiny(base)


def go(tiny: Tiny, folder: Path, *changes: str) -> tuple[Tensors, list[dict[str, Any]], list[Event]]:
    """The last model, rounds.jsonl, and what was told."""
    events: list[Event] = []
    run_recipe(tiny.recipe(*changes), base=tiny.base, run_dir=folder, observe=events.append)
    run = RunDir.open(folder, write=False)
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None
    return checkpoint.parameters, run.rounds(), events


def plain_adamw(recipe: Recipe, base: Path, silo: str) -> Tensors:
    """One training without rounds: torch's AdamW over the same batches, one after another."""
    bench = Workbench(recipe, load_data(recipe, base))
    bench.load()
    bench.model.train()
    parameters, tokens, spec = adapter_parameters(bench.model), bench.training_tokens(silo), recipe.training
    optimizer = torch.optim.AdamW(parameters.values(), lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
    for round_ in range(recipe.federation.rounds):
        for chosen in batches(spec, tokens.lengths, (recipe.seed, silo), round_):
            objective = Likelihood(Tools(bench.model, spec))
            terms, divisor = objective.terms(objective.begin([tokens[i] for i in chosen]))
            optimizer.zero_grad()
            (terms.sum() / divisor).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: p.detach().clone() for name, p in parameters.items()}


def test_one_silo_one_step_a_round_is_plain_adamw(deep: Tiny, tmp_path: Path) -> None:
    """Outer rate 1, momentum 0, inner state kept, fp32: eight rounds through coordinator and disk, within 1e-6."""
    changes = (
        "federation.algorithm={name: diloco, server_lr: 1.0, server_momentum: 0.0}",
        "data.partition.max_silos=1",
        "training.steps=1",
        "training.clip_norm=null",
        "training.packing=false",
        "federation.rounds=8",
    )
    ours, _, _ = go(deep, tmp_path / "run", *changes)
    theirs = plain_adamw(deep.recipe(*changes), deep.base, "site1")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_one_fragment_without_overlap_is_diloco_bit_for_bit(deep: Tiny, tmp_path: Path) -> None:
    one, rounds, _ = go(deep, tmp_path / "one", STREAMING[0], "federation.algorithm.fragments=1")
    other, expected, _ = go(deep, tmp_path / "other")
    assert [name for name in other if not torch.equal(one[name], other[name])] == []
    assert [r["loss"] for r in rounds] == [r["loss"] for r in expected]


def training_bytes(rounds: list[dict[str, Any]], which: str) -> list[int]:
    """Of all silos' trainings, by round."""
    return [sum(silo[which] for silo in line["silos"].values()) for line in rounds if line["round"] >= 0]


def test_a_fragment_travels_in_a_round_both_ways(deep: Tiny, tmp_path: Path) -> None:
    """Measured bytes: in every round those of the due fragment, up and (after the first) down; the highest, that with
    the embeddings, is well below DiLoCo's, and the sum of a cycle is DiLoCo's of one round."""
    model, streamed, _ = go(deep, tmp_path / "streamed", *STREAMING, "federation.rounds=8", "evaluation.every=8")
    _, whole, _ = go(deep, tmp_path / "whole")
    up, down, full = (
        training_bytes(streamed, "bytes_up"),
        training_bytes(streamed, "bytes_down"),
        training_bytes(whole, "bytes_up")[0],
    )
    sizes = [0] * 4
    for name, value in model.items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        fragment = layer % 4 if layer is not None else 0 if "embed" in name else 3
        sizes[fragment] += 4 * value.numel()
    for number, size in enumerate([*sizes, *sizes]):
        assert 2 * size <= up[number] <= 2 * size + 8000, "values and names of two silos' fragments"
        if number:
            assert 2 * sizes[(number - 1) % 4] <= down[number] <= 2 * sizes[(number - 1) % 4] + 12000
    assert sum(up[:4]) == pytest.approx(full, rel=0.02)
    layers_alone = sorted(up[:4])[:3]
    assert max(layers_alone) < 0.3 * full and max(up) < 0.45 * full


def test_int4_both_ways(deep: Tiny, tmp_path: Path) -> None:
    """A quantised pseudo-gradient up, the quantised step of the outer optimiser down."""
    guarded = ("guards=[{name: int4}]", "federation.downlink={send: changed, guards: [{name: int4}]}")
    _, plain, _ = go(deep, tmp_path / "plain", *STREAMING, "federation.algorithm.overlap=1")
    _, small, _ = go(deep, tmp_path / "small", *STREAMING, "federation.algorithm.overlap=1", *guarded)
    for which in ("bytes_up", "bytes_down"):
        assert sum(training_bytes(small, which)[1:]) < 0.25 * sum(training_bytes(plain, which)[1:])
    first, last = (small[i]["validation"]["loss"] for i in (0, -1))
    assert last < first - 0.2


@pytest.mark.slow
def test_streaming_killed_and_resumed_ends_in_the_same_bits(deep: Tiny, tmp_path: Path) -> None:
    """Own parameters and AdamW in the silos, an outer momentum per fragment, SIGKILL at two random moments."""
    changes = (*STREAMING, "federation.algorithm.overlap=1", "federation.algorithm.mixing=0.5", "federation.rounds=8")
    assert drive(deep.base / "recipe.yaml", tmp_path, 3, 2, *changes) > 0


def test_more_fragments_than_layers_are_refused_before_anything_is_trained(deep: Tiny, tmp_path: Path) -> None:
    changes = (STREAMING[0], "federation.algorithm.fragments=9", "federation.rounds=9")
    with pytest.raises(RecipeError, match="9 fragments cannot be made of 8 layers") as error:
        go(deep, tmp_path / "run", *changes)
    assert "federation.algorithm.fragments" in error.value.sentence() and "at most 8" in error.value.sentence()
    assert not (tmp_path / "run").exists()


def test_a_guard_that_does_not_fit_a_later_fragment_is_told_at_the_start(deep: Tiny, tmp_path: Path) -> None:
    """Of three fragments the last has two layers, and fewer values than the guard is to keep."""
    changes = (STREAMING[0], "federation.algorithm.fragments=3", "guards=[{name: topk, k: 20000}]")
    with pytest.raises(RecipeError, match="20000"):
        go(deep, tmp_path / "run", *changes)
    assert not (tmp_path / "run").exists()


def test_a_round_beyond_a_silos_text_is_told_once(deep: Tiny, tmp_path: Path) -> None:
    _, rounds, events = go(deep, tmp_path / "run", "training.steps=20", "federation.rounds=2")
    rows = rounds[1]["silos"]["site0"]["examples"]
    said = [e["text"] for e in events if e["kind"] == "phase" and "less text than a round takes" in e["text"]]
    assert rows == 80 and len(said) == 1
    assert "2 of 2 silos" in said[0] and "for 80 examples" in said[0]
    _, _, events = go(deep, tmp_path / "enough", "federation.rounds=2")
    assert not [e for e in events if e["kind"] == "phase" and "less text" in e["text"]]


REFUSED = [
    (["training.keep_optimizer=false"], "keep_optimizer: must be true with 'streaming-diloco'"),
    (["federation.sample=1"], "sample: not with 'streaming-diloco': a silo that is not asked"),
    (["federation.downlink={send: full}"], "send: must be 'changed' with 'streaming-diloco'"),
    (["federation.rounds=3"], "4 fragments, one a round, do not fit 3 rounds"),
    (["federation.algorithm.overlap=2"], "overlap: 2 steps into a round of 2"),
    (["federation.algorithm.mixing=1.0"], "mixing"),
    (["training.steps=null", "training.epochs=1.0"], "epochs: with 'streaming-diloco' all silos take the same number"),
    (["federation.capacity={default: {steps: 1}}"], "all silos take the same steps"),
    (
        ["federation.algorithm={name: streaming-diloco, fragments: 1, pattern: sequential}"],
        "pattern: has no effect with one",
    ),
    (["federation.algorithm={name: diloco, fragments: 2}"], "fragments: has no effect with 'diloco'"),
    (["federation.algorithm={name: diloco, mixing: 0.5}"], "mixing: has no effect with 'diloco'"),
    (["federation.algorithm={name: eager-diloco}", "federation.quorum=0.5"], "quorum: must be 1 with 'eager-diloco'"),
    (
        ["federation.algorithm={name: eager-diloco}", "federation.downlink={send: changed, guards: [{name: int8}]}"],
        "not with 'eager-diloco': what it sends down is more than averaged values",
    ),
    (
        [
            "federation={rounds: 4, algorithm: {name: delayed-nesterov, buffer: 4, momentum_share: 0.5}}",
            "training.keep_optimizer=false",
        ],
        "momentum_share: is above 1 / `buffer`, 0.25",
    ),
]


@pytest.mark.parametrize("changes, reason", REFUSED, ids=lambda x: x[-1] if isinstance(x, list) else "")
def test_refused_with_its_reason(deep: Tiny, changes: list[str], reason: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(deep.base / "recipe.yaml", [*STREAMING, *changes])
    assert reason in error.value.sentence()
