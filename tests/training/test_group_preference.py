"""The predictor of groups' preferences: who attends to whom, its loss against a plain loop, figures against SciPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from fedlm.errors import DataError, ModelError
from fedlm.models.adapters import attach, get_tensors, initial_tensors, set_tensors
from fedlm.models.export import load_adapter, save_adapter, save_merged
from fedlm.models.load import load_base
from fedlm.models.predictor import Predictor
from fedlm.randomness import numpy_generator
from fedlm.recipe.schema import Recipe, TrainingSpec
from fedlm.training.encode import TokenSet, encode_all
from fedlm.training.objective import Tools, sequences_of
from fedlm.training.scores import mean_states
from fedlm.training.sequences import Example
from fedlm.training.tasks import get_task
from fedlm.training.tasks.base import Held
from fedlm.training.tasks.group_preference import alignment, gathered, hits, predicted, predictor_of, with_states

CHOICES = ["bank", "school", "books", "bank "]


def of(model: Path, **more: Any) -> Recipe:
    columns = {"prompt": "p", "chosen": "c", "rejected": "r"}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "task": "group-preference",
            "model": {"source": str(model), "dtype": "float32", "device": "cpu"},
            "adapter": {"kind": "predictor", "width": 16, "layers": 2},
            "data": {"silos": [{"name": "a", "sources": [{"path": "rows.jsonl", "columns": columns}]}]},
            "training": {"steps": 1, "batch_size": 8},
            "group_preference": {"context": 3},
            **more,
        }
    )


def opinions(number: int) -> list[dict[str, Any]]:
    """Rows of two and of three answers."""
    draw = np.random.default_rng(0)
    rows = []
    for i in range(number):
        choices = ["bank", "school", "books"][: 2 + i % 2]
        question = " ".join(draw.choice(["was", "given", "money"], 4))
        rows.append(
            {"question": question, "choices": choices, "shares": draw.dirichlet(np.ones(len(choices))).tolist()}
        )
    return rows


def embedded(model: Any, examples: list[Example]) -> list[Example]:
    ids = [s.ids.tolist() for s in sequences_of(examples)]
    return with_states(examples, mean_states(model, ids, 512).astype(np.float32))


@pytest.fixture
def module() -> Predictor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Predictor(5, 16, 3, 4)


def test_who_attends_to_whom(module: Predictor) -> None:
    """A point's score depends on the context, in whatever order, and on itself; on y of the context alone."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 9, 5, generator=generator), torch.rand(2, 9, generator=generator)
    context = torch.arange(9).expand(2, 9) < 4
    scores = module(x, y, context)
    others, hidden = x.clone(), y.clone()
    others[:, 5:] = torch.randn(2, 4, 5, generator=generator)
    hidden[:, 4:] = 7.0
    torch.testing.assert_close(module(others, hidden, context)[:, :5], scores[:, :5], rtol=0, atol=1e-6)
    order = torch.tensor([2, 0, 3, 1, *range(4, 9)])
    torch.testing.assert_close(module(x[:, order], y[:, order], context), scores[:, order], rtol=0, atol=1e-6)
    for changed in (module(x, 1 - y, context), module(x.index_fill(1, torch.tensor(0), 0.0), y, context)):
        assert ((changed - scores).abs() > 1e-4).all()
    torch.testing.assert_close(module(x[0], y[0], context[0]), scores[0], rtol=0, atol=1e-6)
    alone = module(x, y, torch.zeros_like(context))  # no context: each point by itself
    torch.testing.assert_close(module(x[:, :1], y[:, :1], context[:, :1] & False), alone[:, :1], rtol=0, atol=1e-6)


