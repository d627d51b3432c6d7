"""Guards in whole federations of real silos: what leaves them, what the coordinator makes of it, resumed, attacked.

AdamW, unequal weights, alpha != rank, four rounds.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlm.errors import RecipeError
from fedlm.federation.api import run_recipe
from fedlm.federation.engines.wire import serialized_size
from fedlm.federation.rundir import RunDir
from fedlm.guards import get_chain, update_key
from fedlm.messages import Failure, Reply, Request, Tensors
from fedlm.recipe.composition import Case, Protection, Rule, judge
from fedlm.recipe.guards import GUARDS
from fedlm.recipe.methods import ALGORITHMS
from tests.algorithms.observed import Observed, distance, federate, final
from tests.federation.conftest import Tiny

ROUNDS = 4
Run = tuple[Observed, RunDir]

CASES = {
    "int4": ("fedavg", "[{name: int4, error_feedback: true}]"),
    "topk": ("fedavg", "[{name: topk, density: 0.05, error_feedback: true}, {name: int8}]"),
    "randk": ("fedit", "[{name: randk, density: 0.2}]"),
    "lowrank": ("fedavg", "[{name: lowrank, rank: 1, error_feedback: true}]"),
    "one factor a round": ("rolora", "[{name: topk, density: 0.1, error_feedback: true}]"),
    "variates": ("scaffold", "[{name: int4, error_feedback: true}]"),
    "other shapes at first": ("fed-sb", "[{name: int4, error_feedback: true}]"),
}


def changes(case: str, *more: str) -> tuple[str, ...]:
    algorithm, guards = CASES[case]
    kind = "lora-sb" if algorithm == "fed-sb" else "lora"
    return (
        f"federation.algorithm.name={algorithm}",
        f"adapter={{kind: {kind}, rank: 4, alpha: 12.0}}",
        "training.lr=0.02",
        "training.steps=4",
        f"guards={guards}",
        *more,
    )


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("guards")
    return {case: federate(tiny.recipe(*changes(case)), tiny.base, folder / str(i)) for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_it_learns(runs: dict[str, Run], case: str) -> None:
    engine, run = runs[case]
    losses = [line["validation"]["loss"] for line in run.rounds()]
    assert losses[-1] < losses[0] - (0.02 if case == "other shapes at first" else 0.1)
    assert len(set(engine.weights[0].values())) == 4, "unequal weights"


@pytest.mark.parametrize("case", ["int4", "topk", "randk", "lowrank"])
def test_the_server_steps_by_the_mean_of_what_was_decoded(runs: dict[str, Run], case: str, tiny: Tiny) -> None:
    """theta_t+1 = theta_t + sum p_i C(u_i + e_i), from the payloads and the models that silos loaded."""
    engine, _ = runs[case]
    chain = get_chain(tiny.recipe(*changes(case)).guards)
    assert chain is not None
    for round_ in range(ROUNDS):
        before, after = engine.tensors[round_ - 1], engine.tensors[round_]
        shapes = {name: value.shape for name, value in before.items()}
        total = sum(engine.weights[round_].values())
        wanted = {name: value.double() for name, value in before.items()}
        for silo, payload in engine.updates[round_].items():
            assert serialized_size(payload) < 0.45 * serialized_size(before)
            for name, value in chain.decode(payload, shapes, update_key(0, silo, round_)).items():
                wanted[name] = wanted[name] + engine.weights[round_][silo] / total * value
        for name in before:
            torch.testing.assert_close(after[name].double(), wanted[name], rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_resumed_it_ends_in_the_same_bits(runs: dict[str, Run], case: str, tiny: Tiny, tmp_path: Path) -> None:
    engine, resumed = federate(tiny.recipe(*changes(case)), tiny.base, tmp_path / "run", interrupt=2)
    one, other = final(runs[case][1]), final(resumed)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    straight = runs[case][0].updates[ROUNDS - 1]
    assert all(torch.equal(straight[s][n], u[n]) for s, u in engine.updates[ROUNDS - 1].items() for n in u)


def kept_errors(run: RunDir, silo: str, round_: int) -> Tensors:
    """What a silo kept after a round; the last two are there."""
    (file,) = (run.path / "silos" / silo).glob(f"*/round-{round_:04d}.safetensors")
    return {n.removeprefix("guard/"): t for n, t in load_file(file).items() if n.startswith("guard/")}


@pytest.mark.parametrize("case", ["int4", "topk", "lowrank"])
def test_what_was_lost_is_in_the_next_update(runs: dict[str, Run], case: str, tiny: Tiny) -> None:
    """C(u + e) + e' - e is u: added to what the silo began with it is the model that the silo trained."""
    engine, run = runs[case]
    chain, last, scale = get_chain(tiny.recipe(*changes(case)).guards), ROUNDS - 1, 12.0 / 4
    assert chain is not None
    start = engine.tensors[last - 1]
    shapes = {name: value.shape for name, value in start.items()}
    for silo, payload in engine.updates[last].items():
        sent = chain.decode(payload, shapes, update_key(0, silo, last))
        before, after = (kept_errors(run, silo, round_) for round_ in (last - 1, last))
        model = {n: (start[n].double() + sent[n] + after[n] - before[n]) for n in start}
        rebuilt = {
            n.removesuffix(".lora_B.weight"): scale * model[n] @ model[n.replace("lora_B", "lora_A")]
            for n in model
            if "lora_B" in n
        }
        assert distance(rebuilt, engine.trained[last][silo]) < 1e-5
        without = {n: before[n].norm() / (sent[n] + after[n] - before[n]).norm() for n in start}
        assert max(without.values()) > 0.05, "what was lost is no trifle"


