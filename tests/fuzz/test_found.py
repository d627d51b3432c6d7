"""Faults that hostile messages have found, each a test of its own."""

from __future__ import annotations

import json
import logging
import struct
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm import logs
from fedlm.errors import DataError, NetworkError, RecipeError, RunError
from fedlm.federation.engines.flare.enrol import _invited, _zip_json
from fedlm.federation.engines.flare.envelope import pack, unpack
from fedlm.federation.engines.flare.kit import read_kit
from fedlm.federation.engines.flare.silo_relay import SiloRelay, listen
from fedlm.federation.engines.lazy import FileTensors, checked_tensors, parts_of
from fedlm.federation.engines.lines import spooled
from fedlm.federation.rundir import Checkpoint, Progress, RunDir
from fedlm.federation.silo import agreements
from fedlm.federation.silo.own import parse_recipe
from fedlm.federation.silo.pairs import PairTables
from fedlm.federation.silo.policy import Policy
from fedlm.federation.silo.refusals import Forbidden
from fedlm.federation.silo.spent import Spent
from fedlm.federation.silo.state import StateStore, Trained
from fedlm.files import sha256_file
from fedlm.messages import Reply, Request
from fedlm.recipe.capacity import parse_capacity
from fedlm.recipe.load import build_recipe
from fedlm.recipe.yamltree import Tree, parse_value, parse_yaml
from tests.fuzz.hostile import in_time

BASE: dict[str, Any] = {
    "name": "r",
    "model": {"source": "smollm2-135m-instruct"},
    "data": {"at_silos": True},
    "training": {"steps": 4},
}
DEEP = b"[" * 100_000


def tensors(path: Path, header: Any, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


# ------------------------------------------------------------------------------------------------ hangs


@pytest.mark.parametrize("text", ["a: [" + "1," * 490_000 + "1]", "a: " + "[" * 490_000, "- " * 300_000])
def test_reading_a_large_yaml_file_ends_at_its_bound(text: str) -> None:
    """It took half a minute of processor time, since the bound was looked at afterwards."""
    with in_time(), pytest.raises(RecipeError, match=r"20,000 values|nested too deeply|a mapping"):
        parse_yaml(text, "x.yaml")


def test_a_recipe_of_unknown_fields_is_refused_at_once() -> None:
    """Each one looked for its nearest name: minutes for what fits into one request."""
    with in_time(), pytest.raises(RecipeError) as refusal:
        build_recipe(Tree({**BASE, **{f"fiel{n}": 1 for n in range(15_000)}}))
    assert "there are 14950 faults more" in str(refusal.value) and str(refusal.value).count("\n") < 60


def test_a_shape_of_huge_numbers_is_not_multiplied_out(tmp_path: Path) -> None:
    """A header of some MiB held millions of digits, whose product took for ever."""
    shape = b",".join([b"9" * 4000] * 500)
    header = b'{"w":{"dtype":"U8","shape":[' + shape + b'],"data_offsets":[0,1]}}'
    with in_time(), pytest.raises(ValueError):
        FileTensors(tensors(tmp_path / "x", header, b"\0"))


# ------------------------------------------------------------------------------------------------ memory


def test_merges_that_double_are_refused() -> None:
    """Forty pairs of numbers asked for a string of 2^40 letters."""
    doubling = [[97, 97], *([256 + n, 256 + n] for n in range(40))]
    none = torch.zeros(0, dtype=torch.int32)
    asked = {"merges": torch.tensor(doubling, dtype=torch.int32), "rows": none, "columns": none}
    with pytest.raises(DataError, match="one of more than 1024 letters"):
        PairTables().answer("s", [{"text": "aaaa"}], "text", asked)


def test_a_requests_identity_is_short(tmp_path: Path) -> None:
    """256 of 32 MiB were kept."""
    relay = SiloRelay("a", tmp_path / "spool", listen(tmp_path / "s"))
    words = {"silo": "a", "verb": "train", "run": "r", "round": 0, "attempt": 0, "fields": {}}
    ask = {"op": "ask", "id": "x" * 10_000, "request": words, "retries": 0, "patience": 1.0, "tensors": None}
    assert "malformed" in unpack(relay.handle(pack(ask)))[0]["error"] and not relay._asked
    assert unpack(relay.handle(pack({**ask, "id": "x" * 300})))[0]["state"] == "running"
    relay._listener.close()


# ------------------------------------------------------------------------------------------------ other exceptions


def test_an_endless_number_is_no_budget() -> None:
    """OverflowError, in a recipe and at a silo's door."""
    with pytest.raises(RecipeError):
        parse_capacity({"memory": "9" * 400 + "GB"})
    with pytest.raises(RecipeError, match="no amount of memory"):
        build_recipe(Tree({**BASE, "federation": {"capacity": {"default": {"memory": "9" * 400 + "GB"}}}}))


def test_a_version_of_yaml_that_is_none_is_a_sentence() -> None:
    """The library looked it up in a table, and KeyError came out."""
    with pytest.raises(RecipeError, match="asks for another version"):
        parse_yaml("data:\n%YAML 9.9\n---\na: 1\n", "x.yaml")
    with pytest.raises(RecipeError, match="cannot read"):
        parse_value("a: 1\n%YAML 9.9\n---\nb", "--set")


def test_half_a_surrogate_pair_is_refused_as_what_it_is() -> None:
    """UnicodeEncodeError, where pydantic puts the text into its message: in a capacity at a silo's door, and in any
    field of a file that writes it as an escape."""
    with pytest.raises(RecipeError, match="no such description"):
        parse_capacity({"memory": "\ud800"})
    with pytest.raises(RecipeError, match=r"x\.yaml:1: this text holds half a surrogate pair"):
        parse_yaml('memory: "\\ud800"', "x.yaml")


@pytest.mark.parametrize("number", ["0x" + "f" * 20_000, "0b" + "1" * 20_000, "9" * 30, "-" + "9" * 30])
def test_integers_of_a_file_have_64_bits(number: str) -> None:
    """Python reads such a number in hexadecimal, and raises where a sentence or a hash would write it down."""
    for read in (lambda: parse_yaml(f"seed: {number}", "x.yaml"), lambda: parse_value(number, "--set")):
        with pytest.raises(RecipeError, match="too large a number"):
            read()
    assert parse_yaml("seed: 9223372036854775807", "x").data == {"seed": 2**63 - 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 10**4000},
        {"federation": {"rounds": 2**63}},
        {"name": "\ud800"},
        {"surprise": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]},
        {"surprise": float("nan")},
        {"surprise": [0] * 20_001},
    ],
)
def test_a_recipe_over_the_wire_has_the_bounds_of_a_file(changes: dict[str, Any]) -> None:
    parse_recipe(BASE)
    with pytest.raises(Forbidden, match=r"^the recipe: this "):
        parse_recipe({**BASE, **changes})


