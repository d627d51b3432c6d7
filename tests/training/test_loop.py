"""The loop against plain torch, against itself cut in other ways, and its refusals."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlm.errors import TrainingError
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.batches import batches, steps_per_round
from fedlm.training.encode import TokenSet
from fedlm.training.forward import drops, padded_nll
from fedlm.training.loop import TrainResult, Window, train
from fedlm.training.objective import sequences_of
from fedlm.training.packing import pack
from fedlm.training.schedule import learning_rate
from tests.training.helpers import learnt, sequence

KEY = (0, "silo-0000")
ALONE = Window(0, 1)


@pytest.fixture
def data() -> TokenSet:
    return TokenSet.of(sequence((1, 10), (i, 3 + i % 7), answer=2 + i % 3) for i in range(2, 22))


def spec(**changes: Any) -> TrainingSpec:
    return TrainingSpec(**{"steps": 4, "batch_size": 6, "max_length": 64, "lr": 1e-2, **changes})


def fit(model: Any, data: TokenSet, s: TrainingSpec, window: Window = ALONE, **more: Any) -> TrainResult:
    return train(model, learnt(model), data, s, window, generator_key=KEY, rule=None, **more)


def values(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in learnt(model).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_equals_a_plain_torch_loop(adapted: Any, data: TokenSet, optimizer: str) -> None:
    s = spec(optimizer=optimizer, momentum=0.9, weight_decay=0.01, schedule="linear", warmup=0.25)
    plain = copy.deepcopy(adapted)
    result = fit(adapted, data, s, Window(1, 3))
    parameters = list(learnt(plain).values())
    if optimizer == "adamw":
        torch_optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    else:
        torch_optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=0.01)
    losses = []
    for step, chosen in enumerate(batches(s, data.lengths, KEY, 1)):
        for group in torch_optimizer.param_groups:
            group["lr"] = learning_rate(s, (4 + step) / 12)
        loss = padded_nll(plain, sequences_of([data[i] for i in chosen])).mean()
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        torch_optimizer.step()
        torch_optimizer.zero_grad()
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    tolerance = (
        1e-4 if optimizer == "adamw" else 1e-5
    )  # Adam divides rounding by rounding where a gradient is near zero
    assert_same(values(adapted), values(plain), tolerance)
    assert (result.steps, result.examples) == (4, 24)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro", [1, 2, 4, 5])
def test_accumulation_is_exact(adapted: Any, data: TokenSet, micro: int, packing: bool) -> None:
    other = copy.deepcopy(adapted)
    whole = fit(adapted, data, spec(optimizer="sgd", packing=packing))
    parts = fit(other, data, spec(optimizer="sgd", packing=packing, micro_batch_size=micro))
    np.testing.assert_allclose(whole.losses, parts.losses, rtol=1e-6)
    assert_same(values(adapted), values(other), 1e-6)
    assert whole.tokens == parts.tokens and whole.target_tokens == parts.target_tokens


def test_same_bits_twice_whatever_the_global_generator(adapted: Any, data: TokenSet) -> None:
    other = copy.deepcopy(adapted)
    fit(adapted, data, spec())
    torch.manual_seed(99)
    state = torch.get_rng_state()
    fit(other, data, spec())
    assert torch.equal(state, torch.get_rng_state())
    assert_same(values(adapted), values(other))


def test_kept_optimizer_continues_exactly(adapted: Any, data: TokenSet) -> None:
    """Two rounds with the moments kept equal two rounds of one torch optimiser; without them they do not."""
    fresh, s = copy.deepcopy(adapted), spec(keep_optimizer=True, schedule="constant")
    one = fit(adapted, data, s, Window(0, 2))
    assert {n.rpartition("/")[2] for n in one.optimizer_state} == {"step", "exp_avg", "exp_avg_sq"}
    fit(adapted, data, s, Window(1, 2), optimizer_state=one.optimizer_state)
    plain = copy.deepcopy(fresh)
    optimizer = torch.optim.AdamW(learnt(plain).values(), lr=1e-2, weight_decay=0.0)
    for round_ in range(2):
        for chosen in batches(s, data.lengths, KEY, round_):
            padded_nll(plain, sequences_of([data[i] for i in chosen])).mean().backward()
            torch.nn.utils.clip_grad_norm_(learnt(plain).values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(values(adapted), values(plain), 1e-4)
    fit(fresh, data, s, Window(0, 2))
    fit(fresh, data, s, Window(1, 2))
    assert max((values(adapted)[n] - values(fresh)[n]).abs().max() for n in values(fresh)) > 1e-3
    wrong = {"nobody/exp_avg": torch.zeros(3)}
    with pytest.raises(TrainingError, match="does not fit parameter 'nobody'"):
        fit(fresh, data, s, optimizer_state=wrong)


def test_rule_sets_the_start_and_corrects_after_clipping(adapted: Any, data: TokenSet) -> None:
    class Rule:
        def __init__(self) -> None:
            self.norms: list[float] = []
            self.before_steps: list[int] = []

        def start(self) -> dict[str, torch.Tensor]:
            return {n: torch.zeros_like(p) for n, p in learnt(adapted).items()}

        def before(self, step: int, parameters: dict[str, torch.nn.Parameter]) -> None:
            assert all(p.grad is None for p in parameters.values())
            self.before_steps.append(step)

        def correct(self, parameters: dict[str, torch.nn.Parameter]) -> None:
            gradients = [p.grad for p in parameters.values() if p.grad is not None]
            self.norms.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))))
            for gradient in gradients:
                gradient.zero_()

    rule = Rule()
    train(
        adapted,
        learnt(adapted),
        data,
        spec(clip_norm=1e-3, optimizer="sgd"),
        Window(0, 1),
        generator_key=KEY,
        rule=rule,
    )
    assert rule.before_steps == [0, 1, 2, 3]
    assert len(rule.norms) == 4 and max(rule.norms) < 1.01e-3
    assert all((p == 0).all() for p in learnt(adapted).values())  # started at zero, every gradient removed


def test_gradient_checkpointing_changes_nothing(adapted: Any, data: TokenSet) -> None:
    other = copy.deepcopy(adapted)
    calls = [0, 0]
    for i, model in enumerate((adapted, other)):
        mlp = model.get_base_model().model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda m, _, i=i: calls.__setitem__(i, calls[i] + m.training))
    fit(adapted, data, spec())
    fit(other, data, spec(gradient_checkpointing=True))
    assert calls[1] == 2 * calls[0] > 0, "every layer is computed again"
    assert_same(values(adapted), values(other), 1e-6)
    assert not other.get_base_model().is_activation_checkpointing


@pytest.mark.slow
def test_compiled_layers_change_nothing(adapted: Any, data: TokenSet) -> None:
    other = copy.deepcopy(adapted)
    fit(adapted, data, spec(optimizer="sgd"))
    fit(other, data, spec(optimizer="sgd", compile=True))
    assert_same(values(adapted), values(other), 1e-5)


def test_events_say_where_training_is(adapted: Any, data: TokenSet) -> None:
    seen: list[dict[str, Any]] = []
    result = fit(adapted, data, spec(), Window(2, 3), observe=seen.append, silo="north")
    assert [e["step"] for e in seen] == [0, 1, 2, 3]
    assert {(e["kind"], e["round"], e["silo"], e["steps"]) for e in seen} == {("step", 2, "north", 4)}
    assert [e["loss"] for e in seen] == result.losses
    total = sum(loss * n for loss, n in zip(result.losses, _targets(data), strict=True))
    assert result.loss == pytest.approx(total / result.target_tokens)


def _targets(data: TokenSet) -> list[int]:
    return [sum(data[i].targets for i in chosen) for chosen in batches(spec(), data.lengths, KEY, 2)]


def test_stops_when_asked(adapted: Any, data: TokenSet) -> None:
    asked = iter([False, False, True])
    assert fit(adapted, data, spec(), should_stop=lambda: next(asked)).steps == 2


def test_a_loss_that_is_no_number_names_silo_and_step(adapted: Any, data: TokenSet) -> None:
    with torch.no_grad():
        next(iter(learnt(adapted).values()))[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="silo north: the loss became nan at step 0"):
        fit(adapted, data, spec(), silo="north")


def test_a_gradient_that_is_no_number_is_found_without_clipping_too(adapted: Any, data: TokenSet) -> None:
    next(iter(learnt(adapted).values())).register_hook(lambda g: g * float("nan"))
    with pytest.raises(TrainingError, match="silo north: the gradient became nan at step 0"):
        fit(adapted, data, spec(clip_norm=None), silo="north")


@pytest.mark.parametrize("packing", [True, False])
def test_full_weights_of_a_bf16_model_train_as_fp32_masters_under_autocast(
    tiny_model_dir: Path, data: TokenSet, packing: bool
) -> None:
    from transformers import AutoModelForCausalLM

    from fedlm.models.adapters import attach
    from fedlm.recipe.schema import AdapterSpec

    losses, dtypes = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype, attn_implementation="sdpa")
        model: Any = attach(base, AdapterSpec(kind="full"), 0)
        seen = dtypes[dtype] = set()
        model.model.layers[0].mlp.register_forward_hook(
            lambda m, _, o, seen=seen: seen.add(o.dtype) if m.training else None
        )
        losses[dtype] = fit(model, data, spec(packing=packing)).losses
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert dtypes == {torch.float32: {torch.float32}, torch.bfloat16: {torch.bfloat16}}
    np.testing.assert_allclose(losses[torch.bfloat16], losses[torch.float32], rtol=0.02)
    assert losses[torch.bfloat16] != losses[torch.float32]


def test_longer_than_the_model_is_refused_with_both_numbers(adapted: Any, data: TokenSet) -> None:
    with pytest.raises(TrainingError, match=r"is 257 .* 256 positions"):
        fit(adapted, data, spec(max_length=257))


def test_dropout_is_keyed(base: Any, data: TokenSet) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.eval()
    other = copy.deepcopy(model)
    first = fit(model, data, spec())
    torch.manual_seed(5)
    second = fit(other, data, spec())
    assert first.losses == second.losses
    assert_same(values(model), values(other))
    assert not model.training


def test_dropout_is_on_and_drawn_anew_each_round(adapted: Any) -> None:
    """Equal sequences, so that the order of a round's batches does not matter: only dropout tells rounds apart."""
    alike = TokenSet.of([sequence((1, 12))] * 6)

    def first_loss(model: Any, round_: int) -> float:
        return fit(copy.deepcopy(model), alike, spec(steps=1), Window(round_, 2)).losses[0]

    assert first_loss(adapted, 0) == first_loss(adapted, 1)
    for layer in adapted.modules():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    assert len({first_loss(adapted, 0), first_loss(adapted, 1), fit(adapted, alike, spec(steps=1)).losses[0]}) == 2


