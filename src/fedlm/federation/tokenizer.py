"""A byte-level BPE tokenizer from text that stays where it is: silos count pairs of neighbours, the coordinator merges.

At first each silo sends its table of pairs of bytes, 256 x 256 whole numbers. The coordinator adds the tables up and
merges the most frequent pair; after a merge of (a, b) to n only pairs with a second, b first, or n in them have
changed, so those lines of the silos' tables are asked for anew: columns a and n, rows b and n. Words, word lists and
texts never travel. The sums are those of the pooled text, so the merges are too (`fedlm.models.bpe`).

Ties. Of equally frequent pairs the one with the smallest first symbol is merged, then that with the smallest second:
the order of Hugging Face's trainer.

Several merges at once. A merge of (a, b) changes counts in column a and row b alone, and each occurrence of a pair with
n was one of a pair there. So the largest count there bounds all that it changes or makes, and the next best pair is
certain, before new counts have come, if it is more frequent. As many merges as are certain go into one request, which
changes no result.

What is learnt so far is kept beside the output folder after every answer; the same command goes on from there.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedlm.errors import ModelError, RunError, UpdateRefused, nearest
from fedlm.federation.disk import disk_errors
from fedlm.federation.figures import check_card
from fedlm.federation.silo.door import PROTOCOL
from fedlm.federation.silo.own import COUNTING
from fedlm.files import read_json, write_json
from fedlm.messages import Engine, Failure, FailureKind, Fields, Observe, Reply, Request, Tensors
from fedlm.models.bpe import BYTES, Symbols, save_tokenizer, specials
from fedlm.models.chat import template_text
from fedlm.models.folders import new_folder
from fedlm.recipe.schema import Recipe

if TYPE_CHECKING:
    from fedlm.data.federated import FederatedData

Ints = NDArray[np.int64]
Merge = tuple[int, int]

LARGEST_VOCABULARY = 32_768
"""The coordinator's table has 8 bytes for each pair of symbols: 8 GB then. What travels grows as fast."""

PER_REQUEST = 64
"""Most merges of one request."""

_AGAIN = (FailureKind.UNREACHABLE, FailureKind.TIMED_OUT)


@dataclass
class Trained:
    """What came out.

    Attributes:
        merges: pairs of symbols, in the order in which they were merged.
        tokens: of the tokenizer, special ones included; fewer than asked for where no pair was left.
        bytes_up: received from all silos. bytes_down: sent to them.
    """

    folder: Path
    merges: list[Merge]
    tokens: int
    silos: list[str]
    requests: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


class Sums:
    """The silos' tables of pairs, added up: how often symbol y follows symbol x in all text.

    Args:
        most: symbols that there may ever be.
    """

    def __init__(self, most: int) -> None:
        self.counts = np.zeros((most, most), np.int64)
        self._best = np.zeros(most, np.int64)  # by first symbol, the most frequent second one

    def put(self, rows: dict[int, Ints], columns: dict[int, Ints]) -> None:
        """Put lines in the place of what was there."""
        changed = set(rows)
        for symbol, line in columns.items():
            changed |= set(np.flatnonzero(self.counts[: len(line), symbol] != line).tolist())
            self.counts[: len(line), symbol] = line
        for symbol, line in rows.items():
            self.counts[symbol, : len(line)] = line
        self._find(sorted(changed))

    def top(self) -> tuple[int, int, int]:
        """The most frequent pair, as (count, first, second); of several the smallest."""
        values = self.counts[np.arange(len(self._best)), self._best]
        first = int(values.argmax())  # numpy names the first of equal ones
        return int(values[first]), first, int(self._best[first])

    def certain(self, known: Symbols, wanted: int, at_least: int) -> list[Merge]:
        """The next merges whose order no new count can change; none where no pair is as frequent as `at_least`.

        Their own counts are 0 afterwards.

        Args:
            known: all symbols; the merges' own are added.
            wanted: number of symbols at which to stop.
        """
        found: list[Merge] = []
        bound = 0
        while len(found) < PER_REQUEST and len(known) < wanted:
            count, first, second = self.top()
            if count < at_least or count <= bound:
                break
            if known.knows(first, second):
                raise RunError("the counts contradict the merges: some silo says that a pair occurs which is merged")
            found.append((first, second))
            bound = max(bound, int(self.counts[:, first].max()), int(self.counts[second].max()))
            known.add(first, second)
            self.counts[first, second] = 0
            self._find([first])
        return found

    def _find(self, rows: list[int]) -> None:
        self._best[rows] = self.counts[rows].argmax(axis=1)


