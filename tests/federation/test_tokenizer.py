"""A tokenizer from summed counts of pairs: the merges of training on pooled text, and nothing but counts on the way."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedlm.federation.tokenizer
from fedlm.errors import DataError, ModelError, RunError, UpdateRefused
from fedlm.federation.api import run_recipe
from fedlm.federation.engines.local import LocalEngine
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.silo.pairs import PairTable, PairTables, texts_of
from fedlm.federation.tokenizer import Sums, Trained, train_tokenizer
from fedlm.messages import Engine, Failure, FailureKind, Fields, Reply, Request, Tensors
from fedlm.models.bpe import BYTES, Symbols, alphabet, make_tokenizer, word_counts
from fedlm.models.load import load_tokenizer
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from fedlm.recipe.starters import read_template
from tests.federation.own_silos import Network, data_file, greeting

SYLLABLES = [
    "the",
    "pa",
    "ti",
    "ent",
    "do",
    "se",
    "me",
    "di",
    "ban",
    "ana",
    "aaa",
    "sci",
    "ence",
    "ï",
    "東京",
    "'s",
    "12",
]


def texts(seed: int, rows: int = 60) -> list[str]:
    """Some words are in every silo, some in one."""
    draw, common = random.Random(seed), random.Random(99)
    words = ["".join(d.choices(SYLLABLES, k=d.randint(1, 4))) for d in [common] * 60 + [draw] * 40]
    return [" ".join(draw.choices(words, k=12)) for _ in range(rows)]


def centralised(found: Iterable[str], vocabulary: int, at_least: int = 2) -> list[list[str]]:
    """The merges that Hugging Face's trainer finds on text in one place."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=at_least,
        show_progress=False,
    )
    tokenizer.train_from_iterator(found, trainer)
    return [list(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def written(folder: Path) -> list[list[str]]:
    return [list(pair) for pair in json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Three silos with text of their own. Its model's tokenizer does not exist yet."""
    for number in range(3):
        rows = [json.dumps({"text": text}) + "\n" for text in texts(number)]
        (tmp_path / f"s{number}.jsonl").write_text("".join(rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "name: scratch\ntask: pretrain\n"
        "model: {source: 'preset:llama-1m', tokenizer: ./words, dtype: float32, device: cpu}\n"
        "adapter: {kind: full}\n"
        "data:\n  sources: [{path: s*.jsonl, columns: {text: text}}]\n  partition: {kind: iid, silos: 3}\n"
        "  split: {validation: 0.1, test: 0.1}\n"
        "training: {steps: 3, batch_size: 4, max_length: 32, lr: 3e-3}\n"
        "federation: {rounds: 1, workers: 1}\n"
    )
    return load_recipe(file)


def pooled(recipe: Recipe, base: Path) -> list[str]:
    from fedlm.data.federated import load_data

    data = load_data(recipe, base).pooled()
    return list(texts_of(data.train, data.kind))


def test_the_merges_are_those_of_pooled_text(recipe: Recipe, tmp_path: Path) -> None:
    """Until no pair occurs twice: most of the last merges are ties. As many tokens, and in the same places."""
    seen: list[dict[str, Any]] = []
    done = train_tokenizer(recipe, tmp_path / "words", vocabulary=1000, base=tmp_path, observe=seen.append)
    expected = centralised(pooled(recipe, tmp_path), 1000)
    assert len(expected) > 150
    assert written(tmp_path / "words") == expected
    assert done.tokens == 2 + BYTES + len({a + b for a, b in expected}) and len(done.merges) == len(expected)
    assert (
        done.bytes_up > 3 * 4 * BYTES * BYTES
        and done.bytes_down > 0
        and done.silos == ["silo-0000", "silo-0001", "silo-0002"]
    )
    assert done.requests < 3 * len(expected), "several merges in a request"
    assert seen[0]["done"] == 0 and seen[-1]["done"] > 150 and not (tmp_path / ".words.unfinished").exists()


def test_the_vocabulary_is_the_one_asked_for(recipe: Recipe, tmp_path: Path) -> None:
    train_tokenizer(recipe, tmp_path / "words", vocabulary=300, base=tmp_path)
    assert written(tmp_path / "words") == centralised(pooled(recipe, tmp_path), 300)
    assert len(load_tokenizer(recipe.model)) == 300


@pytest.mark.parametrize(
    ("letters", "words", "longest"), [("aab", 36, 9), ("abcd", 60, 8), ("abcdefghijklmnop", 40, 6)]
)
def test_random_words(letters: str, words: int, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one letter, ties everywhere, one merge a request or many: as a count from nothing after each merge."""
    for seed in range(15):
        draw = random.Random(seed)
        silos = [
            [" ".join("".join(draw.choices(letters, k=draw.randint(1, longest))) for _ in range(words // 3))]
            for _ in range(3)
        ]
        everything = [text for silo in silos for text in silo]
        expected = reference(word_counts(everything), 50)
        for at_once in (1, 64):
            monkeypatch.setattr(fedlm.federation.tokenizer, "PER_REQUEST", at_once)
            assert in_memory([PairTable(word_counts(silo)) for silo in silos], 50) == expected
        strings = Symbols(expected).strings
        pairs = [[strings[a], strings[b]] for a, b in expected]
        assert pairs == centralised(everything, 2 + BYTES + 50, at_least=1)
        assert len(set(strings)) == len(strings), "no two merges make one string"


def in_memory(tables: list[PairTable], most: int) -> list[tuple[int, int]]:
    """The coordinator's loop over these tables."""
    known, sums, merges = Symbols(), Sums(BYTES + most), list[tuple[int, int]]()
    rows, columns = list(range(BYTES)), list[int]()
    while len(known) < BYTES + most:
        for table in tables:
            table.follow(np.array(merges, np.int32).reshape(-1, 2))
        sums.put(
            {r: sum(table.row(r).astype(np.int64) for table in tables) for r in rows},
            {c: sum(table.column(c).astype(np.int64) for table in tables) for c in columns},
        )
        found = sums.certain(known, BYTES + most, 1)
        if not found:
            break
        merges += found
        rows, columns = fedlm.federation.tokenizer.lines_of(found, [known.add(*pair) for pair in found])
    return merges


def reference(words: dict[str, int], most: int) -> list[tuple[int, int]]:
    """Count all pairs anew for every merge; of equally frequent ones merge the smallest."""
    numbers = {letter: number for number, letter in enumerate(alphabet())}
    split = [([numbers[letter] for letter in word], count) for word, count in words.items()]
    known, merges = Symbols(), list[tuple[int, int]]()
    while len(known) < BYTES + most:
        counts: dict[tuple[int, int], int] = {}
        for symbols, count in split:
            for pair in pairwise(symbols):
                counts[pair] = counts.get(pair, 0) + count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        made = known.add(*best)
        merges.append(best)
        split = [(replaced(symbols, best, made), count) for symbols, count in split]
    return merges


def replaced(symbols: list[int], pair: tuple[int, int], made: int) -> list[int]:
    out: list[int] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] = made
        else:
            out.append(symbol)
    return out


def test_the_tokenizer_keeps_every_text(recipe: Recipe, tmp_path: Path) -> None:
    train_tokenizer(recipe, tmp_path / "words", vocabulary=320, base=tmp_path, chat_template="chatml")
    words = load_tokenizer(recipe.model, needs_template=True)
    for text in ("the patient's café", " \n\t 東京 🙂 ", "\x00\x7fé" + chr(0xE000), *texts(9, 3)):
        ids = words(text)["input_ids"]
        assert words.decode(ids) == text and max(ids) < 320
    assert words.convert_tokens_to_ids(["<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2, 3]
    assert (words.eos_token, words.pad_token) == ("<|im_end|>", "<|padding|>")
    rendered = words.apply_chat_template([{"role": "user", "content": "the bank"}], tokenize=False)
    assert words(rendered)["input_ids"][0] == 2
    assert make_tokenizer([]).eos_token == "<|endoftext|>"


def test_a_model_from_scratch_trains_on_it(recipe: Recipe, tmp_path: Path) -> None:
    """The whole way: tokenizer, preset, rounds. Before there is a tokenizer the model says which command makes one."""
    with pytest.raises(ModelError, match="write it with `fedlm tokenizer train`"):
        run_recipe(recipe, base=tmp_path, run_dir=tmp_path / "run")
    train_tokenizer(recipe, tmp_path / "words", vocabulary=320, base=tmp_path)
    result = run_recipe(recipe, base=tmp_path, run_dir=tmp_path / "run")
    assert result.status == "finished"
    losses = [
        json.loads(line)["validation"]["loss"] for line in (result.path / "rounds.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]


class Watched:
    """An engine that notes what travels, and fails from a request on."""

    def __init__(self, inner: Engine, fails_at: int | None = None, kind: FailureKind = FailureKind.ERROR) -> None:
        self._inner, self._fails_at, self._kind = inner, fails_at, kind
        self.requests: list[Request] = []
        self.replies: list[Reply] = []

    def silos(self) -> Any:
        return self._inner.silos()

    def exchange(self, requests: Iterable[Request], deadline: float | None = None, stop: Any = None) -> Iterator[Any]:
        for request in requests:
            self.requests.append(request)
            if self._fails_at is not None and len(self.requests) == self._fails_at:
                yield Failure(request.silo, self._kind, "it broke")
                continue
            for answer in self._inner.exchange([request], deadline, stop):
                if isinstance(answer, Reply):
                    self.replies.append(answer)
                yield answer

    def close(self) -> None:
        self._inner.close()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a `Watched` around the local engine."""
    made: list[Watched] = []

    def start(**how: Any) -> list[Watched]:
        def engine(*arguments: Any, **named: Any) -> Watched:
            made.append(Watched(LocalEngine(*arguments, **named), **how))
            return made[-1]

        monkeypatch.setattr("fedlm.federation.engines.local.LocalEngine", engine)
        return made

    return start


def test_nothing_but_counts_leaves_a_silo(recipe: Recipe, tmp_path: Path, watch: Any) -> None:
    made = watch()
    train_tokenizer(recipe, tmp_path / "words", vocabulary=300, base=tmp_path)
    (engine,) = made
    answers = [reply for reply in engine.replies if reply.verb == "pairs"]
    assert len(answers) > 6
    for reply in answers:
        assert reply.fields.keys() == {"received_bytes", "sent_bytes"}
        assert reply.tensors.keys() == {"rows", "columns"}
        assert all(tensor.dtype is torch.int32 for tensor in reply.tensors.values())
    first = {reply.silo: reply for reply in answers[:3]}
    assert all(reply.tensors["rows"].shape == (BYTES, BYTES) for reply in first.values())
    assert all(request.fields == {} for request in engine.requests if request.verb == "pairs")


def test_a_stopped_call_goes_on_and_restarted_silos_catch_up(recipe: Recipe, tmp_path: Path, watch: Any) -> None:
    """A silo fails in the middle: a sentence that names it. The next call has new processes, and the same merges."""
    train_tokenizer(recipe, tmp_path / "whole", vocabulary=400, base=tmp_path)
    made = watch(fails_at=60)
    with pytest.raises(RunError, match=r"counts of every silo, and silo-000\d sends none: it broke"):
        train_tokenizer(recipe, tmp_path / "words", vocabulary=400, base=tmp_path)
    kept = json.loads((tmp_path / ".words.unfinished" / "merges.json").read_text())["merges"]
    assert 5 < len(kept) < 140
    with pytest.raises(RunError, match="of other text, silos or settings"):
        train_tokenizer(recipe, tmp_path / "words", vocabulary=401, base=tmp_path)
    made = watch()
    train_tokenizer(recipe, tmp_path / "words", vocabulary=400, base=tmp_path)
    assert written(tmp_path / "words") == written(tmp_path / "whole")
    first = next(request for request in made[-1].requests if request.verb == "pairs")
    assert first.tensors["merges"].tolist() == kept, "nothing is learnt twice"


def test_a_silo_that_was_out_of_reach_is_asked_again(recipe: Recipe, tmp_path: Path, watch: Any) -> None:
    train_tokenizer(recipe, tmp_path / "whole", vocabulary=300, base=tmp_path)
    watch(fails_at=20, kind=FailureKind.UNREACHABLE)
    train_tokenizer(recipe, tmp_path / "words", vocabulary=300, base=tmp_path)
    assert written(tmp_path / "words") == written(tmp_path / "whole")


def asked(merges: Any = (), rows: Any = (), columns: Any = ()) -> Tensors:
    return {
        "merges": torch.tensor(merges, dtype=torch.int32).reshape(-1, 2),
        "rows": torch.tensor(rows, dtype=torch.int32),
        "columns": torch.tensor(columns, dtype=torch.int32),
    }


def test_answers_depend_on_rows_and_request_alone() -> None:
    """A repeat, a silo that lost its place, another order of requests: the same counts."""
    rows = [{"text": text} for text in texts(0)]
    merges = [(a, b) for a, b in in_memory([PairTable(word_counts(texts(0)))], 30)]
    steady, forgetful = PairTables(), PairTables()
    for count in (0, 5, 5, 30, 12, 30):
        request = asked(merges[:count], [3, 70, 72], [70])
        ours = steady.answer("a", rows, "text", request)
        steady.answer("b", rows, "text", asked(merges[: count // 2]))
        theirs = (forgetful if count == 12 else PairTables()).answer("a", rows, "text", request)
        assert torch.equal(ours["rows"], theirs["rows"]) and torch.equal(ours["columns"], theirs["columns"])
        assert ours["rows"].shape == (3, BYTES + count)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "holds int32 `merges`, `rows` and `columns`"),
        ({**asked(), "rows": torch.zeros(1)}, "holds int32"),
        ({**asked(), "merges": torch.zeros(4, dtype=torch.int32)}, r"must be \[m, 2\]"),
        (asked([(0, BYTES)]), "merges symbols that there are not"),
        (asked([(-1, 4)]), "merges symbols that there are not"),
        (asked(rows=[BYTES]), "names a line that there is not"),
        (asked(columns=[-1]), "names a line that there is not"),
        (asked(rows=[4, 4]), "name a line once"),
    ],
)
def test_requests_that_are_none(request_: Tensors, words: str) -> None:
    with pytest.raises(DataError, match=words):
        PairTables().answer("a", [{"text": "a text"}], "text", request_)


def test_tables_that_are_not_in_use_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlm.federation.silo.pairs.HELD", 10)
    tables, rows = PairTables(), [{"text": text} for text in texts(0, 3)]
    for name in "abc":
        tables.answer(name, rows, "text", asked())
    assert list(tables._held) == ["c"]


def test_a_count_that_does_not_fit_is_refused() -> None:
    table = PairTable({"ab": 2**31})
    with pytest.raises(DataError, match="more than 2147483647 times"):
        table.row(table.known.strings.index("a"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": torch.zeros(1, 4, dtype=torch.int32)}, "no counts 'rows' of shape"),
        ({"rows": torch.full((BYTES, BYTES), -1, dtype=torch.int32)}, "negative"),
        ({"columns": torch.zeros(0, BYTES)}, "no counts 'columns'"),
    ],
)
def test_replies_that_are_none(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Tensors, words: str
) -> None:
    honest = PairTables.answer
    monkeypatch.setattr(PairTables, "answer", lambda *given: {**honest(*given), **change})
    with pytest.raises(UpdateRefused, match=words):
        train_tokenizer(recipe, tmp_path / "words", vocabulary=300, base=tmp_path)


def test_counts_that_contradict_the_merges() -> None:
    """A silo that goes on counting a merged pair does not make the tokenizer loop."""
    sums, known = Sums(BYTES + 9), Symbols()
    line = np.zeros(BYTES, np.int64)
    line[70] = 5
    sums.put({69: line}, {})
    assert sums.certain(known, BYTES + 9, 2) == [(69, 70)]
    sums.put({69: line}, {})
    with pytest.raises(RunError, match="some silo says that a pair occurs which is merged"):
        sums.certain(known, BYTES + 9, 2)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"vocabulary": 258}, "258 tokens is not between 259"),
        ({"vocabulary": 300_000}, "and 32768"),
        ({"silos": ["silo-0009"]}, "there is no silo 'silo-0009'"),
        ({"chat_template": "no.jinja"}, "cannot be read"),
    ],
)
def test_what_cannot_be(recipe: Recipe, tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises((ModelError, RunError), match=words):
        train_tokenizer(recipe, tmp_path / "words", base=tmp_path, **more)


def test_a_folder_that_holds_something_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not empty"):
        train_tokenizer(recipe, tmp_path, base=tmp_path)


@pytest.mark.slow
def test_two_thousand_merges_of_real_speeches(tmp_path: Path) -> None:
    """43 presidents' speeches, a silo each: 2,048 merges equal those on pooled text, ties included."""
    file = tmp_path / "recipe.yaml"
    file.write_text(read_template("pretrain"))
    every = ["data.partition.min_rows=1", "data.partition.max_silos=null", "data.split={validation: 0.0, test: 0.0}"]
    recipe = load_recipe(file, every)
    done = train_tokenizer(recipe, tmp_path / "words", vocabulary=2 + BYTES + 2048, base=tmp_path)
    assert len(done.silos) == 43 and len(done.merges) >= 2048
    assert written(tmp_path / "words") == centralised(pooled(recipe, tmp_path), 2 + BYTES + 2048)


# ---------------------------------------------------------------- organisations


@pytest.fixture
def owners(tmp_path: Path) -> Any:
    """Real silos with the simulation's shares; `policy` is what their owners allow."""

    def make(policy: str) -> dict[str, OwnSilo]:
        found = {}
        for number in range(3):
            name = f"silo-{number:04d}"
            rules = tmp_path / f"{name}.yaml"
            rules.write_text(policy)
            text = data_file(tmp_path / name, f"share_of_recipe: true\nbase: {tmp_path}\n")
            found[name] = OwnSilo(name, tmp_path / "states", text, rules)
        return found

    return make


ALLOWED = "allow: [hello, pairs]\n"


def through(recipe: Recipe, silos: dict[str, OwnSilo]) -> list[tuple[int, int]]:
    result = Trained(Path(), [], 0, sorted(silos))
    progress = fedlm.federation.tokenizer._Progress(Path("/dev/null"), {}, "run")
    progress.save = lambda: None  # type: ignore[method-assign]
    network: Any = Network(recipe, silos)
    counting = fedlm.federation.tokenizer.Counting(network, recipe, "run", sorted(silos), result)
    counting.greet()
    fedlm.federation.tokenizer._learn(counting, progress, 298, 2, None)
    return progress.merges


def test_organisations_give_the_same_merges(recipe: Recipe, tmp_path: Path, owners: Any) -> None:
    """Without any model, and with workers that are started anew after the greeting."""
    train_tokenizer(recipe, tmp_path / "words", vocabulary=300, base=tmp_path)
    merges = through(recipe, owners(ALLOWED))
    strings = Symbols(merges).strings
    assert [[strings[a], strings[b]] for a, b in merges] == written(tmp_path / "words")
    again = owners(ALLOWED)["silo-0000"].handle(Request("silo-0000", "pairs", "run", -1, 0, asked(merges, [7])))
    assert isinstance(again, Reply) and again.tensors["rows"].shape == (1, BYTES + len(merges))


def test_an_owner_must_allow_it(recipe: Recipe, owners: Any) -> None:
    with pytest.raises(RunError, match=r"silo-0000 sends none: the verb 'pairs' is not allowed here"):
        through(recipe, owners("min_rows: 1\n"))
    with pytest.raises(RunError, match=r"does not allow the task 'pretrain'"):
        through(recipe, owners(ALLOWED + "tasks: [instruct]\n"))
    with pytest.raises(RunError, match=r"fewer training rows"):
        through(recipe, owners(ALLOWED + "min_rows: 500\n"))


def test_counting_is_all_that_was_agreed_to(recipe: Recipe, owners: Any) -> None:
    silo = owners("allow: [hello, pairs, train, evaluate]\nadapters: [full]\n")["silo-0000"]
    fields: Fields = {**greeting(recipe), "purpose": "tokenizer"}
    assert isinstance(silo.handle(Request("silo-0000", "hello", "run", -1, 0, {}, fields)), Reply)
    assert isinstance(silo.handle(Request("silo-0000", "pairs", "run", -1, 0, asked())), Reply)
    refused = silo.handle(Request("silo-0000", "train", "run", 0, 0, {}, {"round": 0, "rounds": 1, "accepted": -1}))
    assert isinstance(refused, Failure) and "not what this silo has agreed to" in refused.reason
    broken = silo.handle(Request("silo-0000", "pairs", "run", -1, 0, asked(rows=[999])))
    assert isinstance(broken, Failure) and "names a line that there is not" in broken.reason
