"""The product of this room: silos with training, validation and test rows that never overlap.

A row's role is decided by a keyed hash of its content, never by its place, so equal rows never part, whatever the
silos, the partition or the order of the files. Where a source is given a role as a whole, the stronger role (test, then
validation) takes every equal row out of the weaker ones, over all silos that are loaded together.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlm.data.cache import table_of
from fedlm.data.examples import has_categories
from fedlm.data.partition import deal
from fedlm.data.sources import Located, locate
from fedlm.errors import DataError
from fedlm.randomness import key, numpy_generator
from fedlm.recipe.privacy import user_of
from fedlm.recipe.schema import DataSpec, Recipe, SourceSpec, SplitSpec
from fedlm.recipe.tasks import TASKS

Ints = npt.NDArray[np.int64]
ROLES = ("train", "validation", "test")
_MOST_LABELS = 50
"""Labels a card lists; the rest are counted together."""


@dataclass(frozen=True)
class SiloData:
    """One silo's rows by role: Datasets with the columns of `fedlm.data.examples`, each made when it is asked for."""

    name: str
    kind: str
    rows: Any
    """Everybody's."""
    parts: tuple[Ints, ...]
    """Which of them are this silo's, by role."""

    @functools.cached_property
    def train(self) -> Any:
        return self.rows.select(self.parts[0])

    @functools.cached_property
    def validation(self) -> Any:
        return self.rows.select(self.parts[1])

    @functools.cached_property
    def test(self) -> Any:
        return self.rows.select(self.parts[2])


