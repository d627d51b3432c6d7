"""Personal models on a silo's own rows and on the other silos'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlm.algorithms import get_algorithm
from fedlm.comparison.measuring import measure_on_silos
from fedlm.data.federated import load_data
from fedlm.errors import RunError
from fedlm.federation.silo import Silo, Workbench
from fedlm.federation.silo.policy import Policy, check_request
from fedlm.federation.silo.refusals import Forbidden
from fedlm.messages import Failure, FailureKind, Request
from tests.algorithms.observed import Observed, federate
from tests.federation.conftest import Tiny, tiny, users_cache

__all__ = ["tiny", "users_cache"]

DITTO = ("federation.algorithm.name=ditto", "federation.rounds=2", "training.lr=0.05", "training.steps=20")


def test_others_rows_are_a_keyed_sample_of_all_other_silos(tiny: Tiny) -> None:
    data = load_data(tiny.recipe(), tiny.base)
    own = {name: set(data.silo(name).test["hash"]) for name in data.names}
    everything = data.others("site1", "test", 10**6, 0)["hash"]
    assert sorted(everything) == sorted(
        h for name in data.names if name != "site1" for h in data.silo(name).test["hash"]
    )
    few = data.others("site1", "test", 4, 0)["hash"]
    assert len(few) == 4 and not set(few) & own["site1"] and few == data.others("site1", "test", 4, 0)["hash"]
    assert few != data.others("site1", "test", 4, 1)["hash"]
    drawn = [data.others("site1", "test", 4, seed)["hash"] for seed in range(20)]
    assert len({h for hashes in drawn for h in hashes}) > len(everything) / 2, "from all of them"


@pytest.fixture(scope="module")
def apart(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Silos whose answers contradict one another."""
    from tests.federation.conftest import RECIPE

    base, words = tmp_path_factory.mktemp("apart"), ["patient", "dose", "medicine", "bank"]
    with (base / "rows.jsonl").open("w") as file:
        for number in range(160):
            answer = " ".join([words[number % 4]] * 4)
            row = {"prompt": f"{words[number % 3]} {number}", "response": answer, "site": f"site{number % 4}"}
            file.write(json.dumps(row) + "\n")
    (base / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_dir))
    return Tiny(base)


def test_personal_models_fit_their_own_rows_and_not_the_others(apart: Tiny, tmp_path: Path) -> None:
    recipe = apart.recipe(*DITTO)
    engine, directory = federate(recipe, apart.base, tmp_path / "run")
    checkpoint = directory.load_checkpoint()
    assert checkpoint is not None
    tensors = get_algorithm(recipe.federation.algorithm, recipe.adapter).evaluated(checkpoint.parameters, {})
    accepted, losses = checkpoint.progress.accepted, {}
    for rows in ("own", "others"):
        measured = measure_on_silos(
            engine, engine.silos(), tensors, role="test", run=directory.run, items=True, accepted=accepted, rows=rows
        )
        losses[rows] = {silo: counts["loss_sum"] / counts["loss_tokens"] for silo, counts in measured.items()}
        for silo, counts in measured.items():
            assert counts["examples"] == len(engine.data.silo(silo).test) == len(counts["items"]["nll"])
    assert all(losses["others"][silo] > losses["own"][silo] + 0.5 for silo in losses["own"]), losses
    written = json.loads((directory.path / "evaluation.json").read_text())
    for key, rows in (("final", "own"), ("others", "others")):
        found = {silo: figures["loss"] for silo, figures in written[key]["silos"].items()}
        assert found == pytest.approx(losses[rows], abs=1e-9)


def test_a_shared_model_has_no_others_in_the_evaluation(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe("federation.algorithm.name=fedavg", "federation.rounds=1", "training.steps=1")
    _, directory = federate(recipe, tiny.base, tmp_path / "run")
    assert json.loads((directory.path / "evaluation.json").read_text()).keys() == {"base", "final"}


def test_a_silo_that_holds_its_own_rows_alone_refuses(tiny: Tiny, tmp_path: Path) -> None:
    """As on an organisation's machine: a typed refusal, and no rows are measured in place of the others'."""
    rows = (tiny.base / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(r for r in rows if json.loads(r)["site"] == "site1"))
    recipe = tiny.recipe("federation.algorithm.name=ditto")
    bench = Workbench(recipe, load_data(recipe, tmp_path))
    fields = {"role": "test", "rows_of": "others", "accepted": -1}
    answer = Silo("site1", bench, tmp_path / "state").handle(Request("site1", "evaluate", "r", -1, fields=fields))
    assert isinstance(answer, Failure) and answer.kind is FailureKind.REFUSED
    assert "only a simulation" in answer.reason
    with pytest.raises(Forbidden, match="its own rows alone"):
        check_request(Policy(), recipe, Request("site1", "evaluate", "r", -1, fields=fields))
    check_request(Policy(), recipe, Request("site1", "evaluate", "r", -1, fields={**fields, "rows_of": "own"}))

    class Alone(Observed):
        def exchange(self, requests, deadline=None):  # noqa: ARG002
            for request in requests:
                yield self._silos[request.silo].handle(request)

    with pytest.raises(RunError, match="only a simulation"):
        measure_on_silos(
            Alone(recipe, tmp_path, tmp_path / "s"), ["site1"], {}, role="test", run="r", items=False, rows="others"
        )