def lines_of(merges: Sequence[Merge], made: Sequence[int]) -> tuple[list[int], list[int]]:
    """The rows and columns of the table that these merges change, sorted."""
    rows = {second for _, second in merges} | set(made)
    columns = {first for first, _ in merges} | set(made)
    return sorted(rows), sorted(columns)


class Counting:
    """The exchanges with the silos."""

    def __init__(self, engine: Engine, recipe: Recipe, run: str, names: Sequence[str], result: Trained) -> None:
        self._engine, self._run, self._names, self._result = engine, run, names, result
        self._tries = 1 + recipe.federation.retries

    def greet(self) -> None:
        """Ask every silo to take part.

        Raises:
            RunError: one does not.
        """

        def take(reply: Reply) -> None:
            check_card(reply.silo, reply.fields)

        self._ask("hello", {}, {"protocol": PROTOCOL, "purpose": COUNTING}, take)

    def lines(
        self, merges: Sequence[Merge], symbols: int, rows: list[int], columns: list[int]
    ) -> list[dict[int, Ints]]:
        """The rows and the columns by symbol, summed over all silos.

        Raises:
            RunError: a silo does not answer, or not with its lines.
        """
        shapes = {"rows": (len(rows), symbols), "columns": (len(columns), symbols)}
        sums = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}

        def take(reply: Reply) -> None:
            for name, shape in shapes.items():
                tensor = reply.tensors.get(name)
                if tensor is None or tensor.dtype is not torch.int32 or tuple(tensor.shape) != shape:
                    raise UpdateRefused(f"the reply has no counts '{name}' of shape {list(shape)}", where=reply.silo)
                if tensor.numel() and int(tensor.min()) < 0:
                    raise UpdateRefused(f"the reply's counts '{name}' are negative", where=reply.silo)
            for name in shapes:
                sums[name] += reply.tensors[name].numpy()

        asked = {"merges": np.array(merges, np.int32).reshape(-1, 2), "rows": np.array(rows, np.int32)}
        asked["columns"] = np.array(columns, np.int32)
        self._ask("pairs", {name: torch.from_numpy(value) for name, value in asked.items()}, {}, take)
        ids = {"rows": rows, "columns": columns}
        return [dict(zip(ids[name], sums[name], strict=True)) for name in shapes]

    def _ask(self, verb: str, tensors: Tensors, fields: Fields, take: Callable[[Reply], None]) -> None:
        """One request to every silo, again to those that were out of reach; each good reply is taken once."""
        left = list(self._names)
        for attempt in range(self._tries):
            failures: list[Failure] = []
            requests = (Request(name, verb, self._run, -1, 0, tensors, fields) for name in left)
            for answer in self._engine.exchange(requests):
                if isinstance(answer, Failure):
                    failures.append(answer)
                    continue
                self._result.bytes_up += int(answer.fields.get("sent_bytes", 0))
                self._result.bytes_down += int(answer.fields.get("received_bytes", 0))
                take(answer)
            self._result.requests += len(left)
            for failure in failures:
                if failure.kind not in _AGAIN or attempt + 1 == self._tries:
                    raise RunError(
                        f"a tokenizer needs the counts of every silo, and {failure.silo} sends none: {failure.reason}",
                        fix="mend the silo and give the same command again, or leave it out (--silo names the others)",
                    )
            left = [failure.silo for failure in failures]
            if not left:
                return


@dataclass
class _Progress:
    """What has been learnt, on disk.

    Args:
        about: what the merges follow from; with anything else they are others.
    """

    file: Path
    about: Fields
    run: str = ""
    merges: list[Merge] = field(default_factory=list)

    def load(self) -> None:
        """Go on where an earlier call stopped, if one did.

        Raises:
            RunError: it was about something else, or the file is damaged.
        """
        now = datetime.now(UTC)
        self.run = f"tokenizer-{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        if not self.file.is_file():
            return
        try:
            stored = read_json(self.file)
            self.run, self.merges = str(stored["run"]), [(int(a), int(b)) for a, b in stored["merges"]]
            same = stored["about"] == self.about
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            raise RunError("what was learnt so far is damaged", where=str(self.file), fix="remove it") from None
        if not same:
            raise RunError(
                "an unfinished tokenizer of other text, silos or settings is there",
                where=str(self.file.parent),
                fix="remove that folder, or choose another --out",
            )

    def save(self) -> None:
        write_json(self.file, {"about": self.about, "run": self.run, "merges": self.merges})


