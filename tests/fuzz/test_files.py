"""What is read from files, of which some come from elsewhere and any may be damaged. As in `test_wire`: refused is one
typed error, accepted what the writer writes, everything else is a fault."""

from __future__ import annotations

import json
import shutil
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlm.errors import NetworkError, RecipeError, RunError
from fedlm.federation.engines.flare.enrol import _invited, _zip_json
from fedlm.federation.engines.flare.kit import Kit, read_kit, write_kit
from fedlm.federation.rundir import Checkpoint, Progress, RunDir
from fedlm.federation.silo import agreements
from fedlm.federation.silo.agreements import Agreement
from fedlm.federation.silo.auditlog import AuditLog, read
from fedlm.federation.silo.holdings import load_holdings
from fedlm.federation.silo.policy import Policy, example, load_policy
from fedlm.federation.silo.spent import Spent
from fedlm.federation.silo.state import StateStore, Trained
from fedlm.federation.tokenizer import _Progress
from fedlm.messages import Request
from fedlm.recipe.load import dump_recipe, load_recipe
from fedlm.recipe.starters import read_template
from tests.fuzz.hostile import ALL, FAST, changed, damaged, messages, tried, written

each = pytest.mark.parametrize("count", [FAST, pytest.param(ALL, marks=pytest.mark.slow)])


def either(honest: bytes) -> st.SearchStrategy[bytes]:
    """Damaged bytes, or, of JSON, changed content."""
    return st.one_of(damaged(honest), changed(json.loads(honest)).map(written))


@each
def test_states_of_silos(count: int, tmp_path: Path) -> None:
    """Refused: RunError. Accepted: a state with its own names, and a reply."""
    store, value = StateStore(tmp_path, "s"), torch.arange(3.0)
    parts = ({"a": value}, {"b": value + 1}, {}, {"c": value + 2})
    store.save("run", 0, Trained("run/0/0/s/train", "d", *parts, {"loss": 1.0}))
    file = tmp_path / "s/run/round-0000.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def noted(note: Any) -> bytes:
        text = json.dumps({**header, "__metadata__": {"note": json.dumps(note)}}).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    notes = changed(json.loads(header["__metadata__"]["note"])).map(noted)

    @messages(count)
    @given(damaged(whole) | notes)
    def decode(data: bytes) -> None:
        file.write_bytes(data)
        fine, found = tried(lambda: store.load("run", 0), (RunError,))
        if fine:
            assert found.rule.keys() == {"a"} and found.reply.keys() == {"c"} and isinstance(found.fields, dict)

    decode()


@each
def test_agreements(count: int, tmp_path: Path) -> None:
    """Refused: RunError. Accepted: what was agreed, by its checksum."""
    made = Agreement("run", "0.1.0", {"name": "r"}, {"weights": "w", "tokenizer": "t"}, "f", {"rank": 4})
    agreements.save(tmp_path, made)
    file = tmp_path / "run/recipe.json"

    @messages(count)
    @given(either(file.read_bytes()))
    def decode(data: bytes) -> None:
        file.write_bytes(data)
        fine, found = tried(lambda: agreements.load(tmp_path, "run"), (RunError,))
        assert not fine or found == made or json.loads(data)["agreement"] == json.loads(json.dumps(vars(found)))

    decode()


@each
def test_audit_logs(count: int, tmp_path: Path) -> None:
    """Never raises. Without a fault it is what was written, or cut at its end, which the head shows."""
    log = AuditLog(tmp_path / "log")
    for number in range(4):
        log.append({"kind": "request", "verb": "train", "round": number})
    whole, head = log.file.read_bytes(), read(log.file).head

    @messages(count)
    @given(damaged(whole))
    def decode(data: bytes) -> None:
        log.file.write_bytes(data)
        fine, found = tried(lambda: read(log.file, head), ())
        assert fine and (found.faults or data.startswith(whole))
        alone = read(log.file)
        if not alone.faults:
            assert whole.startswith(data[: len(data) - alone.unfinished])
        fine, _ = tried(lambda: log.append({"kind": "request"}), (RunError,))
        assert not fine or read(log.file).unfinished == 0
        log.file.unlink(missing_ok=True)

    decode()


@each
def test_what_was_spent(count: int, tmp_path: Path) -> None:
    """Refused: RunError: a damaged count never lets a training pass. Accepted: a day, and lists of what was counted."""
    spent, file = Spent(tmp_path), tmp_path / "_spent.json"
    rules, today = Policy(max_rounds_per_day=1), date(2026, 1, 1)
    spent.train(rules, Request("s", "train", "run", 0), today)

    @messages(count)
    @given(either(file.read_bytes()))
    def decode(data: bytes) -> None:
        file.write_bytes(data)
        tried(lambda: spent.train(Policy(max_rounds_per_day=9), Request("s", "train", "run", 1), today), (RunError,))

    decode()


@each
def test_run_directories(count: int, tmp_path: Path) -> None:
    """Refused: RunError. Accepted: a checkpoint by its hashes; lines of rounds that are whole, but for the last."""
    run = RunDir.create(tmp_path / "run", meta={"run": "r"}, recipe_text="name: r\n")
    record = {"round": 0, "seconds": 1.0}
    run.save_checkpoint(Checkpoint({"w": torch.ones(3)}, {}, Progress(0, record=record)))
    run.append_round(record)
    run.close()
    files = ["run.json", "rounds.jsonl", *(f"checkpoints/round-0000/{n}" for n in ("state.json", "model.safetensors"))]
    whole = {name: (run.path / name).read_bytes() for name in files}
    each_file = [
        st.tuples(st.just(n), either(d) if n.endswith((".json", ".jsonl")) else damaged(d)) for n, d in whole.items()
    ]

    @messages(count)
    @given(st.one_of(each_file))
    def decode(change: tuple[str, bytes]) -> None:
        for name, data in whole.items():
            (run.path / name).write_bytes(data)
        (run.path / change[0]).write_bytes(change[1])

        def look() -> Any:
            found = RunDir.open(run.path, write=False)
            return found.rounds(), found.load_checkpoint(0)

        fine, found = tried(look, (RunError,))
        if fine:
            assert all("round" in line for line in found[0]) and torch.equal(found[1].parameters["w"], torch.ones(3))

    decode()