def test_four_bits_with_feedback_lose_less_than_one_percent(runs: dict[str, Run], tiny: Tiny, tmp_path: Path) -> None:
    """Of the loss without guards."""
    _, plain = federate(tiny.recipe(*changes("int4", "guards=[]")), tiny.base, tmp_path / "run")
    loss, exact = (run.rounds()[-1]["validation"]["loss"] for run in (runs["int4"][1], plain))
    assert loss != exact and loss == pytest.approx(exact, rel=0.01)


def test_errors_are_kept_for_what_comes_again(runs: dict[str, Run]) -> None:
    def kept(case: str, round_: int) -> Tensors:
        return kept_errors(runs[case][1], "site1", round_)

    assert all(error.any() for error in kept("int4", 3).values()) and kept("int4", 3).keys() == kept("int4", 2).keys()
    factors = kept("one factor a round", 3)
    assert {name.split(".")[-2] for name in factors} == {"lora_A", "lora_B"}
    waiting = kept("one factor a round", 2)
    assert all(torch.equal(factors[n], waiting[n]) for n in factors if "lora_B" in n), "round 3 trains A"
    assert list(kept("other shapes at first", 3)) == ["lora_R.weight"]
    assert not kept("randk", 3)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("gone", "the error feedback of the round before is missing"),
        ("not finite", "the error feedback kept of '"),
        ("renamed", "the silo's stored state is corrupt"),
    ],
)
def test_missing_or_damaged_error_feedback_is_said(damage: str, told: str, tiny: Tiny, tmp_path: Path) -> None:
    """A silo whose state of the round before has lost it does not go on from zero, or from what it never lost."""

    class Careless(Observed):
        def exchange(self, requests: Iterable[Request], deadline: float | None = None) -> Iterator[Reply | Failure]:
            for request in requests:
                if request.verb == "train" and request.round == 2 and request.silo == "site1":
                    (file,) = (tmp_path / "run" / "silos" / "site1").glob("*/round-0001.safetensors")
                    from safetensors import safe_open

                    with safe_open(file, framework="pt") as handle:
                        note = json.loads(handle.metadata()["note"])
                    stored = load_file(file)
                    kept = sorted(n for n in stored if n.startswith("guard/"))
                    if damage == "gone":
                        stored = {n: t for n, t in stored.items() if n not in kept}
                        note["names"] = sorted(stored)
                    elif damage == "not finite":
                        stored[kept[0]][0, 0] = math.nan
                    else:
                        stored[kept[0] + "x"] = stored.pop(kept[0])
                    save_file(stored, file, metadata={"note": json.dumps(note)})
                    answer = self._silos[request.silo].handle(request)
                    assert isinstance(answer, Failure)
                    yield answer
                else:
                    yield from super().exchange([request], deadline)

    line = attacked(Careless, tiny, tmp_path / "run")[3]
    (failure,) = line["failures"]
    assert failure["silo"] == "site1" and told in failure["reason"] and "silos/site1" in failure["reason"]


