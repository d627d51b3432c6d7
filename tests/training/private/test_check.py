"""The check before a private training: what it lets pass, and what it must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleHooks
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from fedlm.errors import TrainingError
from fedlm.models.adapters import attach, trainable
from fedlm.recipe.schema import AdapterSpec
from fedlm.training.objective import Likelihood, Objective, Tools
from fedlm.training.private.check import check_gradients, compare, probes
from fedlm.training.private.gradients import Way
from fedlm.training.private.loop import private_mode
from fedlm.training.sequences import Example
from tests.training.private.helpers import KINDS, SPEC, made, task, texts


def checked(objective: Objective, like: Example, way: Way | None = None) -> None:
    model = objective.tools.model
    with private_mode(model, objective):
        check_gradients(objective, trainable(model), like, way=way)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_passes_and_is_left_as_it_was(kind: str, base: Any) -> None:
    """Also at first values, where LoRA's B is zero."""
    model = attach(base.requires_grad_(False), AdapterSpec.model_validate(KINDS[kind]), 0)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    for way in (None, "ghost"):
        checked(Likelihood(Tools(model, SPEC)), texts()[0], way)  # type: ignore[arg-type]
    after = trainable(model)
    assert all(torch.equal(before[n], after[n]) and after[n].grad is None for n in before)


@pytest.mark.parametrize("name", ["classify", "label-words", "reward", "dpo", "orpo"])
def test_objectives_pass_in_bf16_too(name: str, base: Any) -> None:
    base.to(torch.bfloat16).config.dtype = torch.bfloat16
    objective, examples = task(name, made(base, "lora", {"classify": 3, "reward": 1}.get(name, 0)))
    checked(objective, examples[0])


def test_dropout_passes(base: Any) -> None:
    model = attach(base.requires_grad_(False), AdapterSpec(rank=4, dropout=0.5), 0).train()
    checked(Likelihood(Tools(model, SPEC)), texts()[0])
    assert any(isinstance(m, nn.Dropout) and m.p == 0.5 and m.training for m in model.modules())


def test_probes_are_of_the_form_and_nothing_else() -> None:
    like = texts()[3]
    found = probes(like, 512)
    assert [len(e) for e in found] == [7, 19, 12] and all(e.targets == 4 for e in found)
    other = probes(texts()[4], 512)
    assert all((a.sequences[0].ids == b.sequences[0].ids).all() for a, b in zip(found, other, strict=True))


def test_pefts_prompt_tuning_under_opacus_is_caught(base: Any) -> None:
    """PEFT runs the prompt's encoder once for the whole batch, and Opacus takes that for a batch of one."""
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    examples, watched = probes(texts()[0], 512), GradSampleModule(model, loss_reduction="sum")

    def losses(some: list[Example], through: Any) -> Tensor:
        longest = max(map(len, some))
        ids = torch.zeros(len(some), longest, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, example in enumerate(some):
            (s,) = example.sequences
            ids[row, : len(s)], mask[row, : len(s)] = torch.from_numpy(s.ids).long(), 1
            labels[row, : len(s)][torch.from_numpy(s.loss)] = ids[row, : len(s)][torch.from_numpy(s.loss)]
        logits = through(input_ids=ids, attention_mask=mask).logits[:, 4:-1]
        return nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)

    losses(examples, watched).sum().backward()  # type: ignore[no-untyped-call]
    together = {n: p.grad_sample for n, p in parameters.items()}
    watched.remove_hooks()
    apart = []
    for example in examples:
        model.zero_grad()
        losses([example], model).sum().backward()  # type: ignore[no-untyped-call]
        apart.append({n: p.grad.clone() for n, p in parameters.items()})
    (name,) = parameters
    assert len(together[name]) == 1 and len(examples) == 3
    with pytest.raises(TrainingError, match=r"'prompt_encoder.*no gradient of example 1 by itself"):
        compare(lambda n, i: together[n][i] if i < len(together[n]) else None, apart, 1e-3)
    with pytest.raises(TrainingError, match=r"wrong for 'prompt_encoder"):
        compare(lambda n, _: together[n][0], apart, 1e-3)


@pytest.mark.parametrize("layer", [nn.Linear, nn.LayerNorm])
def test_a_wrong_rule_is_caught(layer: type[nn.Module], base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = GradSampleHooks.GRAD_SAMPLERS[layer]

    def wrong(module: Any, inputs: Any, dy: Tensor) -> Any:
        return {p: g.roll(1, 0) for p, g in right(module, inputs, dy).items()}  # each example gets another's

    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, layer, wrong)
    if layer is nn.LayerNorm:
        base.model.norm = nn.LayerNorm(64)
    model = made(base, "lora" if layer is nn.Linear else "full")
    named = "lora_" if layer is nn.Linear else "model.norm"
    with pytest.raises(TrainingError, match=f"wrong for '.*{named}"):
        checked(Likelihood(Tools(model, SPEC)), texts()[0])


def test_a_wrong_norm_is_caught(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.grad_sample import GradSampleHooksFastGradientClipping as Fast

    right = Fast.NORM_SAMPLERS[nn.Linear]
    halved = lambda *a: {p: g / 2 for p, g in right(*a).items()}  # noqa: E731
    monkeypatch.setitem(Fast.NORM_SAMPLERS, nn.Linear, halved)
    with pytest.raises(TrainingError, match="norms of per-example gradients are off"):
        checked(Likelihood(Tools(made(base, "lora"), SPEC)), texts()[0], "ghost")


@pytest.mark.parametrize("kind", ["lora", "full", "prompt"])
def test_a_layer_that_mixes_the_batch_is_caught(kind: str, base: Any) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.BatchNorm1d(64, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.inner(x.transpose(1, 2)).transpose(1, 2)
            return mixed

    base.model.norm = Mixed()
    with pytest.raises(TrainingError, match="mixes examples of a batch"):
        checked(Likelihood(Tools(made(base, kind), SPEC)), texts()[0])


def test_a_parameter_that_is_read_past_its_layer_is_caught(base: Any) -> None:
    """A matrix that the model multiplies with by itself, without calling its layer."""

    class Past(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.inner.weight)

    base.model.layers[0].mlp.up_proj = Past(base.model.layers[0].mlp.up_proj)
    with pytest.raises(TrainingError, match=r"up_proj.inner.weight' .* no gradient of example 0"):
        checked(Likelihood(Tools(made(base, "full"), SPEC)), texts()[0])
