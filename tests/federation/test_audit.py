"""`fedlm audit`: what leaves a silo, as the recipe has it and as a run shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fedlm.cli.main import app
from fedlm.federation.api import run_recipe
from fedlm.recipe.guards import GUARDS
from fedlm.recipe.load import load_recipe
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.starters import read_template
from fedlm.report.audit import CLIPPED, KEPT, MASKED, NOISED, OPEN, AuditOfRun, audit_of, html_page, leaving
from fedlm.report.trust import open_ends
from tests.federation.conftest import Tiny

EXAMPLES = (
    "federation.algorithm.name=fedavg",
    "federation.rounds=1",
    "training.clip_norm=null",
    "data.split={validation: 0, test: 0}",
    "privacy={unit: example, epsilon: 8, delta: 1e-3}",
)
SILOS = (
    "federation.algorithm={name: fedavg, weights: equal}",
    "federation.rounds=2",
    "privacy={unit: silo, epsilon: 20, delta: 0.01}",
)


def of(tiny: Tiny, *changes: str) -> dict[str, str]:
    return {item.what: item.protection for item in leaving(tiny.recipe("federation.algorithm.name=fedavg", *changes))}


def test_each_protection_is_said_of_the_update(tiny: Tiny) -> None:
    update = "an update of the adapter"
    assert of(tiny)[update] == OPEN
    assert of(tiny, "guards=[{name: int4}]")[update] == f"{OPEN} (made smaller by int4, which protects nothing)"
    assert of(tiny, "guards=[{name: mask}]")[update] == MASKED
    assert of(tiny, *EXAMPLES)[update] == NOISED
    assert of(tiny, *EXAMPLES, "guards=[{name: mask}]")[update] == f"{NOISED}, and {MASKED}"
    assert of(tiny, *SILOS)[update] == CLIPPED
    assert of(tiny, *SILOS, "guards=[{name: mask}]")[update] == f"{NOISED}, and {MASKED}"


def test_under_privacy_no_figure_leaves_unless_opened(tiny: Tiny) -> None:
    figures = ("figures of its training: loss, tokens, times, memory", "figures of the model on rows that it holds out")
    for changes in (EXAMPLES, SILOS):
        assert {of(tiny, *changes)[name] for name in figures} == {KEPT}
        assert KEPT not in {of(tiny, *changes, "privacy.figures=open")[name] for name in figures}
    masked = of(tiny, "guards=[{name: mask}]")
    assert all(MASKED in masked[name] for name in figures)
    # Nothing tells a loss beside noised values, opened or not; the model may be measured.
    noised = of(tiny, *SILOS, "guards=[{name: mask}]", "privacy.figures=open")
    assert noised[figures[0]] == KEPT and MASKED in noised[figures[1]]
    assert of(tiny, *EXAMPLES)["how many rows it trains on"] == OPEN  # it is public there
    assert of(tiny, *SILOS)["how many rows it trains on"] == KEPT


def test_a_bit_beside_the_update_is_listed(tiny: Tiny) -> None:
    bit = "a bit: whether its update was within the clip"
    assert bit not in of(tiny, *SILOS) and "adds noise to their count" in of(tiny, *SILOS, "privacy.adaptive={}")[bit]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_methods_tell_beside_updates_is_listed(tiny: Tiny, algorithm: str) -> None:
    recipe = tiny.recipe("federation.algorithm.name=fedavg")
    spec = recipe.federation.algorithm.model_copy(update={"name": algorithm})
    federation = recipe.federation.model_copy(update={"algorithm": spec})
    told = " ".join(item.what for item in leaving(recipe.model_copy(update={"federation": federation})))
    assert ("losses of candidates" in told) is ALGORITHMS[algorithm].losses
    assert ("a sketch of the first gradient" in told) is bool(ALGORITHMS[algorithm].setup_rounds)


def test_a_run_shows_what_was_spent_and_sent(tiny: Tiny, tmp_path: Path) -> None:
    masked = (*SILOS, "guards=[{name: mask}]")
    for name, changes in (("examples", EXAMPLES), ("silos", SILOS), ("masked", masked)):
        run_recipe(tiny.recipe(*changes), base=tiny.base, run_dir=tmp_path / name)
        shown = CliRunner().invoke(app, ["audit", str(tmp_path / name), "--json"])
        assert shown.exit_code == 0, shown.output
        found = json.loads(shown.output)
        assert found["guarantee"]["by_ledger"] and found["rounds"] == (1 if name == "examples" else 2)
        spent, budget = found["guarantee"]["spent"], found["guarantee"]["epsilon"]
        assert len(spent) == (1 if name == "silos" else 4)
        assert all(0.97 * budget < epsilon <= budget for epsilon in spent.values())
        assert found["bytes_sent"].keys() == {f"site{n}" for n in range(4)}
        page = (tmp_path / name / "audit.html").read_text()
        assert "What is not protected" in page and "e^" in page


def test_without_its_silos_ledgers_a_run_is_accounted_from_its_rounds(tiny: Tiny, tmp_path: Path) -> None:
    """Over a network they lie at the silos."""
    run_recipe(tiny.recipe(*EXAMPLES), base=tiny.base, run_dir=tmp_path / "run")
    before = audit_of(tmp_path / "run").guarantee
    for ledger in (tmp_path / "run" / "silos").rglob("ledger.jsonl"):
        ledger.unlink()
    after = audit_of(tmp_path / "run").guarantee
    assert before is not None and after is not None and before.by_ledger and not after.by_ledger
    assert after.spent == pytest.approx(before.spent, rel=1e-9)


@pytest.mark.parametrize(
    ("template", "told"),
    [("prompt-search", "sums of its rows' scores"), ("in-context", "log-probabilities of each question's choices")],
)
def test_without_training_no_update_leaves_and_what_does_is_listed(template: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(read_template(template))
    found = [item.what for item in leaving(load_recipe(file, ()))]
    assert any(told in what for what in found) and not any("update" in what for what in found)


def test_noise_on_text_is_told_per_token_and_labels_do_not_leave(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(read_template("in-context"))
    plain, noised = load_recipe(file, ()), load_recipe(file, ["in_context.token_epsilon=20"])
    assert "No noise" in " ".join(open_ends(plain)) and "e^600" in " ".join(open_ends(noised))
    (answers,) = [item for item in leaving(noised) if "log-probabilities" in item.what]
    assert "epsilon 20 a token" in answers.protection
    labels = [item.protection for recipe in (noised, plain) for item in leaving(recipe) if "label" in item.what]
    assert labels[0] == KEPT != labels[1]


def test_a_recipe_can_be_asked_before_it_is_run(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(*SILOS)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)))
    for arguments in (["audit", str(file)], ["audit", "run", str(file)]):
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0, shown.output
        assert "Each organisation is protected with epsilon 20" in shown.output.replace("\n", " ")
    assert not (tmp_path / "audit.html").exists()
    missing = CliRunner().invoke(app, ["audit", str(tmp_path / "nothing")])
    assert missing.exit_code == 2 and "Traceback" not in missing.output


def test_nothing_is_said_to_be_protected_that_is_not(tiny: Tiny) -> None:
    """Every guard alone, and no guard: only masks are called a protection."""
    for name in ("", *GUARDS):
        protection = of(tiny, f"guards=[{{name: {name}}}]" if name else "guards=[]")["an update of the adapter"]
        assert protection.startswith(MASKED if name == "mask" else OPEN)


def test_the_page_escapes_what_others_wrote(tiny: Tiny) -> None:
    recipe = tiny.recipe("federation.algorithm.name=fedavg")
    page = html_page(AuditOfRun("<script>x</script>", recipe, (), None, (), ("<b>",)))
    assert "<script>x" not in page and "<b>" not in page.split("What is not protected")[1].split("</ul>")[0]
