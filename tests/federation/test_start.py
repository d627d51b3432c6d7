"""A run that starts from another: the same model to begin with, whatever carries it, pinned until the end."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.errors import FedlmError, RunError
from fedlm.federation import coordinator
from fedlm.federation.api import new_run, run_recipe, using
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo import Workbench
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.start import FILE, held_start, read_start, with_start
from fedlm.files import read_json, read_tensors, write_tensors
from fedlm.inference.session import open_chat, run_tensors
from fedlm.messages import Tensors
from fedlm.models.adapters import adapter_parameters
from fedlm.models.export import save_merged
from fedlm.models.fingerprint import fingerprint
from fedlm.models.load import load_base
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from tests.federation.conftest import Tiny
from tests.federation.own_silos import Network, data_file

SHORT = ("federation.rounds=2", "training.steps=2", "data.split.test=0", "federation.algorithm.name=fedavg")
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def first(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "run"
    run_recipe(tiny.recipe(*SHORT), base=tiny.base, run_dir=folder)
    return folder


def after(tiny: Tiny, run: Path, way: str, *changes: str) -> Recipe:
    """The tiny recipe, started from this run."""
    return tiny.recipe(*SHORT, f"start.run={run}", f"start.adapter={way}", *changes)


@pytest.fixture(scope="module")
def on_top(tiny: Tiny, first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh adapter of FFA-LoRA, which exchanges B alone, on top of the first run's."""
    folder = tmp_path_factory.mktemp("on-top") / "run"
    run_recipe(after(tiny, first, "stack", "federation.algorithm.name=ffa-lora"), base=tiny.base, run_dir=folder)
    return folder


def rounds(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["validation"]["loss"] for line in rounds(run)]


def adapter(run: Path) -> Tensors:
    (file,) = (run / "adapter").glob("*.safetensors")
    return read_tensors(file)


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# ---------------------------------------------------------------- the same model to begin with


def test_what_is_continued_begins_where_the_other_run_ended(tiny: Tiny, first: Path, tmp_path: Path) -> None:
    run_recipe(after(tiny, first, "continue"), base=tiny.base, run_dir=tmp_path / "run")
    begun = losses(tmp_path / "run")
    assert begun[0] == losses(first)[-1], "bit for bit"
    assert begun[-1] < begun[0] < losses(first)[0]
    facts, old = read_json(tmp_path / "run" / "run.json"), read_json(first / "run.json")
    assert facts["start"]["run"] == old["run"] and facts["start"]["lineage"] == [old["run"]]
    assert rounds(tmp_path / "run")[0]["bytes_down"] == rounds(first)[0]["bytes_down"], "nothing travels twice"