@each
def test_unfinished_tokenizers(count: int, tmp_path: Path) -> None:
    """Refused: RunError. Accepted: pairs of whole numbers, about the same text."""
    about = {"vocabulary": 300}
    progress = _Progress(tmp_path / "merges.json", about, "run", [(1, 2), (256, 3)])
    progress.save()

    @messages(count)
    @given(either(progress.file.read_bytes()))
    def decode(data: bytes) -> None:
        progress.file.write_bytes(data)
        found = _Progress(progress.file, about)
        fine, _ = tried(found.load, (RunError,))
        assert not fine or all(isinstance(a, int) and isinstance(b, int) for a, b in found.merges)

    decode()


# ------------------------------------------------------------------------------------------------ YAML

_LAUGHS = zip("abcdefgh", "bcdefghi", strict=True)

BOMBS = (
    "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in _LAUGHS),
    "a: &a {b: *a}\n",
    "a: &a\n  <<: *a\n",
    "seed: 0x" + "f" * 20_000,
    "seed: " + "9" * 20_000,
    "seed: 1e" + "9" * 400,
    "a: " + "[" * 500,
    "a: " + "{b: " * 200,
    "".join(" " * i + "a:\n" for i in range(300)),
    "- " * 300,
    "? " * 300,
    "a: !!python/object/apply:os.system [id]\n",
    "a: !!binary aGk=\n",
    "name: '" + "x" * 5_000 + "'\n",
    "a: [" + "1," * 500 + "]",
    "%YAML 9.9\n---\na: 1\n",
    "a: |\n" + "  x\n" * 500,
    "a: 12:30:45\nb: 2001-01-01\nc: 0o777777777777777777777777777\n",
    "\ufeffname: r\n",
    "a: \x00\n",
    "a\u2028b: c\n",
)  # fmt: skip


@each
def test_yaml_from_elsewhere(count: int, tmp_path: Path) -> None:
    """Refused: RecipeError, a sentence with file and line. Accepted: a recipe that can be written down and read again
    as the same; a policy or data file whose paths are there."""
    recipe = read_template("qa").encode()
    parts = st.lists(st.sampled_from(recipe.splitlines(keepends=True) + [b.encode() for b in BOMBS]), max_size=30)
    texts = st.one_of(damaged(recipe), st.sampled_from(BOMBS).map(str.encode), parts.map(b"".join))
    policy = st.one_of(damaged(example().encode()), st.sampled_from(BOMBS).map(str.encode))
    file = tmp_path / "file.yaml"

    @messages(count)
    @given(texts, policy, st.sampled_from(BOMBS))
    def decode(text: bytes, rules: bytes, bomb: str) -> None:
        file.write_bytes(text)
        fine, found = tried(lambda: load_recipe(file), (RecipeError,))
        if fine:
            (tmp_path / "again.yaml").write_text(dump_recipe(found))
            assert load_recipe(tmp_path / "again.yaml") == found
        else:
            assert "file.yaml" in str(found) or "model." in str(found), str(found)
        file.write_bytes(rules)
        tried(lambda: load_policy(file), (RecipeError,))
        file.write_bytes(bomb.encode())
        assert not tried(lambda: load_holdings(file), (RecipeError,))[0]
        tried(lambda: load_recipe(file, [f"seed={bomb}"]), (RecipeError,))

    decode()


@each
def test_kits_and_invitations(count: int, tmp_path: Path) -> None:
    """Refused: NetworkError. Accepted: a kit with all its fields of their types; a JSON object of bounded size."""
    words = {"network": "n", "name": "hospital-a", "org": "o", "fedlm": "0.1.0", "host": "h", "created": "2026-01-01"}
    folder = tmp_path / "kit"
    folder.mkdir()
    root = ":".join(["AB"] * 32)
    write_kit(Kit(path=folder, kind="silo", port=8002, keys="own", silos=(), root=root, **words))  # type: ignore[arg-type]
    whole = (folder / "kit.yaml").read_bytes()
    with zipfile.ZipFile(tmp_path / "honest.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("request.json", json.dumps({"name": "a" * 500}))
    packed = (tmp_path / "honest.zip").read_bytes()
    bombs = st.sampled_from(BOMBS).map(str.encode)

    @messages(count)
    @given(damaged(whole) | bombs, damaged(packed))
    def decode(text: bytes, zipped: bytes) -> None:
        (folder / "kit.yaml").write_bytes(text)
        fine, kit = tried(lambda: read_kit(folder), (NetworkError,))
        assert not fine or (isinstance(kit.name, str) and kit.name and 0 < kit.port < 65536)
        (tmp_path / "invitation.yaml").write_bytes(text)
        tried(lambda: _invited(tmp_path / "invitation.yaml", folder), (NetworkError,))
        (tmp_path / "x.zip").write_bytes(zipped)
        fine, said = tried(lambda: _zip_json(tmp_path / "x.zip", "request.json"), (NetworkError,))
        assert not fine or isinstance(said, dict)

    decode()
    shutil.rmtree(folder)
