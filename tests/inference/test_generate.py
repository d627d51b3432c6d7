"""Generated text against transformers' own `generate`, and the sampling rule by numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlm.errors import ModelError
from fedlm.inference.generate import Sampling, choose, encode_prompt, stop_ids, stream
from fedlm.models.load import load_base, load_tokenizer
from tests.models.helpers import spec

MESSAGES = [{"role": "user", "content": "the bank lent"}]


@pytest.mark.parametrize("prompt", ["the patient", MESSAGES])
def test_greedy_text_is_transformers_own(tiny_model_dir: Path, prompt: object) -> None:
    model, tokenizer = load_base(spec(tiny_model_dir)), load_tokenizer(spec(tiny_model_dir))
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    expected = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    pieces = list(stream(model, tokenizer, prompt, Sampling(40)))
    assert "".join(pieces) == expected
    assert len(pieces) > 5, "it streams"


def test_a_stop_token_ends_the_text_and_is_not_shown(tiny_model_dir: Path) -> None:
    model, tokenizer = load_base(spec(tiny_model_dir)), load_tokenizer(spec(tiny_model_dir))
    assert stop_ids(model, tokenizer) == {2}
    model.generation_config.eos_token_id = [2, 5]
    assert stop_ids(model, tokenizer) == {2, 5}
    ids = encode_prompt(tokenizer, MESSAGES)
    with torch.no_grad():
        first = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = first
    assert not list(stream(model, tokenizer, MESSAGES, Sampling(40)))


def test_characters_are_shown_whole(tiny_model_dir: Path) -> None:
    """A model that says the four bytes of one character, one token each, shows them in one piece."""
    tokenizer = load_tokenizer(spec(tiny_model_dir))
    said = tokenizer("😀!", add_special_tokens=False)["input_ids"]
    assert len(said) == 5

    class Parrot(torch.nn.Module):
        config = generation_config = type("C", (), {"max_position_embeddings": 99, "eos_token_id": 2})
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, **_: object) -> object:
            logits = torch.zeros(1, 1, 512)
            logits[0, 0, [*said, 2][self.calls]] = 1
            self.calls += 1
            return type("O", (), {"logits": logits, "past_key_values": None})

    assert list(stream(Parrot(), tokenizer, "a", Sampling(10))) == ["😀", "!"]
    assert "".join(stream(Parrot(), tokenizer, "a", Sampling(2))) == "\ufffd", "cut short, what is there is shown"


def test_sampling_follows_temperature_and_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(sampling: Sampling) -> list[float]:
        drawn = torch.tensor([choose(logits, sampling, generator) for _ in range(4000)])
        return (torch.bincount(drawn, minlength=4) / 4000).tolist()

    assert shares(Sampling(temperature=1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(Sampling(temperature=0.5)) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.03)
    # mass before the third token is exactly 0.8, so 0.79 keeps two and 0.81 three
    assert shares(Sampling(temperature=1.0, top_p=0.79)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(Sampling(temperature=1.0, top_p=0.81)) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.03)
    assert shares(Sampling(temperature=1.0, top_p=0.01)) == [1, 0, 0, 0]
    assert shares(Sampling(temperature=0.0)) == [1, 0, 0, 0]


def test_the_seed_decides_and_the_global_generator_is_left_alone(tiny_model_dir: Path) -> None:
    model, tokenizer = load_base(spec(tiny_model_dir)), load_tokenizer(spec(tiny_model_dir))
    state = torch.get_rng_state()
    texts = ["".join(stream(model, tokenizer, MESSAGES, Sampling(20, 1.0, seed=s))) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_context_is_a_limit(tiny_model_dir: Path) -> None:
    model, tokenizer = load_base(spec(tiny_model_dir)), load_tokenizer(spec(tiny_model_dir))
    with pytest.raises(ModelError, match="model's context is 256"):
        list(stream(model, tokenizer, "bank " * 300, Sampling()))
    with pytest.raises(ModelError, match="empty"):
        list(stream(model, tokenizer, "", Sampling()))
    ids = encode_prompt(tokenizer, "bank " * 50)
    made = "".join(stream(model, tokenizer, "bank " * 50, Sampling(10_000)))
    assert len(tokenizer(made)["input_ids"]) <= 256 - len(ids) + 20


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_impossible_sampling(bad: dict[str, float]) -> None:
    with pytest.raises(ModelError):
        Sampling(**bad)