@pytest.mark.parametrize("where", ["adapter", "attention"])
def test_with_dropout_no_beginning_is_shared(base: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config if where == "adapter" else plain)
    if where == "attention":
        base.config.attention_dropout = 0.5
    assert drops(model.train()) and not drops(model.eval())
    sizes: list[int] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        sizes.append((made := pack(*args, **kwargs)).ids.shape[1])
        return made

    monkeypatch.setattr("fedlm.training.forward.pack", spy)
    fit(model, TokenSet.of([sequence((1, 12))] * 6), spec(steps=1))
    assert sizes == [6 * 11]


def test_attention_dropout_is_applied(base: Any) -> None:
    data = TokenSet.of([sequence((1, 12), answer=6)] * 6)
    learn_all = {n: p.requires_grad_() for n, p in base.named_parameters()}
    args = (learn_all, data, spec(steps=1, lr=1e-9), ALONE)
    without = train(base, *args, generator_key=KEY, rule=None).losses
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    base.config.attention_dropout = 0.5
    assert abs(train(base, *args, generator_key=KEY, rule=None).losses[0] - without[0]) > 1e-3


# batches


@pytest.mark.parametrize("packing", [True, False])
def test_every_sequence_is_seen_before_any_is_seen_twice_more(packing: bool) -> None:
    lengths = np.arange(1, 24)
    s = spec(steps=10, packing=packing)
    seen = np.concatenate(list(batches(s, lengths, KEY, 0)))
    assert len(seen) == 60
    assert np.ptp(np.bincount(seen, minlength=23)) <= 1
    again = np.concatenate(list(batches(s, lengths, KEY, 0)))
    other = np.concatenate(list(batches(s, lengths, KEY, 1)))
    assert (seen == again).all() and not (seen == other).all()
    stranger = np.concatenate(list(batches(s, lengths, (0, "silo-0001"), 0)))
    assert not (seen == stranger).all()