def test_payloads_of_a_hostile_silo_are_refused_and_the_others_go_on(tiny: Tiny, tmp_path: Path) -> None:
    class Hostile(Observed):
        def exchange(self, requests: Iterable[Request], deadline: float | None = None) -> Iterator[Reply | Failure]:
            for reply in super().exchange(requests, deadline):
                if isinstance(reply, Reply) and reply.verb == "train" and reply.silo == "site2":
                    payload = dict(reply.tensors)
                    if reply.round == 0:
                        payload["0.scales"] = torch.full_like(payload["0.scales"], math.nan)
                    elif reply.round == 1:
                        payload["0.codes"] = payload["0.codes"][:-1]
                    else:
                        payload = {"x": torch.zeros(3)}
                    reply = replace(reply, tensors=payload)
                yield reply

    lines = attacked(Hostile, tiny, tmp_path / "run")[1:4]
    assert [line["replied"] for line in lines] == [["site0", "site1", "site3"]] * 3
    reasons = [line["failures"][0]["reason"] for line in lines]
    assert "scales" in reasons[0] and "'0.codes' is torch.uint8" in reasons[1] and "has the parts 'x'" in reasons[2]


def attacked(engine_type: type[Observed], tiny: Tiny, folder: Path) -> list[dict[str, object]]:
    from fedlm.data.federated import load_data
    from fedlm.federation.api import about, new_run
    from fedlm.federation.coordinator import run

    recipe = tiny.recipe(*changes("int4", "federation.quorum=0.5", "federation.rounds=3"))
    engine = engine_type(recipe, tiny.base, folder / "silos")
    directory = new_run(recipe, folder, base=tiny.base, **about(load_data(recipe, tiny.base)))
    try:
        run(recipe, engine, directory)
    finally:
        directory.close()
    return RunDir.open(folder, write=False).rounds()


@pytest.mark.slow
def test_worker_processes_give_the_same_bits_and_the_bytes_are_counted(tiny: Tiny, tmp_path: Path) -> None:
    change = changes("int4", "federation.rounds=2")
    for workers in (1, 2):
        run_recipe(
            tiny.recipe(*change, f"federation.workers={workers}"), base=tiny.base, run_dir=tmp_path / f"{workers}"
        )
    one, two = (final(RunDir.open(tmp_path / f"{n}", write=False)) for n in (1, 2))
    assert all(torch.equal(one[n], two[n]) for n in one)
    lines = [json.loads((tmp_path / f"{n}" / "rounds.jsonl").read_text().splitlines()[-1]) for n in (1, 2)]
    d = sum(value.numel() for value in one.values())
    for line in lines:
        for silo in line["silos"].values():
            numbers = math.ceil(d / 2) + 2 * math.ceil(d / 64) + 4
            assert numbers < silo["bytes_up"] < numbers + 300
            assert silo["bytes_up"] * 7 < silo["bytes_down"]


def test_asynchronous_updates_are_encoded_too(tiny: Tiny, tmp_path: Path) -> None:
    change = ("federation.algorithm={name: fedbuff, buffer: 2}", "federation.rounds=3", "training.steps=2")
    losses = {}
    for guards in ("[]", "[{name: int8}]"):
        result = run_recipe(
            tiny.recipe(*change, f"guards={guards}"), base=tiny.base, run_dir=tmp_path / str(len(guards))
        )
        lines = [json.loads(line) for line in (result.path / "rounds.jsonl").read_text().splitlines()]
        losses[guards] = lines[-1]["validation"]["loss"], lines[-1]["bytes_up"]
    (plain, bytes_), (rounded, fewer) = losses.values()
    assert rounded == pytest.approx(plain, rel=1e-3) and rounded != plain and fewer < 0.35 * bytes_