def test_ia3_can_be_continued(tiny: Tiny, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    short = ("federation.rounds=1", "adapter={kind: ia3}")
    run_recipe(tiny.recipe(*SHORT, *short), base=tiny.base, run_dir=one)
    run_recipe(after(tiny, one, "continue", *short), base=tiny.base, run_dir=two)
    assert losses(two)[0] == losses(one)[-1] != losses(one)[0]


def test_what_is_stacked_begins_where_the_other_run_ended(first: Path, on_top: Path) -> None:
    """s = alpha / r is a power of two here, so that moving it into the frozen B changes no bit."""
    assert losses(on_top)[0] == losses(first)[-1], "bit for bit"
    assert losses(on_top)[-1] < losses(on_top)[0]


def test_the_export_of_a_stacked_run_is_the_running_model(on_top: Path, tmp_path: Path) -> None:
    """fp32 logits within 1e-5: as silos ran it, as a PEFT folder, merged, and a checkpoint as `fedlm chat` has it."""
    from peft import PeftModel

    recipe, directory = load_recipe(on_top / "recipe.yaml"), RunDir.open(on_top, write=False)
    checkpoint = directory.load_checkpoint()
    assert checkpoint is not None
    bench = Workbench(recipe, None)  # type: ignore[arg-type]
    bench.load()
    start = held_start(directory, recipe)
    bench.begin_from({f"start/{n}": t for n, t in start.items()})
    bench.put({n: t for n, t in checkpoint.parameters.items() if ".lora_B." in n})  # what FFA-LoRA sends
    with torch.no_grad():
        running = bench.model.eval()(IDS).logits
        peft = PeftModel.from_pretrained(load_base(recipe.model), on_top / "adapter")
        assert peft.peft_config["default"].r == 4
        saved = peft.eval()(IDS).logits
        save_merged(tmp_path / "merged", run_tensors(on_top)[0], recipe)
        merged = load_base(recipe.model.model_copy(update={"source": str(tmp_path / "merged")}))(IDS).logits
        talked = open_chat(str(on_top), which="last").model(IDS).logits
    for found in (saved, merged, talked):
        torch.testing.assert_close(found, running, atol=1e-5, rtol=0)
        bare = load_base(recipe.model)(IDS).logits
    assert (bare - running).abs().max() > 1e-2


def test_a_stack_on_a_stack_and_on_merged_deltas(tiny: Tiny, on_top: Path, tmp_path: Path) -> None:
    """Three generations: FFA-LoRA on FedAvg, FedEx-LoRA (with residuals of its own) on both, and one that continues."""
    third, fourth = tmp_path / "third", tmp_path / "fourth"
    run_recipe(after(tiny, on_top, "stack", "federation.algorithm.name=fedex-lora"), base=tiny.base, run_dir=third)
    assert abs(losses(third)[0] - losses(on_top)[-1]) < 1e-6
    run_recipe(after(tiny, third, "continue", "federation.rounds=1"), base=tiny.base, run_dir=fourth)
    assert abs(losses(fourth)[0] - losses(third)[-1]) < 1e-6
    lineage = read_json(fourth / "run.json")["start"]["lineage"]
    assert [read_json(r / "run.json")["run"] for r in (on_top, third)] == lineage[1:] and len(lineage) == 3


def test_a_fresh_adapter_spans_other_directions(tiny: Tiny, first: Path) -> None:
    """With the first run's own A (the same seed), FFA-LoRA on top could not leave its subspace."""
    start = read_start(after(tiny, first, "stack")).tensors
    name = next(n for n in start if ".lora_A." in n)
    frozen = start[name.replace(".lora_A.weight", ".delta_A.start")]
    assert torch.linalg.matrix_rank(torch.cat([start[name], frozen])) == 4
    assert not any(t.any() for n, t in start.items() if ".lora_B." in n)


def test_values_that_do_not_travel_are_those_of_the_start(tiny: Tiny, first: Path, tmp_path: Path) -> None:
    """FFA-LoRA freezes A where the first run trained it; its silos know no A but the start's."""
    recipe = after(tiny, first, "continue", "federation.algorithm.name=ffa-lora", "federation.rounds=1")
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    assert losses(tmp_path / "run")[0] == losses(first)[-1]
    old, new = adapter(first), adapter(tmp_path / "run")
    assert all(torch.equal(old[n], new[n]) == ("lora_A" in n) for n in old)


def test_a_smaller_silo_gets_the_first_rows(tiny: Tiny, first: Path) -> None:
    recipe = after(tiny, first, "continue")
    bench = Workbench(recipe, None)  # type: ignore[arg-type]
    bench.load()
    start = read_start(recipe).tensors
    a = next(n for n in start if ".lora_A." in n)
    b = a.replace("_A.", "_B.")
    bench.begin_from({f"start/{n}": t for n, t in start.items()})
    given = {n.replace("_A.", "_B."): start[n.replace("_A.", "_B.")][:, :1] for n in start if ".lora_A." in n}
    parameters = bench.put(given)
    assert torch.equal(parameters[a], start[a][:1]) and torch.equal(parameters[b], start[b][:, :1])
    with bench.as_reference():
        assert same(bench.take(adapter_parameters(bench.model)), start)
    assert torch.equal(adapter_parameters(bench.model)[b], start[b][:, :1])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_full_weights_become_the_base(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """Pre-trained in fp32 with all weights: the next stage's base is that model, with tokenizer and template."""
    changes = (*SHORT, "federation.rounds=1", "training.lr=0.001")
    old = tmp_path / "pretrained"
    run_recipe(tiny.recipe(*changes, "adapter={kind: full}"), base=tiny.base, run_dir=old)
    spec = "adapter={kind: full}" if kind == "full" else "adapter={rank: 2}"
    recipe = tiny.recipe(*changes, spec, f"model.source={old / 'adapter'}", f"start.run={old}")
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "next")
    assert losses(tmp_path / "next")[0] == losses(old)[-1] < losses(old)[0]
    assert open_chat(str(tmp_path / "next")).has_template
    with pytest.raises(RunError, match="that run trained full weights, so its model is the base"):
        run_recipe(tiny.recipe(*changes, spec, f"start.run={old}"), base=tiny.base, run_dir=tmp_path / "other")


# ---------------------------------------------------------------- whatever carries it


def test_what_travels_once_gives_the_same_bits(tiny: Tiny, first: Path, on_top: Path, tmp_path: Path) -> None:
    change = "federation.downlink.send=changed"
    recipe = after(tiny, first, "stack", "federation.algorithm.name=ffa-lora", change)
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    assert same(adapter(tmp_path / "run"), adapter(on_top)) and losses(tmp_path / "run") == losses(on_top)
    sent = sum(t.nbytes for t in read_tensors(on_top / FILE).values())  # frozen deltas and A, once to each silo
    down = [line["bytes_down"] for line in rounds(tmp_path / "run")]
    assert down[0] > 4 * sent * 0.7 and sum(down[1:]) < sum(line["bytes_down"] for line in rounds(on_top)[1:]) / 2


def test_organisations_need_nothing_of_the_coordinators_disk(
    tiny: Tiny, tiny_model_dir: Path, first: Path, tmp_path: Path
) -> None:
    """Real silos with their own text, the model by a name of their policy; the same bits as simulated."""
    sites = [f"site{n}" for n in range(4)]
    made = after(tiny, first, "stack", "federation.algorithm.name=ffa-lora")
    own = [{"name": n, "sources": [source(tiny, n)]} for n in sites]
    data = {**made.data.model_dump(mode="json"), "sources": [], "partition": None}
    simulated, there = (
        Recipe.model_validate({**made.model_dump(mode="json"), "data": {**data, **more}})
        for more in ({"silos": own}, {"at_silos": True})
    )
    run_recipe(simulated, base=tiny.base, run_dir=tmp_path / "here")
    named = there.model_copy(update={"model": there.model.model_copy(update={"source": "/elsewhere/tiny"})})

    def owner(name: str) -> OwnSilo:
        folder = tmp_path / name
        text = data_file(folder, f"sources: [{json.dumps(source(tiny, name))}]\n")
        (folder / "policy.yaml").write_text(f"models: {{tiny: {tiny_model_dir}}}\n")
        return OwnSilo(name, tmp_path / "states", text, folder / "policy.yaml")

    network = Network(named, {n: owner(n) for n in sites}, fingerprint(there.model))
    with using(new_run(there, tmp_path / "there")) as directory:
        coordinator.run(there, network, directory)
    assert same(adapter(tmp_path / "here"), adapter(tmp_path / "there"))
    assert losses(tmp_path / "there") == losses(tmp_path / "here")


def source(tiny: Tiny, site: str) -> dict[str, Any]:
    columns = {"prompt": "prompt", "response": "response"}
    return {"path": str(tiny.base / "rows.jsonl"), "columns": columns, "where": {"site": site}}


def test_a_silo_without_the_base_is_told_which(tiny: Tiny, tmp_path: Path) -> None:
    from fedlm.federation.silo.policy import Policy, local_model
    from fedlm.federation.silo.refusals import Forbidden

    spec = tiny.recipe().model.model_copy(update={"source": "/at/coordinator/runs/pretrained/adapter"})
    with pytest.raises(Forbidden, match="the model 'pretrained/adapter' lies on the coordinator's disk"):
        local_model(Policy(), spec)
    assert local_model(Policy(models={"pretrained/adapter": str(tmp_path)}), spec).source == str(tmp_path)


# ---------------------------------------------------------------- pinned


@pytest.fixture
def stopped(tiny: Tiny, first: Path, tmp_path: Path) -> Callable[[str], tuple[Path, Recipe]]:
    """A stacked run that ended after its first round of two, and its recipe; from a copy of the first run."""

    def make(way: str) -> tuple[Path, Recipe]:
        old, run = tmp_path / "old", tmp_path / "run"
        shutil.copytree(first, old)
        recipe = after(tiny, old, way, "federation.algorithm.name=ffa-lora")

        def stop(event: dict[str, Any]) -> None:
            if event["kind"] == "round_done" and event["round"] == 0:
                raise KeyboardInterrupt

        assert run_recipe(recipe, base=tiny.base, run_dir=run, observe=stop).status == "interrupted"
        return run, recipe

    return make


def test_a_resumed_run_ends_in_the_same_bits_without_the_old_one(
    stopped: Callable[[str], tuple[Path, Recipe]], on_top: Path, tmp_path: Path
) -> None:
    run, _ = stopped("stack")
    shutil.rmtree(tmp_path / "old")
    assert run_recipe(None, run_dir=run, resume=True).status == "finished"
    assert same(adapter(run), adapter(on_top)) and losses(run) == losses(on_top)


def test_another_start_is_an_error(stopped: Callable[[str], tuple[Path, Recipe]], tmp_path: Path) -> None:
    run, recipe = stopped("stack")
    file = tmp_path / "old" / "adapter" / "adapter_model.safetensors"
    kept = file.read_bytes()
    write_tensors(file, {n: t + 1e-3 for n, t in read_tensors(file).items()})
    with pytest.raises(RunError, match=r"another final model now: SHA-256 .* when this one began"):
        run_recipe(None, run_dir=run, resume=True)
    file.write_bytes(kept)
    (run / FILE).unlink()  # killed before it was written: read from the old run again
    assert held_start(RunDir.open(run, write=False), recipe)
    tensors = read_tensors(run / FILE)
    write_tensors(run / FILE, {n: t * 2 for n, t in tensors.items()})
    with pytest.raises(RunError, match="is not the one it began with"):
        run_recipe(None, run_dir=run, resume=True)
    (run / FILE).write_bytes(b"nothing")
    with pytest.raises(RunError, match="the run's start is damaged"):
        run_recipe(None, run_dir=run, resume=True)


# ---------------------------------------------------------------- refused before anything is computed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("start.adapter=continue", "adapter.rank=4"), "cannot be continued: adapter.rank is 4 here and 2 there"),
        (("start.adapter=continue", "adapter.alpha=8"), r"adapter.alpha is 8.0 here and 16.0 there"),
        (("adapter={kind: ia3}", "start.adapter=stack"), "only LoRA on LoRA can be stacked"),
        (("adapter={kind: full}",), "export RUN --merged"),
        (("adapter.targets=[q_proj]", "start.adapter=stack"), "no layer of this recipe's adapter"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny: Tiny, first: Path, tmp_path: Path, changes: tuple[str, ...], said: str
) -> None:
    recipe = tiny.recipe(*SHORT, f"start.run={first}", *changes)
    with pytest.raises(FedlmError, match=said):
        run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_base_or_vocabulary_is_refused(tiny: Tiny, tiny_model_dir: Path, first: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    copied = after(tiny, first, "stack", f"model.source={other}")
    assert read_start(copied).tensors, "the same files elsewhere are the same base"
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RunError, match="the vocabulary is another one: that run's adapter lies on"):
        read_start(copied)
    weights = read_tensors(other / "model.safetensors")
    write_tensors(other / "model.safetensors", {n: t + 1e-4 for n, t in weights.items()}, {"format": "pt"})
    with pytest.raises(RunError, match="the base model is another one"):
        read_start(copied)


# ---------------------------------------------------------------- tasks that look back at it, and heads


@pytest.fixture(scope="module")
def pairs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Changes of the tiny recipe that make it learn from pairs of answers."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [json.loads(line) for line in (tiny.base / "rows.jsonl").read_text().splitlines()]
    rows = [
        {"prompt": row["prompt"], "chosen": row["response"], "rejected": other["prompt"], "site": row["site"]}
        for row, other in itertools.pairwise(lines)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "{prompt: prompt, chosen: chosen, rejected: rejected}"
    return [f"data.sources=[{{path: {file}, columns: {columns}}}]", "training.max_length=96", "federation.rounds=1"]


@pytest.mark.parametrize("way", ["continue", "stack"])
def test_alignment_compares_with_the_start(tiny: Tiny, first: Path, pairs: list[str], tmp_path: Path, way: str) -> None:
    """Before training the policy is its reference: KL 0, no margin, and DPO's loss is log 2, whatever the base says."""
    recipe = after(tiny, first, way, "task=preference", *pairs)
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    before, done = (rounds(tmp_path / "run")[i]["validation"] for i in (0, -1))
    assert abs(before["loss"] - math.log(2)) < 1e-6 and before["reward_margin"] == before["kl"] == 0.0
    assert done["loss"] < before["loss"] and done["kl"] > 0
    if way == "stack":  # in processes of their own, where the start travels in files beside the model
        apart = tmp_path / "apart"
        run_recipe(
            after(tiny, first, way, "task=preference", *pairs, "federation.workers=2"), base=tiny.base, run_dir=apart
        )
        assert same(adapter(apart), adapter(tmp_path / "run")) and losses(apart) == losses(tmp_path / "run")


def test_rows_are_chosen_by_the_model_that_the_run_begins_with(tiny: Tiny, first: Path) -> None:
    """FedDQC's scores after a stage are other ones than the base's; both are found again when the start changes."""
    from fedlm.data.federated import load_data

    recipe = after(tiny, first, "continue", "data.selection={method: feddqc, keep: 0.5}")
    start = with_start({}, read_start(recipe).tensors, recipe)
    bench = Workbench(recipe, load_data(recipe, tiny.base))
    bench.load()

    def scores(message: Tensors) -> list[float]:
        bench.begin_from(message)
        (name,) = (n for n in bench.training_tokens("site0").facts if "score" in n)
        return list(bench.training_tokens("site0").facts[name])

    base, ours = scores({}), scores(start)
    assert base != ours and scores({}) == base and scores(start) == ours


def test_a_head_is_new_after_another_task_and_exported_with_the_stack(
    tiny: Tiny, first: Path, pairs: list[str], tmp_path: Path
) -> None:
    recipe = after(tiny, first, "stack", "task=reward", *pairs)
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    assert abs(losses(tmp_path / "run")[0] - math.log(2)) < 1e-6
    saved = adapter(tmp_path / "run")
    assert any(n.endswith("score.weight") for n in saved)
    assert {len(t) for n, t in saved.items() if "lora_A" in n} == {4}
    following = after(tiny, tmp_path / "run", "continue", "task=preference", *pairs)
    assert not any("score" in n for n in read_start(following).tensors), "a reward's head says nothing to a policy"