def test_buckets_pad_less_and_stay_fair() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 400)
    s = spec(steps=None, epochs=1.0, batch_size=8)

    def padding(packing: bool) -> int:
        found = batches(s.model_copy(update={"packing": packing}), lengths, KEY, 0)
        return sum(int(lengths[b].max()) * len(b) - int(lengths[b].sum()) for b in found)

    assert padding(False) < 0.4 * padding(True)
    means = [lengths[b].mean() for b in batches(s.model_copy(update={"packing": False}), lengths, KEY, 0)]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3  # batches are not in order of length


def test_epochs_and_small_silos() -> None:
    assert steps_per_round(spec(steps=None, epochs=1.0), 20) == 4
    assert [len(b) for b in batches(spec(steps=None, epochs=1.0), np.ones(20, int), KEY, 0)] == [6, 6, 6, 2]
    assert sum(len(b) for b in batches(spec(steps=None, epochs=0.5), np.ones(20, int), KEY, 0)) == 10
    assert [len(b) for b in batches(spec(steps=3), np.ones(1, int), KEY, 0)] == [1, 1, 1]
    for n, epochs, size in itertools.product(range(1, 25), (0.1, 0.5, 0.7, 1.0, 1.3, 2.0), (1, 4, 6)):
        s = spec(steps=None, epochs=epochs, batch_size=size)
        assert len(list(batches(s, np.ones(n, int), KEY, 0))) == steps_per_round(s, n)


# schedule


def test_schedule_over_the_whole_run() -> None:
    s = spec(lr=1.0, warmup=0.1, final_lr=0.2, schedule="cosine")
    assert learning_rate(s, 0.0) == 0.0
    assert learning_rate(s, 0.05) == pytest.approx(0.5)
    assert learning_rate(s, 0.1) == pytest.approx(1.0)
    assert learning_rate(s, 0.55) == pytest.approx(0.6)
    assert learning_rate(s, 1.0) == pytest.approx(0.2)
    assert learning_rate(spec(lr=1.0, schedule="linear"), 0.25) == pytest.approx(0.75)
    assert learning_rate(spec(lr=1.0, schedule="constant"), 0.9) == 1.0