@pytest.mark.parametrize(
    "about",
    [
        {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": ["1"], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [float("inf")], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [1], "data_offsets": [0, 1.0]},
        {"dtype": "U8", "shape": [1] * 100, "data_offsets": [0, 1]},
        {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "": [[[[]]]]},
    ],
)
def test_sizes_are_whole_numbers_and_types_known(tmp_path: Path, about: dict[str, Any]) -> None:
    """Infinity raised OverflowError; text and fractions were taken; a silo took types that no update has."""
    for read in (FileTensors, checked_tensors):
        with pytest.raises(ValueError):
            read(tensors(tmp_path / "x", {"w": about}, b"\0"))  # type: ignore[operator]


def test_tensors_do_not_lie_on_one_another(tmp_path: Path) -> None:
    """The lazy reader took overlaps, gaps, a name given twice, and names that are none."""
    one = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    two = {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}
    file = tmp_path / "x"
    assert len(parts_of(tensors(file, {"a": one, "b": two}, bytes(8)))) == 2
    twice = b'{"a":%b,"a":%b}' % (json.dumps(one).encode(), json.dumps(two).encode())
    for header, size in (
        ({"a": one, "b": one}, 4),
        ({"a": one, "b": one}, 8),
        ({"a": two}, 8),
        ({"a": one}, 8),
        (twice, 8),
        ({"a\0": one}, 4),
        ({"\x1b[2J": one}, 4),
        ({"a" * 1001: one}, 4),
    ):
        with pytest.raises(ValueError):
            FileTensors(tensors(file, header, bytes(size)))


def test_a_state_without_its_note_is_corrupt(tmp_path: Path) -> None:
    """KeyError, outside of what is caught."""
    store = StateStore(tmp_path, "s")
    store.save("run", 0, Trained("k", "d", {"a": torch.ones(2)}, {}, {}, {}, {}))
    file = tmp_path / "s/run/round-0000.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for missing in ("key", "digest", "fields"):
        note = {n: v for n, v in json.loads(header["__metadata__"]["note"]).items() if n != missing}
        tensors(file, {**header, "__metadata__": {"note": json.dumps(note)}}, data[8 + length :])
        with pytest.raises(RunError, match="stored state is corrupt"):
            store.load("run", 0)


@pytest.mark.parametrize(
    "damage",
    [{"left": {"run/0": {"x": float("nan")}}}, {"left": {"run/0": {"x": -9}}}, {"trained": [float("nan")]}, {"day": 1}],
)
def test_what_was_spent_is_counted_in_whole_numbers(tmp_path: Path, damage: dict[str, Any]) -> None:
    """NaN in the count passed every limit."""
    (tmp_path / "_spent.json").write_text(json.dumps({"day": "", "trained": [], "left": {}, **damage}))
    rules, request = Policy(max_bytes_per_round=100_000, max_rounds_per_day=9), Request("s", "train", "run", 0)
    for count in (
        lambda: Spent(tmp_path).train(rules, request, date(2026, 1, 1)),
        lambda: Spent(tmp_path).leave(rules, request, Reply("s", "train", "run", 0)),
    ):
        with pytest.raises(RunError, match="damaged"):
            count()


def test_deep_json_in_files_is_damage(tmp_path: Path) -> None:
    """RecursionError: in agreements, run.json, rounds.jsonl and checkpoints."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.json").write_bytes(DEEP)
    with pytest.raises(RunError, match="damaged"):
        agreements.load(tmp_path, "run")
    run = RunDir.create(tmp_path / "r", meta={"run": "r"}, recipe_text="name: r\n")
    run.append_round({"round": 0})
    run.save_checkpoint(Checkpoint({"w": torch.ones(2)}, {}, Progress(0)))
    run.close()
    state = tmp_path / "r/checkpoints/round-0000/state.json"
    kept = state.read_bytes()
    state.write_bytes(DEEP)
    with pytest.raises(RunError, match="corrupt"):
        run.load_checkpoint(0)
    # a model file that is none, under its own hash: SafetensorError
    model = state.with_name("model.safetensors")
    model.write_bytes(b"x" * 40)
    state.write_text(
        json.dumps({**json.loads(kept), "sha256": {**json.loads(kept)["sha256"], model.name: sha256_file(model)}})
    )
    with pytest.raises(RunError, match="corrupt"):
        run.load_checkpoint(0)
    (tmp_path / "r/rounds.jsonl").write_bytes(DEEP + b"\n" + b"{}\n")
    with pytest.raises(RunError, match="damaged"):
        run.rounds()
    (tmp_path / "r/run.json").write_bytes(DEEP)
    with pytest.raises(RunError, match="damaged"):
        RunDir.open(tmp_path / "r", write=False)


def test_kits_and_invitations_are_read_like_recipes(tmp_path: Path) -> None:
    """Deep nesting raised RecursionError, a broken deflate stream zlib.error."""
    file = tmp_path / "kit.yaml"
    for text in (DEEP.decode(), "a: " + "[" * 3000, "a: !!python/object:os.system x"):
        file.write_text(text)
        with pytest.raises(NetworkError, match="damaged"):
            read_kit(tmp_path)
        with pytest.raises(NetworkError, match="cannot be read"):
            _invited(file, tmp_path)
    packed = tmp_path / "x.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("request.json", '{"name": "hospital-a"}' + " " * 100)
    data = bytearray(packed.read_bytes())
    at = data.index(b"request.json") + len("request.json")
    data[at : at + 6] = b"\xff" * 6
    packed.write_bytes(data)
    with pytest.raises(NetworkError, match="not a request zip, or it is damaged"):
        _zip_json(packed, "request.json")


def test_a_files_name_holds_no_control_characters(tmp_path: Path) -> None:
    """A NUL, or a name too long, was left to the system, which raises ValueError or OSError where a file is opened."""
    for name in ("a\0b", "a\nb", "\ud800", "x" * 201):
        with pytest.raises(ValueError, match="bare"):
            spooled(tmp_path, name)


# ------------------------------------------------------------------------------------------------ logs


@pytest.mark.parametrize("as_json", [True, False])
def test_words_from_elsewhere_neither_end_a_line_nor_command_a_terminal(tmp_path: Path, as_json: bool) -> None:
    """A verb with '\\r', an escape sequence or half a surrogate pair: a forged line, or none at all."""
    file, root = tmp_path / "log", logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:] = []  # pytest's own would keep the torn text, which its worker processes cannot send
    try:
        logs.configure(as_json, file)
        logging.getLogger("fedlm.silo").warning(
            "'%s' is not allowed", "x\r2026 info fedlm: all is well\x1b[2J\ud800\u2028y"
        )
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = before
        root.setLevel(level)
    text = file.read_bytes().decode()
    assert text.count("\n") == 1 and "is not allowed" in text and "\\ud800" in text
    assert "\r" not in text and "\x1b" not in text