def train_tokenizer(
    recipe: Recipe,
    out: Path,
    *,
    vocabulary: int = 2048,
    at_least: int = 2,
    chat_template: str | None = None,
    base: Path = Path(),
    network: Path | None = None,
    silos: Sequence[str] | None = None,
    observe: Observe | None = None,
) -> Trained:
    """Train a tokenizer on the training rows of all silos and write it to a folder that `model.tokenizer` can name.

    Args:
        recipe: its data and silos are used; its model and method are not.
        out: must not exist, or be empty.
        vocabulary: tokens, special ones and the 256 bytes included.
        at_least: occurrences of a pair that is merged.
        chat_template: 'chatml' or a Jinja file, written into the folder.
        base: folder that relative paths of the recipe start from.
        network: the coordinator's kit; then the silos are organisations, and not simulated.
        silos: names that take part; all by default.
        observe: receives {"kind": "merges", "done": symbols, "of": symbols} as it goes.

    Raises:
        ModelError: the folder is taken, or the vocabulary is impossible.
        RunError: a silo does not take part or fails, or the disk is full; what was learnt is kept.
        DataError, NetworkError: the text or the network cannot be used.
    """
    started = time.monotonic()
    chat = len(specials(chat_template is not None))
    _check(out, vocabulary, chat, chat_template)
    work = out.with_name(f".{out.name}.unfinished")
    with disk_errors(work), ExitStack() as stack:
        work.mkdir(parents=True, exist_ok=True)
        data, names = _participants(recipe, base, network, silos)
        about: Fields = {"vocabulary": vocabulary, "at_least": at_least, "special": chat, "silos": names}
        about |= {"data": data.fingerprint if data is not None else recipe.model_dump(mode="json")["data"]}
        progress = _Progress(work / "merges.json", about)
        progress.load()
        engine = _engine(recipe, work, progress.run, data, network, base)
        stack.callback(engine.close)
        result = Trained(out, progress.merges, 0, names)
        progress.save()
        counting = Counting(engine, recipe, progress.run, names, result)
        counting.greet()
        _learn(counting, progress, vocabulary - chat, at_least, observe)
        with new_folder(out) as folder:
            result.tokens = save_tokenizer(folder, result.merges, chat_template=chat_template)
    shutil.rmtree(work, ignore_errors=True)
    result.seconds = time.monotonic() - started
    return result


def _learn(counting: Counting, progress: _Progress, wanted: int, at_least: int, observe: Observe | None) -> None:
    """Merge until there are as many symbols as wanted, or no pair is frequent enough."""
    known, sums = Symbols(progress.merges), Sums(wanted)
    rows, columns = list(range(len(known))), list[int]()
    while True:
        if observe:
            observe({"kind": "merges", "done": len(known) - BYTES, "of": wanted - BYTES})
        if len(known) >= wanted:
            return
        sums.put(*counting.lines(progress.merges, len(known), rows, columns))
        merges = sums.certain(known, wanted, at_least)
        if not merges:
            return
        progress.merges += merges
        progress.save()
        rows, columns = lines_of(merges, [known.add(*merge) for merge in merges])


def _participants(
    recipe: Recipe, base: Path, network: Path | None, silos: Sequence[str] | None
) -> tuple[FederatedData | None, list[str]]:
    """All silos' rows, in a simulation, and the names of those that take part.

    Raises:
        RunError: there is no such silo.
        DataError, NetworkError: the text or the kit cannot be used.
    """
    if network is None:
        from fedlm.data.federated import load_data

        data = load_data(recipe, base)
        known: Sequence[str] = data.names
    else:
        from fedlm.federation.engines.flare.kit import read_kit

        data, known = None, sorted(read_kit(network, "coordinator").silos)
    for name in silos or ():
        if name not in known:
            raise RunError(f"there is no silo '{name}'", where="--silo", fix=nearest(name, known))
    return data, sorted(known if silos is None else set(silos))


def _engine(
    recipe: Recipe, work: Path, run: str, data: FederatedData | None, network: Path | None, base: Path
) -> Engine:
    """What carries the requests. One process serves all simulated silos: each table is in memory once."""
    if network is not None:
        from fedlm.federation.engines.flare.engine import FlareEngine

        return FlareEngine(recipe, network, run, work, model=False)
    from fedlm.federation.engines.local import LocalEngine

    assert data is not None
    return LocalEngine(recipe, data, work, base=base, model=False)


def _check(out: Path, vocabulary: int, special: int, chat_template: str | None) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError("the folder for the tokenizer is not empty", where=str(out), fix="choose a new one")
    least = BYTES + special
    if not least < vocabulary <= LARGEST_VOCABULARY:
        raise ModelError(
            f"a vocabulary of {vocabulary} tokens is not between {least + 1} (the bytes, {special} special tokens, one "
            f"merge) and {LARGEST_VOCABULARY}",
            where="--vocabulary",
        )
    if chat_template is not None:
        template_text(chat_template)