class FederatedData:
    """All silos' rows: one memory-mapped table and, per silo and role, the indices of its rows.

    Attributes:
        names: silo names, sorted.
        kind: text, messages, preference or choice.
        skipped: rows that serve no silo, by reason; counts only.
        redacted: what was replaced as personal data in the rows read, by kind; counts only, for the owner.
        duplicates: rows kept though an equal row with the same role exists.
        public: the public rows that silos may train on beside their own, each once; None where the recipe has none.
    """

    def __init__(self, rows: Any, kind: str, parts: dict[str, Ints], roles: Ints, skipped: dict[str, int]) -> None:
        self._rows, self.kind, self.skipped, self.duplicates = rows, kind, skipped, 0
        self.public: Any = None
        self.redacted: dict[str, int] = {}
        self.names = sorted(parts)
        self._parts = {name: _by_role(parts[name], roles) for name in self.names}
        self._labels: tuple[list[str], Ints] | None = None

    def silo(self, name: str) -> SiloData:
        """One silo's rows; made when asked for. Raises DataError for an unknown name."""
        at = bisect.bisect_left(self.names, name)
        if at == len(self.names) or self.names[at] != name:
            raise DataError(f"there is no silo '{name}' among {len(self.names)}", fix=f"silos: {_some(self.names)}")
        return SiloData(name, self.kind, self._rows, self._parts[name])

    def pooled(self) -> SiloData:
        """All silos' rows in one place, as 'centralised'; possible in simulation only."""
        parts = (np.sort(np.concatenate([self._parts[n][role] for n in self.names])) for role in range(len(ROLES)))
        return SiloData("centralised", self.kind, self._rows, tuple(parts))

    def others(self, name: str, role: str, limit: int, seed: int) -> Any:
        """A keyed subset, at most `limit` rows, of all other silos' rows of a role; possible in simulation only."""
        which = ROLES.index(role)
        rows = np.concatenate([np.zeros(0, np.int64), *(p[which] for n, p in self._parts.items() if n != name)])
        if len(rows) > limit:
            rows = numpy_generator(seed, "others", name, role).permutation(rows)[:limit]
        return self._rows.select(np.sort(rows))

    def card(self, name: str) -> dict[str, Any]:
        """Counts only: {"rows": {role: n}, "labels": {label: n}}, the labels over all of the silo's rows.

        Labels are given where they are categories (`columns.label` or literal choices), not answers' private text.
        """
        if name not in self._parts:
            self.silo(name)  # says which names there are
        parts = self._parts[name]
        labels: dict[str, int] = {}
        if self._labels is not None:
            values, codes = self._labels
            counts = np.bincount(codes[np.concatenate(parts)], minlength=len(values))
            labels = {values[i]: int(counts[i]) for i in np.flatnonzero(counts)}
        return {"rows": {role: len(part) for role, part in zip(ROLES, parts, strict=True)}, "labels": labels}

    def users(self, name: str) -> int:
        """Of how many users a silo has training rows; 0 where rows do not say whose they are."""
        part = self._parts[name][0]
        return len(set(self._rows.select_columns(["user"]).select(part)["user"][:]) - {"", None})

    def with_training_rows(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> FederatedData:
        """A copy in which silos have further training rows, given as canonical ones (see `fedlm.data.examples`)."""
        import datasets

        added = [dict(row) for name in self.names for row in rows.get(name, ())]
        more = datasets.Dataset.from_list(added, features=self._rows.features)
        together = datasets.concatenate_datasets([self._rows, more])
        roles, parts, place = np.zeros(len(together), np.int64), {}, len(self._rows)
        for name in self.names:
            for role, part in enumerate(self._parts[name]):
                roles[part] = role
            end = place + len(rows.get(name, ()))
            parts[name] = np.concatenate([*self._parts[name], np.arange(place, end)])
            place = end
        copy = FederatedData(together, self.kind, parts, roles, dict(self.skipped))
        copy.public = self.public
        return copy

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over who holds which rows in which role: equal for equal data, whatever the order of files; and
        over the public rows."""
        state = hashlib.sha256(self.kind.encode())
        hashes = np.array(self._rows["hash"][:], dtype=object)
        for name in self.names:
            for role, part in zip(ROLES, self._parts[name], strict=True):
                state.update(f"\x1f{name}\x1f{role}\x1f{len(part)}\x1f".encode())
                state.update("".join(sorted(hashes[part])).encode())
        if self.public is not None:
            state.update(f"\x1fpublic\x1f{len(self.public)}\x1f{''.join(self.public['hash'][:])}".encode())
        return state.hexdigest()

    def _name_labels(self, labels: list[str]) -> None:
        common = [label for label, _ in Counter(labels).most_common()]
        if len(common) > _MOST_LABELS:
            common = [*common[: _MOST_LABELS - 1], "(others)"]
        code = {label: i for i, label in enumerate(common)}
        self._labels = common, np.array([code.get(label, len(common) - 1) for label in labels], np.int64)


def _by_role(rows: Ints, roles: Ints) -> tuple[Ints, ...]:
    return tuple(rows[roles[rows] == role] for role in range(len(ROLES)))


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")


def load_data(recipe: Recipe, base: Path = Path()) -> FederatedData:
    """Read, map, split and deal a recipe's text.

    Mapped rows are kept in `cache_dir()/datasets`, memory-mapped, and found again while the files, the mapping and the
    code that maps stay as they are.

    Args:
        recipe: its `data` and, where that has no seed of its own, `seed` are used.
        base: the folder that relative paths start from, the recipe's own.

    Raises:
        DataError, PackageError: see `sources`, `examples`, `partition`; also a silo without training rows. A silo with
            one row is served if that row's hash makes it a training row.
    """
    spec = recipe.data
    seed = recipe.seed if spec.seed is None else spec.seed
    if spec.at_silos:
        raise DataError(
            "this recipe names no text: every silo brings its own",
            where="data.at_silos",
            fix="run it over a network with --network KIT, or name sources here to simulate it on one machine",
        )
    sources, holders = _flat(spec)
    located = [locate(source, base) for source in sources]
    if spec.partition is not None and spec.partition.kind == "domain":
        _check_domains(located)
    tables = [
        table_of(found, spec.malformed, spec.partition, spec.redact, user_of(recipe, found.source)) for found in located
    ]
    kinds = {table.kind for table in tables}
    if len(kinds) > 1:
        listed = ", ".join(f"{s.path} ({t.kind})" for s, t in zip(sources, tables, strict=True))
        raise DataError(
            f"all sources must be mapped to the same form, got {listed}", where="data", fix="map them alike"
        )

    import datasets

    rows = datasets.concatenate_datasets([t.dataset for t in tables]) if len(tables) > 1 else tables[0].dataset
    origin = np.repeat(np.arange(len(tables)), [len(t.dataset) for t in tables])
    hashes: list[str] = rows["hash"][:]
    in_use = _subsets(sources, tables, hashes, seed)
    roles, dropped = _roles(sources, origin, hashes, in_use, spec.split, seed)
    kept = np.flatnonzero(in_use & ~dropped)
    skipped = Counter({"malformed": sum(t.malformed for t in tables), "in held-out data": int(dropped.sum())})
    if spec.partition is not None:
        view = {name: np.asarray(rows[name][:], dtype=object)[kept] for name in ("label", "domain", "group")}
        dealt = deal(_View(view, len(kept)), spec.partition, seed, roles[kept])
        parts = {name: kept[part] for name, part in dealt.items()}
        skipped["in silos left out"] = len(kept) - sum(map(len, parts.values()))
    else:
        owner = np.array(holders)[origin[kept]]
        parts = {silo.name: kept[owner == silo.name] for silo in spec.silos}
    for name, part in sorted(parts.items()):
        _check_training_rows(name, roles[part])
    _check_classes(recipe, rows, kept)
    data = FederatedData(rows, tables[0].kind, parts, roles, {k: n for k, n in skipped.items() if n})
    data.redacted = dict(sum((Counter(table.redacted) for table in tables), Counter()))
    data.public = _public(spec, base, seed, data)
    data.duplicates = len(kept) - len({hashes[i] for i in kept})
    if spec.partition is not None and spec.partition.by and spec.partition.kind in ("dirichlet", "shards"):
        data._name_labels(rows["group"][:])
    elif all(has_categories(source.columns) for source in sources):
        data._name_labels(rows["label"][:])
    return data


def _public(spec: DataSpec, base: Path, seed: int, data: FederatedData) -> Any:
    """The public rows in use, of equal ones the first; None where the recipe has none.

    Raises:
        DataError: they are of another form than the silos' rows, or fewer than a silo is to take.
    """
    if spec.augment is None:
        return None
    import datasets

    tables = [table_of(locate(source, base), spec.malformed, None, spec.redact) for source in spec.augment.sources]
    for source, table in zip(spec.augment.sources, tables, strict=True):
        if table.kind != data.kind:
            raise DataError(
                f"public rows must have the form of the silos' rows ({data.kind}), these are {table.kind}",
                where=source.path,
                fix="map them alike",
            )
    rows = datasets.concatenate_datasets([t.dataset for t in tables]) if len(tables) > 1 else tables[0].dataset
    hashes: list[str] = rows["hash"][:]
    in_use = _subsets(spec.augment.sources, tables, hashes, seed)
    first = {content: i for i, content in reversed(list(enumerate(hashes))) if in_use[i]}
    if len(first) < spec.augment.rows:
        raise DataError(
            f"there are {len(first)} different public rows, and each silo is to take {spec.augment.rows}",
            where="data.augment.rows",
            fix="lower it, or name more sources",
        )
    return rows.select(sorted(first.values()))


class _View:
    """The columns a partition looks at, of the rows that take part."""

    def __init__(self, columns: dict[str, Any], length: int) -> None:
        self._columns, self._length = columns, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, name: str) -> Any:
        return self._columns[name]


def _flat(spec: DataSpec) -> tuple[list[SourceSpec], list[str]]:
    """All sources, and for each the silo that holds it ('' where a partition decides)."""
    if spec.sources:
        return list(spec.sources), [""] * len(spec.sources)
    pairs = [(source, silo.name) for silo in spec.silos for source in silo.sources]
    return [source for source, _ in pairs], [name for _, name in pairs]


def _subsets(sources: list[SourceSpec], tables: list[Any], hashes: list[str], seed: int) -> npt.NDArray[np.bool_]:
    """Which rows take part: where a source has `max_rows`, those with the smallest keyed hash."""
    in_use = np.ones(len(hashes), bool)
    start = 0
    for source, table in zip(sources, tables, strict=True):
        end = start + len(table.dataset)
        if source.max_rows is not None and source.max_rows < end - start:
            ranked = sorted(range(start, end), key=lambda i: (key(seed, "max_rows", hashes[i]), i))
            in_use[ranked[source.max_rows :]] = False
        start = end
    return in_use


def _roles(
    sources: list[SourceSpec],
    origin: Ints,
    hashes: list[str],
    in_use: npt.NDArray[np.bool_],
    split: SplitSpec,
    seed: int,
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Each row's role (0 training, 1 validation, 2 test), and which rows are dropped since an equal one is held out."""
    fixed = [None if s.role == "split" else ROLES.index(s.role) for s in sources]
    scale = 1 << 63
    test, held = int(split.test * scale), int((split.test + split.validation) * scale)
    roles = np.zeros(len(hashes), np.int64)
    strongest: dict[str, int] = {}
    for i, content in enumerate(hashes):
        role = fixed[origin[i]]
        if role is None:
            drawn = key(seed, "split", content)
            role = 2 if drawn < test else 1 if drawn < held else 0
        roles[i] = role
        if in_use[i]:
            strongest[content] = max(role, strongest.get(content, 0))
    dropped = np.array([in_use[i] and roles[i] < strongest[content] for i, content in enumerate(hashes)], bool)
    return roles, dropped


def _check_domains(located: list[Located]) -> None:
    """Refuse two sources that would silently become one silo; held-out ones may share the name of one that trains."""
    training = [found for found in located if found.source.role in ("split", "train")]
    first: dict[str, str] = {}
    for found in training:
        if found.domain in first:
            raise DataError(
                f"two sources are one domain, '{found.domain}': {first[found.domain]} and {found.source.path}",
                where="data.sources",
                fix="give each source a `name` of its own",
            )
        first[found.domain] = found.source.path


def _check_classes(recipe: Recipe, rows: Any, kept: Ints) -> None:
    """Refuse to learn classes of which there is one: a silo may hold a single class, all silos together may not. A silo
    of a network reads its own rows alone, as the only one named, and cannot know the others'."""
    if not TASKS[recipe.task].classes or len(recipe.data.silos) == 1:
        return
    choices, answers = rows["choices"][:], rows["answer"][:]
    if len({choices[i][answers[i]] for i in kept.tolist()}) < 2:
        raise DataError(
            "all rows have the same class, so there is nothing to tell apart",
            where="data",
            fix="check the columns `choices` and `answer`, and `where`",
        )


def _check_training_rows(name: str, roles: Ints) -> None:
    if not len(roles) or (roles == 0).any():
        if len(roles):
            return
        raise DataError("the silo holds no rows", where=f"silo '{name}'", fix="give it rows, or leave it out")
    raise DataError(
        f"the silo has no training row: its {len(roles)} row(s) are held out for validation or test",
        where=f"silo '{name}'",
        fix="give it more rows, lower data.split, or set `role: train` on its source",
    )