def test_first_values_and_the_way_to_disk(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = of(tiny_model_dir)
    model = attach(load_base(recipe.model), recipe.adapter, recipe.seed)
    first, drawn = get_tensors(model), initial_tensors(recipe)
    assert first.keys() == drawn.keys() and all(torch.equal(first[name], drawn[name]) for name in first)
    assert all(name.startswith("predictor.") for name in first)
    assert (first["predictor.layers.0.norm1.weight"] == 1).all() and (first["predictor.score.bias"] == 0).all()
    assert 0.5 / 8 < first["predictor.x.weight"].abs().max() <= 1 / 8 and first["predictor.y.weight"].abs().max() > 0.5
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = load_base(recipe.model)(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, wanted)
    moved = {name: tensor + 0.1 for name, tensor in first.items()}
    save_adapter(tmp_path / "adapter", moved, recipe)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_model.safetensors",
        "predictor_config.json",
    ]
    back = load_adapter(tmp_path / "adapter", recipe.adapter)
    set_tensors(model, back, recipe.adapter)
    assert back.keys() == moved.keys() and all(torch.equal(t, moved[n]) for n, t in get_tensors(model).items())
    with pytest.raises(ModelError, match="a predictor is no change of the weights"):
        save_merged(tmp_path / "merged", moved, recipe)
    with pytest.raises(ModelError, match="has shape"):
        set_tensors(model, moved | {"predictor.score.bias": torch.zeros(2)}, recipe.adapter)
    with pytest.raises(ModelError, match="no predictor of preferences"):
        predictor_of(load_base(recipe.model))


def test_a_mean_state_is_that_of_the_text_alone(base: Any, tokenizer: Any) -> None:
    texts = ["the bank lent money to the school", "was", "the patient was given a dose"]
    ids = [tokenizer.encode(text) for text in texts]
    found = mean_states(base, [ids[0], [], *ids[1:]], 9)
    assert (found[1] == 0).all()
    for one, text in zip(found[[0, 2, 3]], ids, strict=True):
        with torch.no_grad():
            wanted = base.model(input_ids=torch.tensor([text])).last_hidden_state[0].mean(0)
        assert_allclose(one, wanted.numpy(), atol=2e-6)


def test_a_steps_loss_is_that_of_a_plain_loop(tiny_model_dir: Path, tokenizer: Any) -> None:
    """Squared errors of softmaxes over each question's own answers, all answers of a row on one side of the split."""
    recipe = of(tiny_model_dir)
    task = get_task("group-preference", recipe)
    model = attach(load_base(recipe.model), recipe.adapter, 0)
    data = encode_all(opinions(8), task, tokenizer, 96, silo="a")
    assert data.width == 3 and [len(data[i].sequences[2]) > 0 for i in range(8)] == [False, True] * 4
    examples = embedded(model, list(data))
    objective = task.objective(Tools(model, TrainingSpec(steps=1), key=(0, "a", 0)))
    seen = set()
    for _ in range(20):
        rest = objective.begin(examples)
        known = [e for e in examples if not any(e is other for other in rest)]
        seen.add(len(known))
        terms, divisor = objective.terms(rest)
        parts = [objective.terms(rest[:2]), objective.terms(rest[2:])]
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), terms, rtol=0, atol=1e-6)
        assert divisor == parts[0][1] == len(rest) == 8 - len(known)
    assert seen == {1, 2, 3}
    predictor, wanted = predictor_of(model), []
    shown = [(e.states[i], e.facts[f"share_{i}"]) for e in known for i in range(3) if len(e.sequences[i])]  # type: ignore[index]
    for example in rest:
        n = sum(len(s) > 0 for s in example.sequences)
        assert example.states is not None
        logits = []
        for i in range(n):
            x = torch.tensor(np.stack([*(state for state, _ in shown), example.states[i]]))
            y = torch.tensor([*(share for _, share in shown), 0.0])
            logits.append(predictor(x, y, torch.arange(len(x)) < len(shown))[-1])
        shares = torch.stack(logits).softmax(0)
        true = torch.tensor([example.facts[f"share_{i}"] for i in range(n)])
        wanted.append((shares - true).square().mean())
    torch.testing.assert_close(terms, torch.stack(wanted), rtol=0, atol=1e-6)
    assert objective.figures["accuracy"][1] > 0
    alone = objective.begin(examples[:1])  # the last batch of an epoch may be one row: there is nothing to show
    assert len(alone) == 1 and torch.isfinite(objective.terms(alone)[0]).all()


