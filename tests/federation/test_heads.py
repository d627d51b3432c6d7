"""Heads, and label words in their place, through whole federations: every method that says it can, on every kind of
engine, resumed."""

from __future__ import annotations

import json
import random
from contextlib import closing
from pathlib import Path

import pytest
import torch

from fedlm.data.federated import load_data
from fedlm.errors import DataError, ModelError, RecipeError, RunError
from fedlm.evaluation.win_rate import win_rate
from fedlm.federation.api import about, new_run
from fedlm.federation.coordinator import run
from fedlm.federation.engines.local import LocalEngine
from fedlm.federation.rundir import RunDir
from fedlm.inference.session import open_chat
from fedlm.models.heads import HEAD
from fedlm.recipe.load import load_recipe
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import Recipe
from fedlm.training.reward_model import load_reward
from tests.algorithms.observed import federate, final
from tests.cli.test_models import fedlm
from tests.federation.test_engines import flare

TOPICS = {"health": ["patient", "dose", "medicine"], "money": ["bank", "lent"], "school": ["science", "books"]}
FILLER = ["was", "given", "and", "to", "the"]

RECIPE = """
name: heads
task: {task}
model: {{source: {model}, dtype: float32, device: cpu}}
adapter: {{rank: 2}}
data:
  sources: [{{path: rows.jsonl, columns: {columns}}}]
  partition: {{kind: natural, by: site}}
  split: {{validation: 0.2, test: 0}}
training: {{steps: 6, batch_size: 4, max_length: 64, lr: 0.01}}
federation: {{rounds: 2, workers: 1}}
"""
COLUMNS = {
    "classify": "{question: text, choices: [health, money, school], answer: topic}",
    "label-words": "{question: text, choices: [health, money, school], answer: topic}",
    "reward": "{prompt: text, chosen: good, rejected: bad}",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Texts of three topics in two silos, one of which has a single topic."""
    folder = tmp_path_factory.mktemp("heads")
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(60):
            topic = "health" if i % 3 == 0 else draw.choice(list(TOPICS))
            words = [draw.choice(TOPICS[topic]), *draw.choices(FILLER, k=4)]
            draw.shuffle(words)
            other = draw.choice([t for t in TOPICS if t != topic])
            row = {"text": " ".join(words), "topic": topic, "site": "a" if i % 3 == 0 else "b"}
            row |= {"good": f"the {draw.choice(TOPICS[topic])}", "bad": f"to {draw.choice(TOPICS[other])}"}
            file.write(json.dumps(row) + "\n")
    for task, columns in COLUMNS.items():
        (folder / f"{task}.yaml").write_text(RECIPE.format(model=tiny_model_dir, task=task, columns=columns))
    return folder


def recipe(base: Path, task: str = "classify", *changes: str) -> Recipe:
    return load_recipe(base / f"{task}.yaml", changes)


def locally(of: Recipe, base: Path, folder: Path) -> RunDir:
    """A finished run on the local engine."""
    data = load_data(of, base)
    with (
        closing(new_run(of, folder, base=base, **about(data))) as directory,
        closing(LocalEngine(of, data, folder, base=base)) as engine,
    ):
        assert run(of, engine, directory).status == "finished"
    return RunDir.open(folder, write=False)


OPTIONS = {
    "fedadam": ["federation.algorithm.server_lr=0.01"],
    "fedyogi": ["federation.algorithm.server_lr=0.01"],
    "fedadagrad": ["federation.algorithm.server_lr=0.01"],
    "fedmezo": ["training.lr=1e-4", "training.steps=30"],
    "fedavgm": ["federation.algorithm.server_lr=0.2"],
    "fedbiscuit": ["federation.rounds=4"],
    "feddyn": ["federation.algorithm.dyn_alpha=1.0"],
    "ties": ["federation.algorithm.density=0.5"],
    "fedbuff": ["federation.algorithm.buffer=2", "federation.rounds=3"],
    "fedasync": ["federation.rounds=4", "training.lr=1e-3"],
    "fltrust": ["data.partition={kind: iid, silos: 3}", "federation.algorithm.root=silo-0000"],
    "rfa": ["data.partition={kind: iid, silos: 3}"],  # of two silos the heavier one is all of it
    "krum": ["training.lr=3e-3"],  # it keeps one silo's update of three, and few rows are learnt by heart
    "multi-krum": ["training.lr=3e-3"],
    "flame": ["federation.algorithm.noise=0"],
}


@pytest.mark.parametrize("name", sorted(name for name, method in ALGORITHMS.items() if method.heads))
def test_every_method_that_takes_heads_trains_them(base: Path, tmp_path: Path, name: str) -> None:
    method, more = ALGORITHMS[name], OPTIONS.get(name, [])
    if method.withstands is not None:  # as many silos as the rule needs
        silos = method.withstands[1]
        alike = [f"data.partition={{kind: iid, silos: {silos}}}"] if silos > 2 else []
        more = [*more, "federation.algorithm.byzantine=0", *alike]
    of = recipe(base, "classify", f"federation.algorithm.name={name}", *more)
    if ALGORITHMS[name].asynchronous:
        directory = locally(of, base, tmp_path / "run")
    else:
        _, directory = federate(of, base, tmp_path / "run")
    ended = final(directory)
    heads = {n: value for n, value in ended.items() if n.endswith(HEAD)}
    assert len(heads) == (2 if name in ("ifca", "fedbiscuit") else 1)
    assert any(value.abs().max() > 1e-4 for value in heads.values())
    told = [line["validation"] for line in directory.rounds()]
    slow = 0.02 if name in ("fedasync", "fedmezo") else 0.0  # a few steps of these only move it
    assert told[-1]["loss"] - slow < told[0]["loss"] == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-6)
    assert {"accuracy", "accuracy_interval", "macro_f1"} <= told[-1].keys() and "perplexity" not in told[-1]


@pytest.mark.parametrize("adapter", ["lora", "ia3", "full"])
def test_the_new_head_is_the_mean_of_the_silos(base: Path, tmp_path: Path, adapter: str) -> None:
    rate = "training.lr=1e-3" if adapter == "full" else "training.lr=0.01"
    engine, directory = federate(recipe(base, "classify", f"adapter={{kind: {adapter}}}", rate), base, tmp_path / "run")
    updates, weights = engine.updates[0], engine.weights[0]
    mean = sum(weights[s] * updates[s][HEAD].double() for s in updates) / sum(weights.values())
    torch.testing.assert_close(engine.tensors[0][HEAD].double(), mean, atol=1e-7, rtol=0)
    assert len(updates) == 2 and updates["a"][HEAD].abs().max() > 0
    if adapter != "full":
        assert (directory.path / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("classify", ["guards=[{name: int8}]", "training.keep_optimizer=true"]),
        (
            "reward",
            ["federation.downlink={send: changed}", "guards=[{name: topk, density: 0.3}]"],
        ),
        ("label-words", []),
    ],
)
def test_the_same_bits_over_a_network_and_resumed(base: Path, tmp_path: Path, task: str, changes: list[str]) -> None:
    of = recipe(base, task, "federation.rounds=3", *changes)
    data = load_data(of, base)
    here = locally(of, base, tmp_path / "here")
    _, resumed = federate(of, base, tmp_path / "resumed", interrupt=2)
    with (
        closing(new_run(of, tmp_path / "there", base=base, **about(data))) as directory,
        flare(of, data, base, tmp_path / "there", lambda _: None) as engine,
    ):
        assert run(of, engine, directory).status == "finished"
    there = RunDir.open(tmp_path / "there", write=False)
    wanted = final(here)
    for other in (final(there), final(resumed)):
        assert other.keys() == wanted.keys() and all(torch.equal(other[n], value) for n, value in wanted.items())
    figures = [line["validation"] for line in here.rounds()]
    assert figures == [line["validation"] for line in there.rounds()]
    assert figures[-1]["loss"] < figures[0]["loss"] - 0.1
    if task == "reward":
        assert figures[-1]["reward_accuracy"] > 0.6 and figures[-1]["reward_margin"] > 0
        assert figures[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)


def test_silos_that_train_a_part_train_the_head_too(base: Path, tmp_path: Path) -> None:
    of = recipe(base, "classify", "federation.capacity={dealt: [{targets: [q_proj]}, {layers: 1}]}")
    engine, _ = federate(of, base, tmp_path / "run")
    for update in engine.updates[0].values():
        assert HEAD in update and update[HEAD].abs().max() > 0
    assert all(".q_proj." in n or n == HEAD for n in engine.updates[0]["a"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["federation.algorithm.name=fedit"], "'fedit' is a rule for the parameters of an adapter by their kind"),
        (["federation.algorithm.weights=tokens"], "has no target tokens"),
        (["federation.capacity={default: {memory: 2GB}}"], "memory is planned for tasks that predict tokens"),
        (["evaluation.metrics=[loss, choice]"], "'choice' is no figure of the task 'classify'"),
        (["reward.center=0.1"], "reward.center.*has no effect with task 'classify'"),
        (["classify.labels=[health, money]"], "'school' is none of the classes"),
        (["classify.labels=[health]"], "there is only one class, 'health'"),
        (["classify.labels=[health, money, school, money]"], "'money' is named twice"),
        (["task=instruct", "classify.labels=[a, b]"], "classify.labels.*has no effect with task 'instruct'"),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_read(base: Path, changes: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(base, "classify", *changes)


@pytest.mark.parametrize(
    ("choices", "words"),
    [("options", "needs the same classes for all rows"), ("['{text}', money]", "needs the same classes for all rows")],
)
def test_classes_are_the_recipes(base: Path, tmp_path: Path, choices: str, words: str) -> None:
    text = (base / "classify.yaml").read_text().replace("[health, money, school]", choices)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_recipe(tmp_path / "recipe.yaml")
    at_silos = text[: text.index("  sources:")] + "  at_silos: true\n" + text[text.index("training:") :]
    (tmp_path / "recipe.yaml").write_text(at_silos)
    with pytest.raises(RecipeError, match="name the classes"):
        load_recipe(tmp_path / "recipe.yaml")


def test_one_class_in_all_rows_is_refused(base: Path) -> None:
    with pytest.raises(DataError, match="all rows have the same class"):
        load_data(recipe(base, "classify", "data.sources.0.where={topic: money}"), base)


def test_a_silo_of_a_network_may_have_one_class(base: Path, tmp_path: Path) -> None:
    """It reads its text as the only silo of the recipe."""
    text = (base / "classify.yaml").read_text()
    source = f"{{path: {base}/rows.jsonl, columns: {COLUMNS['classify']}, where: {{topic: health}}}}"
    alone = f"  silos: [{{name: a, sources: [{source}]}}]\n  split"
    (tmp_path / "recipe.yaml").write_text(
        text[: text.index("  sources:")] + alone + text[text.index(": {validation") :]
    )
    data = load_data(load_recipe(tmp_path / "recipe.yaml"), base)
    assert {row["choices"][row["answer"]] for row in data.silo("a").train} == {"health"}


def test_a_trained_run_gives_rewards(base: Path, tmp_path: Path) -> None:
    federate(recipe(base, "reward"), base, tmp_path / "run")
    scorer = load_reward(tmp_path / "run")
    rows = [json.loads(line) for line in (base / "rows.jsonl").read_text().splitlines()]
    prompts, good, bad = ([row[name] for row in rows] for name in ("text", "good", "bad"))
    good[:20], bad[:20] = bad[:20], good[:20]
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, *both in zip(prompts, good, bad, strict=True)
        for answer in both
    ]
    rewards = scorer.rewards(chats, batch_tokens=200)
    alone = [scorer.rewards([chat])[0] for chat in chats[:6]]
    assert rewards[:6] == pytest.approx(alone, abs=1e-5)
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())
    found = win_rate(scorer, prompts, good, bad)
    assert found.wins == (rewards[0::2] > rewards[1::2]).sum() and found.wins + found.ties + found.losses == len(rows)
    assert found.interval[0] < found.rate == found.wins / len(rows) < found.interval[1]
    assert found.margin == pytest.approx((rewards[0::2] - rewards[1::2]).mean())
    other = win_rate(scorer, prompts, bad, good)
    assert other.rate == pytest.approx(1 - found.rate) and other.margin == pytest.approx(-found.margin)
    same = win_rate(scorer, prompts[:3], good[:3], good[:3])
    assert (same.rate, same.ties) == (0.5, 3)
    for chat, words in ((chats[0][:1], "conversation 0: only what the assistant says"), ([], "conversation 0")):
        with pytest.raises(DataError, match=words):
            scorer.rewards([chat])
    with pytest.raises(DataError, match="two answers to every prompt"):
        win_rate(scorer, prompts, good, bad[1:])
    files = []
    for name, answers in (("first", good), ("second", bad)):
        files.append(tmp_path / f"{name}.jsonl")
        lines = dict(zip(prompts, answers, strict=True))
        files[-1].write_text("".join(json.dumps({"prompt": p, "response": a}) + "\n" for p, a in lines.items()))
    told = json.loads(fedlm("winrate", str(tmp_path / "run"), *map(str, files), "--json").stdout)
    assert told["prompts"] == len(set(prompts)) and 0.5 < told["rate"] < 1
    assert "95 % interval" in fedlm("winrate", str(tmp_path / "run"), *map(str, files)).stdout
    files[1].write_text('{"prompt": "else", "response": "a"}\n')
    assert "in one of the files only" in fedlm("winrate", str(tmp_path / "run"), *map(str, files), code=2).stderr
    files[1].write_text("no record")
    assert "second.jsonl:1: the line is no record" in fedlm("winrate", str(tmp_path), *map(str, files), code=2).stderr
    with pytest.raises(RunError, match="whose model writes no text"):
        open_chat(str(tmp_path / "run"))
    with torch.no_grad():
        scorer.model.get_base_model().score.weight[0, 0] = float("nan")  # type: ignore[operator,union-attr]
    with pytest.raises(ModelError, match="a reward that is not finite"):
        scorer.rewards(chats[:1])


def test_only_reward_models_give_rewards(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no run here"):
        load_reward(tmp_path)
    (tmp_path / "recipe.yaml").write_text((base / "classify.yaml").read_text())
    with pytest.raises(ModelError, match="trained task 'classify', and rewards come from task 'reward'"):
        load_reward(tmp_path)
    (tmp_path / "recipe.yaml").write_text((base / "reward.yaml").read_text())
    with pytest.raises(ModelError, match="has left no adapter yet"):
        load_reward(tmp_path)
