"""Bad recipes are answered with file, line, field, reason and the nearest name; good ones survive a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedlm.errors import RecipeError
from fedlm.recipe.load import InvalidRecipeError, diff_recipes, dump_recipe, load_recipe, recipe_hash
from fedlm.recipe.schema import Recipe
from fedlm.recipe.starters import read_template

GOOD = """\
name: demo
task: instruct
model:
  source: models/tiny
data:
  sources:
    - path: data/*.jsonl
      columns: {question: q, choices: options, answer: key}
  partition:
    kind: dirichlet
    silos: 4
training:
  lr: 5e-4
  steps: 5
federation:
  rounds: 4
  algorithm:
    name: fedavg
evaluation:
  metrics: [loss, choice]
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return _write


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_good(write) -> None:
    recipe = load_recipe(write(GOOD))
    assert recipe.training.lr == 5e-4
    assert recipe.data.partition is not None and recipe.data.partition.silos == 4


def test_a_models_local_paths_start_from_the_recipes_folder(write) -> None:
    path = write(GOOD)
    assert load_recipe(path).model.source == str(path.parent / "models/tiny")
    (path.parent / "b.gguf").touch()
    assert load_recipe(path, ["model.source=b.gguf"]).model.source == str(path.parent / "b.gguf")
    for source in ("smollm2-135m-instruct", "pypi:a==1!b.gguf"):
        changes = [f"model.source={source}", f"model.sha256='{'a1' * 32}'"]
        assert load_recipe(path, changes).model.source == source


# (line to replace, its replacement, what the error must say)
FAULTS = [
    ("  lr: 5e-4", "  lrr: 5e-4", ":13: training.lrr: unknown field, did you mean 'lr'"),
    ("  lr: 5e-4", "  lr: fast", ":13: training.lr: must be a valid number, got fast"),
    ("  lr: 5e-4", "  lr: true", ":13: training.lr: must be a valid number, got true"),
    ("  lr: 5e-4", "  lr: -1", ":13: training.lr: must be greater than 0, got -1"),
    ("  lr: 5e-4", "  lr: .inf", ":13: '.inf' is not a finite number"),
    ("  lr: 5e-4", "  schedule: cosin", "training.schedule: unknown value 'cosin', did you mean 'cosine'"),
    ("  steps: 5", '  steps: "5"', ":14: training.steps: must be a valid integer, got the text '5'"),
    ("  steps: 5", "  steps: 5\n  epochs: 1", ":12: training: give exactly one of `steps` and `epochs`"),
    ("[loss, choice]", "[loss, rouge]", "metric 'rouge' needs sources mapped to messages, or to prompt + response"),
    ("  steps: 5", "  steps: 5\n  momentum: 0.9", "training.momentum: has no effect with 'adamw'"),
    ("name: demo", "name: 2024", ":1: name: must be text, got 2024: quote it"),
    ("name: demo", "name: my run", ":1: name: 'my run' does not fit a name"),
    ("name: demo\n", "", ": name: this field is required and missing"),
    (
        "    name: fedavg",
        "    name: fedavgg",
        ":18: federation.algorithm.name: unknown algorithm 'fedavgg', did",
    ),
    ("    name: fedavg", "    name: fedavg\n    mu: 0.3", ":19: federation.algorithm.mu: has no effect with 'fedavg'"),
    (
        "  rounds: 4",
        "  sample: some",
        ":16: federation.sample: must be 'all', a valid integer or a valid number",
    ),
    ("  rounds: 4", "  sample: 5", ":16: federation.sample: 5 silos per round cannot be drawn from 4"),
    ("  rounds: 4", "  oversample: 0.5", ":16: federation.oversample: has no effect with `sample: all`"),
    ("[loss, choice]", "[loss, choise]", ":20: evaluation.metrics.1: unknown value 'choise', did you mean 'choice'"),
    (
        "{question: q, choices: options, answer: key}",
        "{prompt: p, response: r}",
        "metric 'choice' needs sources",
    ),
    ("{question: q, choices: options, answer: key}", "{question: q, text: t}", "map rows in exactly one way"),
    ("question: q", 'question: "{q:.400"', ":8: data.sources.0.columns.question: is not a template"),
    ("task: instruct", "task: pretrain", "data.sources.0.columns: task 'pretrain' cannot learn from choice rows"),
    ("models/tiny", "hub:a/b", ":3: model.revision: a hub source must be pinned"),
    ("models/tiny", "hub:a/b\n  revision: main", ":5: model.revision: must be a commit, 40 lower-case hex digits"),
    ("models/tiny", "~nouser/m", "model.source: this path cannot be used"),
    ("models/tiny", "m" * 300, "model.source: this path cannot be used"),
    ("models/tiny", '""', ":4: model.source: must not be empty"),
    ("data/*.jsonl", '""', ":7: data.sources.0.path: must not be empty"),
    ("data/*.jsonl", '"**x.jsonl"', ":7: data.sources.0.path: '**' must be a part of its own"),
    ("data/*.jsonl", "hub:a/b\n      revision: v1.0", ":8: data.sources.0.revision: must be a commit"),
    (
        "data/*.jsonl",
        f"hub:a/b\n      revision: '{'a1' * 20}'\n      encoding: latin-1",
        ":9: data.sources.0.encoding: has no",
    ),
    ("data/*.jsonl", "a.parquet\n      encoding: latin-1", ":8: data.sources.0.encoding: has no effect on Parquet"),
    ("data/*.jsonl", f"a.jsonl\n      sha256: '{'a1' * 32}'", ":8: data.sources.0.sha256: has no effect"),
    (
        "question: q,",
        'question: "{q[0]}",',
        ":8: data.sources.0.columns.question: the template's 'q[0]' is not a plain",
    ),
    ("question: q,", 'question: "{q:,}",', "columns.question: the template's format ',' is not accepted"),
    ("question: q,", 'question: "{}",', "columns.question: has empty braces"),
    (
        "question: q,",
        "question: {q},",
        "columns.question: must be text, got a mapping: quote a text that begins with {",
    ),
    ("    silos: 4", "    silos: 4\n    by: '{a!r}'", ":12: data.partition.by: the template's 'a' is not a plain"),
    ("task: instruct", "adapter: {kind: full, targets: [q_proj]}", ":2: adapter.targets: has no effect with 'full'"),
    ("  steps: 5", "  steps: 5\n  schedule: constant\n  final_lr: 0.1", ":16: training.final_lr: has no effect with"),
    (
        "  metrics: [",
        "  max_new_tokens: 8\n  metrics: [",
        "max_new_tokens: has no effect without one of the metrics exact_match, f1, generation, rouge",
    ),
    ("models/tiny", "pypi:a==1!x.gguf", ":3: model.sha256: a registry package must be pinned"),
    ("models/tiny", "pypi:a!x.gguf", ":4: model.source: 'pypi:a!x.gguf' is not of the form 'pypi:name==version!"),
    ("models/tiny", "hf:a/b", ":4: model.source: unknown kind of source 'hf:'"),
    ("  source: models/tiny", "  source: a\n  sha256: ABC", ":5: model.sha256: 'ABC' does not fit a SHA-256"),
    ("    silos: 4", "    silo: 4", ":11: data.partition.silo: unknown field, did you mean 'silos'"),
    (
        "    silos: 4",
        "    silos: 4\n    shards_per_silo: 3",
        "has no effect on a 'dirichlet' partition",
    ),
    ("    silos: 4", "    silos: 4\n    by: x\n    pattern: '^[a-z]+'", "pattern: has no group"),
    ("    silos: 4", "    by: x", ":9: data.partition: a 'dirichlet' partition needs `silos`"),
    ("model:\n  source: models/tiny", "model: tiny", ":3: model: must be a mapping of fields, got tiny"),
]


@pytest.mark.parametrize(("old", "new", "expected"), FAULTS, ids=[new.strip()[:40] for _, new, _ in FAULTS])
def test_faults(write, old: str, new: str, expected: str) -> None:
    assert GOOD.count(old) >= 1
    path = write(GOOD.replace(old, new, 1))
    message = complaint(path)
    assert message.startswith((f"{path}:", "model."))  # the model's place on this machine is looked at after the rest
    assert expected in message


def test_all_faults_are_listed_in_the_order_of_the_file(write) -> None:
    text = GOOD.replace("lr: 5e-4", "lrr: 5e-4").replace("name: fedavg", "name: fedag").replace("steps: 5", "steps: 0")
    with pytest.raises(InvalidRecipeError) as caught:
        load_recipe(write(text))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["13", "14", "18"]
    assert len(caught.value.problems) == 3


TEXTS = [
    (b"", "the recipe is empty"),
    (b"# only a comment\n", "the recipe is empty"),
    (b"- a\n- b\n", "a recipe is a mapping"),
    (b"name: a\nname: b\n", ":2: 'name' is given twice, first on line 1"),
    (b"model:\n  source: a\n  source: b\n", ":3: 'model.source' is given twice, first on line 2"),
    (b"model:\n\tsource: a\n", ":2: a tab indents this line"),
    (b"name: a\nmodel: b: c\n", ":2: this is not YAML"),
    (b"name: 'a\n", "this is not YAML"),
    (b"name: a\n---\nname: b\n", "more than one YAML document"),
    (b"name: caf\xe9\n", ":1: the file is not UTF-8 text (byte 0xe9)"),
    (b"name: !!python/object/apply:os.system [ls]\n", ":1: the YAML tag"),
    (b"name: !secret x\n", "the YAML tag '!secret' is not allowed"),
    (b"name: a\x00b\n", "this is not YAML"),
    (b"? [a, b]\n: c\n", "a key must be a plain word"),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS, ids=[repr(t)[:30] for t, _ in TEXTS])
def test_files_that_are_no_recipe(write, text: bytes, expected: str) -> None:
    assert expected in complaint(write(text))


def test_alias_bomb_is_refused_quickly(write) -> None:
    text = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
    assert "too large" in complaint(write(text))


def test_endless_alias_is_refused(write) -> None:
    assert "too large" in complaint(write("a: &a [*a]\n"))


def test_deep_nesting_is_refused(write) -> None:
    assert "recipe.yaml" in complaint(write("a: " + "[" * 5000 + "]" * 5000))


def test_aliases_may_share_columns(write) -> None:
    text = GOOD.replace("columns: {question", "columns: &c {question").replace(
        "  partition:", "    - path: more.jsonl\n      columns: *c\n  partition:"
    )
    recipe = load_recipe(write(text))
    assert recipe.data.sources[0].columns == recipe.data.sources[1].columns


def test_missing_file_names_the_nearest(write, tmp_path: Path) -> None:
    write(GOOD)
    assert "did you mean 'recipe.yaml'?" in complaint(tmp_path / "recipee.yaml")
    assert "there is no such file" in complaint(tmp_path / "nowhere" / "x.yaml")
    assert "this is a folder" in complaint(tmp_path)


def test_override(write) -> None:
    path = write(GOOD)
    recipe = load_recipe(path, ["training.lr=1e-3", "data.sources.0.max_rows=5", "adapter.targets=[q_proj, v_proj]"])
    assert recipe.training.lr == 1e-3
    assert recipe.data.sources[0].max_rows == 5
    assert recipe.adapter.targets == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.lrr=1", "unknown field 'training.lrr': did you mean 'lr'?"),
        ("trainig.lr=1", "unknown field 'trainig': did you mean 'training'?"),
        ("training.lr", "an override is written path=value"),
        ("training.lr.x=1", "'training.lr' has no fields below it"),
        ("data.sources.7.max_rows=1", "'data.sources' is a list of 1: use an index 0 to 0, not '7'"),
        ("data.sources.first.max_rows=1", "use an index 0 to 0, not 'first'"),
        ("data.sources.².max_rows=1", "use an index 0 to 0, not '²'"),
        ("data.silos.0.name=a", "is empty"),
        ("training.lr=fast", "--set training.lr: training.lr: must be a valid number"),
        ("training={lrr: 1}", "--set training: training.lrr: unknown field"),
        ("training.lr=[", "cannot read '[' as a YAML value"),
    ],
)
def test_bad_override(write, override: str, expected: str) -> None:
    assert expected in complaint(write(GOOD), override)


def test_dump_loads_back_equal(write) -> None:
    recipe = load_recipe(write(GOOD))
    again = load_recipe(write(dump_recipe(recipe)))
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


@settings(max_examples=50, deadline=None)
@example(question="\x85", lr=1.0, seed=0)
@example(question="", lr=1.0, seed=2**63 - 1)
@given(
    question=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="{}"), max_size=40),
    lr=st.floats(1e-12, 1e6),
    seed=st.integers(0, 2**63 - 1),
)
def test_dump_keeps_any_text_and_number(tmp_path_factory, question: str, lr: float, seed: int) -> None:
    folder = tmp_path_factory.mktemp("dump")
    (folder / "good.yaml").write_text(GOOD)
    data = load_recipe(folder / "good.yaml").model_dump(mode="json")
    data["data"]["sources"][0]["columns"]["question"] = question
    data["training"]["lr"], data["seed"] = lr, seed
    recipe = Recipe.model_validate(data)
    (folder / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(folder / "again.yaml") == recipe
    with pytest.raises(ValueError, match="seed"):  # which could not be read back
        Recipe.model_validate(data | {"seed": 2**63})


def test_hash_ignores_comments_order_and_written_defaults(write) -> None:
    plain = recipe_hash(load_recipe(write(GOOD)))
    other = "# comment\nseed: 0\n" + GOOD.replace("  lr: 5e-4\n  steps: 5", "  steps: 5\n  lr: 0.0005")
    assert recipe_hash(load_recipe(write(other))) == plain
    assert recipe_hash(load_recipe(write(GOOD), ["seed=1"])) != plain


def test_diff_says_what_changed(write) -> None:
    path = write(GOOD)
    a = load_recipe(path)
    assert diff_recipes(a, a) == []
    assert diff_recipes(a, load_recipe(path, ["training.lr=1e-3"])) == ["training.lr: 0.0005 -> 0.001"]
    b = load_recipe(path, ["federation.sample=2", "data.sources.0.path=x.jsonl"])
    assert diff_recipes(a, b) == ['data.sources.0.path: "data/*.jsonl" -> "x.jsonl"', 'federation.sample: "all" -> 2']


def test_a_reward_model_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipes" / "reinforce.yaml"
    path.parent.mkdir()
    path.write_text(read_template("reinforce"))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path, ["reinforce.reward={kind: model, run: ../runs/judge}"])
    assert recipe.reinforce.reward.run == str(tmp_path / "runs" / "judge")
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