def test_what_is_measured(tiny_model_dir: Path, tokenizer: Any) -> None:
    """Every row from `context` others, so that the figures are those of single rows, in their order."""
    recipe = of(tiny_model_dir)
    task = get_task("group-preference", recipe)
    model = attach(load_base(recipe.model), recipe.adapter, 0)
    rows = opinions(7)
    held = Held(rows, model, tokenizer, 96, 512)
    found = task.measure(held)
    assert found == task.measure(held) and {n: c for n, (_, c) in found.figures.items()} == dict.fromkeys(
        ("loss", "accuracy", "alignment"), 7.0
    )
    order = numpy_generator(0, "context of held-out rows").permutation(7)
    examples = embedded(model, [e for row in rows for e in task.examples(row, tokenizer, 96)])
    for place in range(7):
        known = [examples[order[(place + 1 + j) % 7]] for j in range(3)]
        row = examples[order[place]]
        with torch.no_grad():
            shares = predicted(predictor_of(model), gathered(known), gathered([row]))[0].numpy()
        true = np.array(rows[order[place]]["shares"])
        assert found.items["nll"][order[place]] == pytest.approx(np.square(shares - true).mean(), abs=1e-6)
        assert found.items["choice"][order[place]] == float(shares.argmax() == true.argmax())
    assert sum(found.items["alignment"]) == pytest.approx(found.figures["alignment"][0])
    with pytest.raises(DataError, match="the group has 3 held-out rows, and a row is predicted from 3 others"):
        task.measure(Held(rows[:3], model, tokenizer, 96, 512))
    assert task.measure(Held(rows, model, tokenizer, 4, 512, skip=True)).figures["loss"] == (0.0, 0.0)


def test_figures() -> None:
    distance = pytest.importorskip("scipy.spatial.distance").jensenshannon
    draw = np.random.default_rng(0)
    p, q = draw.dirichlet(np.ones(4), 20), draw.dirichlet(np.ones(4), 20)
    p[0], q[0], p[1], q[1] = [1, 0, 0, 0], [0, 0, 1, 0], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]
    assert_allclose(alignment(p, q), [1 - distance(a, b, base=2) for a, b in zip(p, q, strict=True)], atol=1e-7)
    assert alignment(p, q)[:2].tolist() == [0.0, 1.0]
    true, real = np.array([[1.0, 0.0, 0.0]] * 4), np.array([[True, True, False]] * 4)
    found = np.array([[0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [0.4, 0.6, 0.0], [0.0, 0.0, 0.0]])
    assert hits(found, true, real).tolist() == [1.0, 0.5, 0.0, 0.5]
    assert hits(np.array([[0.2, 0.5, 0.3]]), np.array([[0.4, 0.4, 0.2]]), np.ones((1, 3), bool)).tolist() == [1.0]


def test_rows_that_make_a_group(tiny_model_dir: Path, tokenizer: Any) -> None:
    task = get_task("group-preference", of(tiny_model_dir))
    (pair,) = task.examples({"prompt": "which?", "chosen": "bank", "rejected": "school"}, tokenizer, 64)
    assert dict(pair.facts) == {"share_0": 1.0, "share_1": 0.0}
    row = {"question": "which?", "choices": CHOICES, "answer": 1, "row": "f:1", "hash": "h"}
    (choice,) = task.examples(row, tokenizer, 64)
    said = [tokenizer.decode(s.ids).split("assistant\n")[1].split("<")[0].strip() for s in choice.sequences]
    assert said == ["school", "bank", "books"] and list(choice.facts.values()) == [1.0, 0.0, 0.0]
    with pytest.raises(DataError, match=r"^f:1: every option of the row is the right one"):
        task.examples(row | {"choices": ["bank", "bank "], "answer": 0}, tokenizer, 64)
    with pytest.raises(DataError, match=r"^f:1: .*above `training.max_length` \(9\)"):
        task.examples(row, tokenizer, 9)
    with pytest.raises(DataError, match=r"^silo 'a': the group has 3 training rows, and 3 of them are a context"):
        encode_all(opinions(3), task, tokenizer, 96, silo="a")
    assert len(TokenSet.of(task.together([pair] * 4))) == 4
