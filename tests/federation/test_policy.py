"""What an owner allows: every line of policy.yaml refuses something, and faults of the file are told by line."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.errors import RecipeError, RunError
from fedlm.federation.silo.holdings import load_holdings
from fedlm.federation.silo.policy import (
    Policy,
    check_counting,
    check_hours,
    check_recipe,
    check_rows,
    check_verb,
    example,
    load_policy,
    local_model,
)
from fedlm.federation.silo.privacy_rules import PrivacyRules
from fedlm.federation.silo.refusals import Forbidden
from fedlm.federation.silo.spent import Spent, check_bytes, update_bytes
from fedlm.guards import get_chain
from fedlm.messages import Reply, Request
from fedlm.models.adapters import initial_tensors
from fedlm.recipe.prompting import InContextSpec
from fedlm.recipe.schema import ModelSpec, Recipe

SHA = "ab" * 32
PACKAGE = "pypi:some-model==1.0!in/model.gguf"


def recipe(**changes: Any) -> Recipe:
    data = {
        "name": "r",
        "model": {"source": "smollm2-135m-instruct"},
        "data": {"at_silos": True},
        "training": {"steps": 4},
    }
    return Recipe.model_validate({**data, **changes})


@pytest.fixture
def policy(tmp_path: Path) -> Callable[[str], Policy]:
    def read(text: str) -> Policy:
        file = tmp_path / "policy.yaml"
        file.write_text(text)
        return load_policy(file)

    return read


def test_the_example_is_the_default(policy: Callable[[str], Policy]) -> None:
    assert policy(example()) == Policy()
    named = {line.lstrip("# ").partition(":")[0] for line in example().splitlines()}
    assert named >= set(Policy.model_fields)
    assert all(name in example() for name in PrivacyRules.model_fields)


def test_by_default_small_adapters_of_pinned_models() -> None:
    check_recipe(Policy(), recipe())
    check_recipe(Policy(), recipe(adapter={"kind": "ia3"}))
    check_rows(Policy(), recipe(), 1, None)
    with pytest.raises(Forbidden, match=r"'full'.*adapters: lora, lora-sb, ia3"):
        check_recipe(Policy(), recipe(adapter={"kind": "full"}))


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("tasks: [pretrain]", {}),
        ("algorithms: [fedavg]", {"federation": {"algorithm": {"name": "scaffold"}}}),
        ("algorithms: []", {}),
        ("adapters: [ia3]", {}),
        ("max_rounds: 3", {"federation": {"rounds": 4}}),
        ("max_rank: 7", {"adapter": {"rank": 8}}),
        ("max_steps_per_round: 3", {}),
        ("any_pinned_model: false", {}),
        ("any_pinned_model: false", {"model": {"source": PACKAGE, "sha256": SHA}}),
    ],
)
def test_each_line_refuses_and_is_named(policy: Callable[[str], Policy], line: str, changes: dict[str, Any]) -> None:
    with pytest.raises(Forbidden, match=line.partition(":")[0] if "model" not in line else "models: none"):
        check_recipe(policy(line), recipe(**changes))


@pytest.mark.parametrize(
    "line", ["max_rounds: 4", "max_rank: 8", "max_steps_per_round: 4", "tasks: [instruct]", "algorithms: [fedavg]"]
)
def test_what_just_fits_is_allowed(policy: Callable[[str], Policy], line: str) -> None:
    check_recipe(policy(line), recipe())


def test_rank_is_a_matter_of_lora_alone(policy: Callable[[str], Policy]) -> None:
    check_recipe(policy("max_rank: 1"), recipe(adapter={"kind": "ia3"}))


def test_a_reward_model_of_the_coordinators_disk_is_refused(policy: Callable[[str], Policy]) -> None:
    reward = {"task": "reinforce", "reinforce": {"reward": {"kind": "model", "run": "runs/judge"}}}
    with pytest.raises(Forbidden, match="a run on the coordinator's disk"):
        check_recipe(policy("tasks: [reinforce]"), recipe(**reward))


def test_verbs(policy: Callable[[str], Policy]) -> None:
    check_verb(Policy(), "train")
    with pytest.raises(Forbidden, match="allowed: hello, evaluate"):
        check_verb(policy("allow: [hello, evaluate]"), "train")


def test_rows_and_steps(policy: Callable[[str], Policy]) -> None:
    with pytest.raises(Forbidden, match="min_rows: 20"):
        check_rows(policy("min_rows: 20"), recipe(), 19, None)
    check_rows(policy("min_rows: 20"), recipe(), 20, None)
    epochs = recipe(training={"epochs": 2.0, "batch_size": 4})
    check_rows(policy("max_steps_per_round: 10"), epochs, 20, 20)
    with pytest.raises(Forbidden, match="11 steps per round"):
        check_rows(policy("max_steps_per_round: 10"), epochs, 20, 21)


# ------------------------------------------------------------------------------------------------ hours

MADRID = "timezone: Europe/Madrid\n"


@pytest.mark.parametrize(
    ("hours", "now", "opens"),
    [
        # UTC+1 in winter; 5 January 2026 is a Monday
        ("['07:00-19:00 Mon-Fri']", "2026-01-05T05:59", None),
        ("['07:00-19:00 Mon-Fri']", "2026-01-05T06:00", "2026-01-05 19:00"),
        ("['07:00-19:00 Mon-Fri']", "2026-01-05T17:59", "2026-01-05 19:00"),
        ("['07:00-19:00 Mon-Fri']", "2026-01-05T18:00", None),
        ("['07:00-19:00 Mon-Fri']", "2026-01-04T12:00", None),
        ("['07:00-19:00']", "2026-01-04T12:00", "2026-01-04 19:00"),
        # past midnight, a day that ends where another stretch begins, and a range over the end of the week
        ("['22:00-06:00 Fri']", "2026-01-10T04:00", "2026-01-10 06:00"),
        ("['22:00-06:00 Fri']", "2026-01-09T04:00", None),
        ("['00:00-24:00 Sat,Sun', '00:00-07:30 mon']", "2026-01-10T10:00", "2026-01-12 07:30"),
        ("['00:00-24:00 Fri-Mon']", "2026-01-09T10:00", "2026-01-13 00:00"),
        # 29 March: clocks go from 02:00 to 03:00, so what ends at 02:30 ends at 03:30; 25 October: from 03:00 to 02:00
        ("['01:00-02:30 Sun']", "2026-03-29T00:30", "2026-03-29 03:30"),
        ("['01:00-02:30 Sun']", "2026-10-25T00:45", None),
    ],
)
def test_quiet_hours_by_the_clock_of_a_place(
    policy: Callable[[str], Policy], hours: str, now: str, opens: str | None
) -> None:
    rules, moment = policy(f"{MADRID}quiet_hours: {hours}"), datetime.fromisoformat(now).replace(tzinfo=UTC)
    if opens is None:
        check_hours(rules, moment)
        return
    with pytest.raises(Forbidden, match=f"answers again at {opens} Europe/Madrid") as refusal:
        check_hours(rules, moment)
    assert refusal.value.line == "quiet_hours"


def test_without_quiet_hours_it_always_answers() -> None:
    check_hours(Policy(), datetime(2026, 1, 5, 12, tzinfo=UTC))


# ------------------------------------------------------------------------------------------------ privacy


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("privacy: {require_masks: true}", "privacy.require_masks", "only under masks.*no guard 'mask'"),
        ("min_cohort: 2", "min_cohort", "a sum of 2 silos"),
        ("privacy: {max_epsilon: 8, per: year}", "privacy.max_epsilon", "epsilon of 8 per year.*does not bound it"),
        ("privacy: {unit: example}", "privacy.unit", "each row is protected.*no section `privacy`"),
    ],
)
def test_what_no_recipe_can_do_yet_refuses_every_recipe(
    policy: Callable[[str], Policy], text: str, line: str, told: str
) -> None:
    rules = policy(f"{text}\nallow: [hello, pairs]")
    for changes in ({}, {"guards": [{"name": "int8"}]}, {"federation": {"sample": 3}}, {"adapter": {"kind": "ia3"}}):
        with pytest.raises(Forbidden, match=told) as refusal:
            check_recipe(rules, recipe(**changes))
        assert refusal.value.line == line
    with pytest.raises(Forbidden, match=told):
        check_counting(rules, recipe())


EQUAL = {"algorithm": {"name": "fedavg", "weights": "equal"}}
ITS_OWN = {"steps": 4, "clip_norm": None}
BUDGET = {"epsilon": 8, "delta": 0.001}
PROMISES: dict[str, dict[str, Any]] = {
    "none": {},
    "example": {"training": ITS_OWN, "privacy": {"unit": "example", **BUDGET}},
    "user": {"training": ITS_OWN, "privacy": {"unit": "user", "user": "who", **BUDGET}, "federation": EQUAL},
    "silo": {"privacy": {"unit": "silo", **BUDGET}, "federation": EQUAL},
    "masked silo": {"privacy": {"unit": "silo", **BUDGET}, "federation": EQUAL, "guards": [{"name": "mask"}]},
    "mask": {"guards": [{"name": "mask"}]},
}
"""What recipes may promise, the strongest and the weakest of it."""


@pytest.mark.parametrize(
    ("unit", "enough", "whose"),
    [
        ("example", {"example", "user"}, "each row is"),
        ("user", {"user"}, "all rows of a person together are"),
        ("silo", {"masked silo"}, "the silo as a whole is"),
    ],
)
def test_an_owner_insists_on_whose_data_is_protected(
    policy: Callable[[str], Policy], unit: str, enough: set[str], whose: str
) -> None:
    """Only by noise of the silo's own: the coordinator's is none of what the owner can rely on."""
    rules = policy(f"privacy: {{unit: {unit}}}\nallow: [hello, pairs]")
    said = {
        "none": "no section `privacy`",
        "mask": "no section `privacy`",
        "silo": "leaves noise to the coordinator",
        "masked silo": "has `privacy.unit: silo`",
    }
    for name, promise in PROMISES.items():
        check_recipe(policy("min_rows: 1"), recipe(**promise))  # it is this line alone that refuses
        for check in (check_recipe, check_counting):
            if name in enough:
                check(rules, recipe(**promise))
                continue
            with pytest.raises(Forbidden) as refusal:
                check(rules, recipe(**promise))
            told = str(refusal.value)
            assert refusal.value.line == "privacy.unit"
            assert whose in told and f"(privacy.unit: {unit})" in told and "; it needs `privacy.unit: " in told
            assert said.get(name, f"has `privacy.unit: {name}`") in told


@pytest.mark.parametrize("line", ["unit: example", "max_epsilon: 50"])
def test_figures_outside_the_guarantee_are_not_protected(policy: Callable[[str], Policy], line: str) -> None:
    rules = policy(f"privacy: {{{line}}}")
    opened = recipe(training=ITS_OWN, privacy={"unit": "example", "figures": "open", **BUDGET})
    check_recipe(policy("min_rows: 1"), opened)
    check_recipe(rules, recipe(**PROMISES["example"]))
    with pytest.raises(Forbidden, match=r"figures leave outside .*privacy\.figures: open") as refusal:
        check_recipe(rules, opened)
    assert refusal.value.line == f"privacy.{line.split(':')[0]}"


def test_text_in_context_needs_as_much_noise_as_the_owner_asks_for(policy: Callable[[str], Policy]) -> None:
    rules = policy("allow: [hello, answer]\nprivacy: {max_token_epsilon: 20}")
    columns = {"question": "q", "choices": "c", "answer": "a"}
    queries = {"path": "asked.jsonl", "columns": columns}

    def asked(epsilon: float | None) -> Recipe:
        return recipe().model_copy(update={"in_context": InContextSpec(queries=queries, token_epsilon=epsilon)})

    (
        check_recipe(rules, asked(20.0)),
        check_recipe(rules, recipe()),
        check_recipe(policy("allow: [answer]"), asked(None)),
    )
    for epsilon, told in ((None, "asks for no noise"), (21.0, "has an epsilon of 21 a token")):
        with pytest.raises(Forbidden, match=told) as refusal:
            check_recipe(rules, asked(epsilon))
        assert refusal.value.line == "privacy.max_token_epsilon"


# ------------------------------------------------------------------------------------------------ bytes and days


@pytest.mark.parametrize(
    "changes", [{}, {"guards": [{"name": "int8"}]}, {"guards": [{"name": "topk", "density": 0.1}, {"name": "int4"}]}]
)
def test_an_updates_bytes_are_known_from_its_shapes(tiny_model_dir: Path, changes: dict[str, Any]) -> None:
    """Those of what the guards make of such an update: its tensors, without their names."""
    made = recipe(model={"source": str(tiny_model_dir)}, **changes)
    values = initial_tensors(made)
    chain = get_chain(made.guards)
    payload = values if chain is None else chain.encode(values, (0, "x"))
    assert update_bytes(made) == sum(t.nbytes for t in payload.values())
    check_bytes(Policy(max_bytes_per_round=update_bytes(made)), made)
    with pytest.raises(Forbidden, match="max_bytes_per_round") as refusal:
        check_bytes(Policy(max_bytes_per_round=update_bytes(made) - 1), made)
    assert refusal.value.line == "max_bytes_per_round"
    check_bytes(Policy(), made)


def test_where_shapes_say_nothing_what_leaves_is_counted_alone(tiny_model_dir: Path) -> None:
    made = recipe(model={"source": str(tiny_model_dir)}, adapter={"kind": "prompt"})
    assert update_bytes(made) is None
    check_bytes(Policy(max_bytes_per_round=1), made)


def test_what_leaves_is_counted_by_the_round(tmp_path: Path) -> None:
    spent, rules = Spent(tmp_path), Policy(max_bytes_per_round=3000)

    def leave(round_: int, size: int, run: str = "r", mark: str = "") -> None:
        request = Request("s", "evaluate", run, round_, fields={"mark": mark})
        Spent(tmp_path).leave(
            rules, request, Reply("s", "evaluate", run, round_, tensors={"x": torch.zeros(size // 4)})
        )

    leave(0, 1000)  # and 1024 of fields
    leave(0, 1000)  # a repeat
    with pytest.raises(Forbidden, match="max_bytes_per_round: 3000"):
        leave(0, 1000, mark="other")
    leave(1, 1900)
    leave(0, 1900, run="other")
    with pytest.raises(Forbidden):
        leave(2, 2000)
    assert (tmp_path / "_spent.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "_spent.json").write_text("[")
    with pytest.raises(RunError, match="damaged"):
        leave(3, 10)
    spent.leave(Policy(), Request("s", "evaluate", "r", 0), Reply("s", "evaluate", "r", 0))  # no limit, no file needed


def test_trainings_are_counted_by_the_day(tmp_path: Path) -> None:
    rules = Policy(max_rounds_per_day=2)

    def train(round_: int, day: int, attempt: int = 0, value: float = 0.0) -> None:
        request = Request("s", "train", "r", round_, attempt, {"x": torch.tensor([value])})
        Spent(tmp_path).train(rules, request, date(2026, 1, day))

    train(0, 1)
    train(0, 1)  # a repeat
    train(0, 1, value=1.0)  # the same round with other content is another training
    with pytest.raises(Forbidden, match="trained 2 times today") as refusal:
        train(1, 1)
    assert refusal.value.line == "max_rounds_per_day"
    train(0, 1)  # what was asked before is answered from the store
    train(1, 2)
    Spent(tmp_path).train(rules, Request("s", "evaluate", "r", 0), date(2026, 1, 2))


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    "model",
    [
        {"source": "smollm2-135m-instruct"},
        {"source": PACKAGE, "sha256": SHA},
        {"source": "hub:owner/name", "revision": "0" * 40},
    ],
)
def test_what_is_pinned_to_its_bytes_may_be_fetched(model: dict[str, str]) -> None:
    spec = recipe(model=model).model
    assert local_model(Policy(), spec) == spec


@pytest.mark.parametrize("source", ["/srv/secret", "./x.gguf", "x.gguf", "~/model", "somewhere", "a\\b"])
def test_a_recipe_never_chooses_a_place_here(source: str) -> None:
    with pytest.raises(Forbidden, match="lies on the coordinator's disk"):
        local_model(Policy(), ModelSpec(source=source))


def test_the_owner_supplies_models(policy: Callable[[str], Policy], tmp_path: Path) -> None:
    """By the name in the recipe; a path also goes by its last part, but what is pinned only by its whole name."""
    (tmp_path / "base").mkdir()
    rules = policy(f"models: {{ours: base, smollm2-135m-instruct: {tmp_path}/base, model.gguf: base}}")
    here = str((tmp_path / "base").resolve())
    for source in ("ours", "/at/the/coordinator/ours", "/at/the/coordinator/ours/", "smollm2-135m-instruct"):
        assert local_model(rules, ModelSpec(source=source, sha256=SHA)) == ModelSpec(source=here)
    assert local_model(rules, ModelSpec(source=PACKAGE, sha256=SHA)).source == PACKAGE


def test_only_the_listed_models(policy: Callable[[str], Policy]) -> None:
    rules = policy(f"any_pinned_model: false\nmodels: {{'{PACKAGE}': pinned, elsewhere: pinned}}")
    assert local_model(rules, ModelSpec(source=PACKAGE, sha256=SHA)).source == PACKAGE
    with pytest.raises(Forbidden, match="models: pypi:some"):
        local_model(rules, recipe().model)
    with pytest.raises(Forbidden, match="coordinator's disk"):
        local_model(rules, ModelSpec(source="elsewhere"))


def test_chat_templates_come_from_the_owner_too(policy: Callable[[str], Policy], tmp_path: Path) -> None:
    def asked(template: str) -> ModelSpec:
        return ModelSpec(source="smollm2-135m-instruct", chat_template=template)

    assert local_model(Policy(), asked("chatml")).chat_template == "chatml"
    with pytest.raises(Forbidden, match=r"'ward\.jinja' is a file"):
        local_model(Policy(), asked("/etc/ward.jinja"))
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    rules = policy("chat_templates: {ward.jinja: mine.jinja}")
    assert local_model(rules, asked("/x/ward.jinja")).chat_template == str((tmp_path / "mine.jinja").resolve())


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("allow: [hello]\nmax_ranks: 3\n", ":2: max_ranks: unknown field, did you mean 'max_rank'"),
        ("max_rounds: 0", ":1: max_rounds: must be greater than or equal to 1|:1: max_rounds: must be greater than 0"),
        ("max_rounds: yes", "max_rounds: must be a valid integer"),
        ("allow: [hello, generate]", "unknown value 'generate'"),
        ("algorithms: [fedavgg]", "unknown algorithm 'fedavgg', did you mean 'fedavg'"),
        ("models: {x: nowhere}", "models.x: there is no folder or file 'nowhere'"),
        ("chat_templates: {x: .}", "chat_templates.x: there is no file"),
        ("models: {x: a, x: b}", "given twice"),
        ("allow: [hello]\nquiet_hours: [7-19]\n", r":2: quiet_hours\.0: '7-19' are no hours"),
        ("quiet_hours: ['07:60-19:00']", "no hours of a day"),
        ("quiet_hours: ['07:00-25:00']", "no hours of a day"),
        ("quiet_hours: ['07:00-07:00']", "no hours of a day"),
        ("quiet_hours: ['07:00-19:00 Mon-Frei']", "'Mon-Frei' are no days"),
        ("quiet_hours: ['00:00-24:00']", "no minute of the week"),
        ("quiet_hours: ['06:00-20:00', '20:00-06:00 Mon-Sun']", "no minute of the week"),
        ("timezone: Europe/Atlantis", ":1: timezone: 'Europe/Atlantis' is no time zone"),
        ("timezone: ../../etc/passwd", "is no time zone"),
        ("max_bytes_per_round: 0", ":1: max_bytes_per_round"),
        ("max_rounds_per_day: 1.5", ":1: max_rounds_per_day"),
        ("min_cohort: 0", ":1: min_cohort"),
        ("privacy:\n  max_epsilon: -1\n", r":2: privacy\.max_epsilon"),
        ("privacy:\n  unit: person\n", r":2: privacy\.unit"),
        ("privacy: {per: week}", "unknown value 'week'"),
        ("", "the policy is empty.*fedlm silo policy --example"),
        ("- a", "a policy is a mapping"),
        ("min_rows: !!python/object:os.system x", "tag"),
    ],
)
def test_faults_of_a_policy(policy: Callable[[str], Policy], text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        policy(text)


def test_no_such_policy(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no such file.*writes a policy"):
        load_policy(tmp_path / "policy.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sources: []", "give either `sources`"),
        ("share_of_recipe: false", "give either `sources`"),
        ("sources: [{path: a, columns: {text: t}}]\nshare_of_recipe: true", "give either `sources`"),
        ("sources: [{path: a, columns: {text: t}}]\nbase: x", "`base` belongs to"),
        ("share_of_recipe: true\nbase: nowhere", "there is no folder 'nowhere'"),
        ("sources:\n- {path: a, columns: {text: t}}\n- {path: b, columns: {txt: t}}", r":3: sources\.1\.columns\.txt"),
        ("sources:\n- {path: a, columns: {text: t}}\n- {path: 'npm:x', columns: {text: t}}", r":3: sources\.1\.path"),
        ("sources:\n- {path: a, columns: {text: t, prompt: p}}", r":2: sources\.0\.columns: map rows in exactly one"),
        ("sources: [{path: a, columns: {text: t}, role: test}]", "nothing to train on"),
        ("source: []", "unknown field, did you mean 'sources'"),
    ],
)
def test_faults_of_a_data_file(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "data.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=told):
        load_holdings(file)


def test_paths_of_a_data_file_start_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.yaml").write_text("sources: [{path: a.jsonl, columns: {text: t}}]")
    monkeypatch.chdir(tmp_path)
    text = load_holdings(Path("data.yaml"))
    monkeypatch.chdir("/")
    assert text.base == tmp_path.resolve()