# ---------------------------------------------------------------- what a recipe may ask for


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_matrix(algorithm: str) -> None:
    for name, feedback in itertools.product(GUARDS, (False, True)):
        kind = ALGORITHMS[algorithm].adapters[0]
        said = " ".join(judge(Case(Rule(algorithm), "instruct", Protection(name), kind, feedback)).reasons)
        wanted = refusals(algorithm, name, feedback)
        assert all(text in said for text in wanted) if wanted else said == "", (name, feedback)


def refusals(algorithm: str, name: str, feedback: bool) -> list[str]:
    """What has to be said against this guard with this algorithm; empty where they go together."""
    method, wanted = ALGORITHMS[algorithm], []
    if method.no_guards:
        wanted.append(f"not with '{algorithm}': {method.no_guards}")
    if feedback and method.no_feedback:
        wanted.append(f"not with '{algorithm}': {method.no_feedback}")
    if not feedback and method.needs_feedback:
        wanted.append(f"must be true with '{algorithm}': {method.needs_feedback}")
    if method.setup_rounds and name in ("topk", "randk", "lowrank"):
        wanted.append(f"'{name}' not with '{algorithm}': its first round sends sketches")
    if name == "mask" and method.no_masks:
        wanted.append(f"not with '{algorithm}': {method.no_masks}")
    if name == "mask" and feedback:
        wanted.append("not under a mask: what rounding to its bits loses is right on average already")
    return wanted


@pytest.mark.parametrize(
    ("guards", "wanted"),
    [
        ("[{name: int5}]", "unknown guard 'int5', did you mean 'int8' or 'int4'"),
        ("[{name: int4, block: 32}]", "greater than or equal to 64"),
        ("[{name: int4, density: 0.5}]", "has no effect with 'int4' (it belongs to randk, topk)"),
        ("[{name: topk, block: 128}]", "has no effect with 'topk' (it belongs to int4, int8)"),
        ("[{name: topk, density: 0.5, k: 3}]", "give either `k` or `density`"),
        ("[{name: topk, density: 1.0}]", "less than 1"),
        ("[{name: int4}, {name: topk}]", "'int4' leaves nothing to the guards after it: put it last"),
        ("[{name: topk}, {name: lowrank}]", "'lowrank' cannot work on what 'topk' leaves: put it before"),
        ("[{name: topk}, {name: randk}]", "'randk' cannot work on what 'topk' leaves"),
        ("[{name: topk}, {name: int4, error_feedback: true}]", "belongs to the chain's first guard"),
    ],
)
def test_chains_that_cannot_be(tiny: Tiny, guards: str, wanted: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny.recipe("federation.algorithm.name=fedavg", f"guards={guards}")
    assert wanted in str(caught.value)


K = "[{name: topk, k: 900}]"


@pytest.mark.parametrize(
    "change",
    [
        ("fedavg", "guards=[{name: topk, k: 100000}]"),
        ("fedavg", f"guards={K}", "federation.capacity.silos={site3: {layers: 1, targets: [v_proj]}}"),
        ("rolora", f"guards={K}", "federation.capacity.default={layers: 1, targets: [up_proj]}", "adapter.rank=8"),
        ("fedavg", "federation.downlink={send: changed, guards: [{name: topk, k: 100000}]}"),
    ],
    ids=["all", "one silo", "the other factor", "down"],
)
def test_k_beyond_the_update_is_said_before_anything_is_trained(
    tiny: Tiny, tmp_path: Path, change: tuple[str, ...]
) -> None:
    recipe = tiny.recipe(f"federation.algorithm.name={change[0]}", *change[1:])
    with pytest.raises(RecipeError, match=r"guards: k = \d+ values cannot be kept of \d+"):
        run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "rounds.jsonl").exists()
