"""Selection of rows over encoded examples: scores against plain forward passes, injected wrong answers, groups."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlm.errors import DataError
from fedlm.training.encode import encode_all
from fedlm.training.selection.alignment import alignment, answer_opening, best, responses, stage
from fedlm.training.selection.representatives import centroids_of, choose, features, groups_of, nearest_rows
from fedlm.training.tasks import get_task

ASKED = ["patient", "dose", "medicine", "bank", "money", "school", "science", "books", "lent", "given"]
ANSWERS = dict(zip(ASKED, ASKED[3:] + ASKED[:3], strict=True))


def row(asked: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"question {asked}"}, {"role": "assistant", "content": f"{answer} {answer}"}]
    return {"messages": turns, "row": "rows:1"}


@pytest.fixture(scope="module")
def learnt(tiny_model_dir: Path) -> tuple[Any, Any]:
    """The tiny model, trained until it knows which word answers which, and which words are answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedlm.training.attention import packed
    from fedlm.training.forward import target_nll
    from fedlm.training.packing import pack

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="sdpa")
    rows = [row(asked, answer) for asked, answer in ANSWERS.items()]
    tokens = encode_all(rows, get_task("instruct"), tokenizer, 64)
    asked = [example.sequences[0] for example in tokens]
    opening = answer_opening(tokenizer)
    batch = pack([*asked, *(turn for sequence in asked for turn in responses(sequence, opening))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with packed(model):
        for _ in range(120):
            loss = target_nll(model, batch).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        known = target_nll(model, pack(asked)).mean()
    assert float(known.detach()) < 0.1
    return model.eval(), tokenizer


def test_the_score_is_what_the_instruction_gains_per_response_token(learnt: tuple[Any, Any]) -> None:
    model, tokenizer = learnt
    turns = [("user", "question bank"), ("assistant", "the money"), ("user", "and books"), ("assistant", "lent")]
    several = {"messages": [{"role": role, "content": text} for role, text in turns]}
    tokens = encode_all([row("dose", "money"), several, row("bank", "bank")], get_task("instruct"), tokenizer, 64)
    opening = answer_opening(tokenizer)
    assert tokenizer.decode(opening) == "<|im_start|>assistant\n"

    def nll(ids: list[int], targets: list[int]) -> float:
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return -sum(float(logprobs[t - 1, ids[t]]) for t in targets)

    for batch_tokens, packing in ((1, True), (4096, True), (64, False)):
        scores = alignment(model, tokenizer, tokens, batch_tokens=batch_tokens, packing=packing)
        for score, example in zip(scores, tokens, strict=True):
            (sequence,) = example.sequences
            given = nll(sequence.ids.tolist(), np.flatnonzero(sequence.loss).tolist())
            alone = sum(
                nll(turn.ids.tolist(), np.flatnonzero(turn.loss).tolist()) for turn in responses(sequence, opening)
            )
            assert score == pytest.approx((alone - given) / sequence.targets, abs=1e-4)


def test_answers_to_other_questions_are_dropped(learnt: tuple[Any, Any]) -> None:
    """A fifth of 100 rows get the answer of another row; keeping 80 % drops all of them."""
    model, tokenizer = learnt
    draw = random.Random(0)
    asked = [draw.choice(ASKED) for _ in range(100)]
    wrong = set(draw.sample(range(100), 20))
    answers = [
        ANSWERS[word] if i not in wrong else draw.choice([a for a in ASKED if a != ANSWERS[word]])
        for i, word in enumerate(asked)
    ]
    tokens = encode_all(map(row, asked, answers), get_task("instruct"), tokenizer, 64)
    scores = alignment(model, tokenizer, tokens, batch_tokens=4096)
    assert set(range(100)) - set(best(scores, 0.8, None).tolist()) == wrong
    assert set(np.flatnonzero(scores < 0).tolist()) == wrong  # the wrong instruction even hinders
    assert set(best(scores, 1.0, 0.0).tolist()) == set(range(100)) - wrong


def test_kept_rows_and_stages() -> None:
    scores = np.array([0.5, -1.0, 2.0, 0.5, 3.0, 0.0, 1.0])
    assert best(scores, 0.5, None).tolist() == [0, 2, 4, 6]  # of the two 0.5 the earlier
    assert best(scores, 0.01, None).tolist() == [4]
    assert best(scores, 1.0, 0.5).tolist() == [0, 2, 3, 4, 6]
    with pytest.raises(DataError, match="none of the 7 training rows"):
        best(scores, 1.0, 9.0)
    parts = [stage(scores, 3, round_, 7) for round_ in range(7)]
    assert [p.tolist() for p in parts] == [[2, 4]] * 3 + [[0, 6]] * 2 + [[1, 3, 5]] * 2
    assert sorted(np.concatenate([parts[0], parts[3], parts[5]]).tolist()) == list(range(7))  # every row once
    few = [stage(scores[:2], 3, round_, 3).tolist() for round_ in range(3)]
    assert few == [[0], [0], [1]]  # never an empty stage


def test_a_subset_counts_what_it_leaves_out(learnt: tuple[Any, Any]) -> None:
    _, tokenizer = learnt
    rows = [row(asked, answer) for asked, answer in ANSWERS.items()]
    tokens = encode_all(rows, get_task("instruct"), tokenizer, 64)
    part = tokens.subset(np.array([7, 2]))
    assert (len(part), part.left_out) == (2, 8)
    assert part[0].sequences[0].ids.tolist() == tokens[7].sequences[0].ids.tolist()
    assert part.subset(np.array([1])).left_out == 9


def test_features_are_the_last_tokens_states_of_every_layer(learnt: tuple[Any, Any]) -> None:
    model, tokenizer = learnt
    rows = [row(asked, f"{answer} of the school") for asked, answer in ANSWERS.items()]
    rows += [row("bank", "money"), row("bank and the dose of medicine", "money")]
    tokens = encode_all(rows, get_task("instruct"), tokenizer, 64)
    points = features(model, tokens, 6, seed=1, batch_tokens=4096)
    assert points.shape == (12, 6)
    assert np.allclose(points, features(model, tokens, 6, seed=1, batch_tokens=1), atol=1e-6)  # padding changes nothing
    assert not np.allclose(points, features(model, tokens, 6, seed=2, batch_tokens=1), atol=1e-2)
    wide = features(model, tokens, 4000, seed=1, batch_tokens=4096)
    with torch.no_grad():
        states = [
            torch.stack(model(torch.tensor([e.sequences[0].ids.tolist()]), output_hidden_states=True).hidden_states)
            for e in tokens
        ]
    whole = torch.stack([torch.nn.functional.normalize(s[:, 0, -1], dim=1).flatten() for s in states]).double().numpy()
    for i, j in ((0, 1), (2, 9), (10, 11)):  # a wide projection keeps distances, here within 5 %
        true = np.linalg.norm(whole[i] - whole[j]) / 3**0.5
        assert np.linalg.norm(wide[i] - wide[j]) == pytest.approx(true, rel=0.05)


def _blobs(centres: list[tuple[float, float]], each: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.normal(centre, 0.05, (each, 2)) for centre in centres])


def test_groups_of_like_rows_over_silos() -> None:
    """Silo a holds topics 0, 1, 2, silo b topics 1, 2, 3, c topics 0 and 3: four rows stand for all 160."""
    pytest.importorskip("sklearn")
    places = [(0.0, 0.0), (5.0, 0.0), (0.0, 5.0), (5.0, 5.0)]
    points = {
        "a": _blobs(places[:3], 20, 0),
        "b": _blobs(places[1:], 20, 1),
        "c": _blobs([places[0], places[3]], 20, 2),
    }
    groups = {silo: groups_of(p, 5) for silo, p in points.items()}
    assert {silo: len(found) for silo, found in groups.items()} == {"a": 3, "b": 3, "c": 2}
    centroids = {silo: centroids_of(points[silo], groups[silo]) for silo in points}
    chosen = choose(centroids)
    rows = np.concatenate([points[s][nearest_rows(points[s], groups[s], chosen[s])] for s in points if chosen[s]])
    assert len(rows) == 4
    for place in places:  # each topic once
        assert (np.linalg.norm(rows - place, axis=1) < 0.3).sum() == 1
    again = choose(dict(reversed(centroids.items())))
    assert again == chosen


def test_groups_where_there_are_few_rows_or_none_alike() -> None:
    pytest.importorskip("sklearn")
    few = groups_of(np.arange(8.0).reshape(4, 2), 5)
    assert [g.tolist() for g in few] == [[0, 1, 2, 3]]
    alone = {"a": np.array([[0.0, 0.0]]), "b": np.array([[9.0, 9.0]])}
    assert choose(alone) == {"a": [0], "b": [0]}  # too few to compare: each stands for itself
    apart = {f"s{i}": np.array([[0.0, i * 1e-3], [9.0, i * 1e-3]]) for i in range(4)} | {"z": np.array([[50.0, 90.0]])}
    chosen = choose(apart)
    assert chosen["z"] == [0] and sum(map(len, chosen.values())) == 3
