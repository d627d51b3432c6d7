"""The text: where it comes from, how rows become examples, and which silo holds which."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fedlm.recipe.augment import AugmentSpec
from fedlm.recipe.instructions import InstructionSpec
from fedlm.recipe.redact import RedactSpec
from fedlm.recipe.selection import SelectionSpec
from fedlm.recipe.source import SourceSpec
from fedlm.recipe.strict import Strict
from fedlm.recipe.types import Fraction, Name


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
    redact: RedactSpec | None = Field(
        None,
        description="Personal data to be replaced in every row before it is split or read by a tokenizer; default: "
        "none. A silo's own data file may say otherwise, and counts.",
    )
    augment: AugmentSpec | None = Field(None, description="Public rows that silos train on beside their own.")

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
