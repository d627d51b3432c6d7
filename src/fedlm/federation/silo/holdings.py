"""The text of a real silo: described in a file that only its owner has and writes.

Either `sources`, in a recipe's own words, or, for demonstrations and tests, `share_of_recipe`: the silo takes the share
that the recipe deals to its name. A coordinator's recipe never names a file on this disk in the first case; in the
second the owner has said yes, and only to files below `base`.
"""

from __future__ import annotations

import itertools
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fedlm.errors import FedlmError, RecipeError
from fedlm.federation.silo.refusals import Forbidden
from fedlm.recipe.data_checks import all_sources, data_problems
from fedlm.recipe.load import load_yaml
from fedlm.recipe.redact import RedactSpec
from fedlm.recipe.schema import DataSpec, Recipe, SiloSpec, SourceSpec
from fedlm.recipe.strict import Strict

if TYPE_CHECKING:
    from fedlm.data.federated import FederatedData

log = logging.getLogger("fedlm.silo")


class Holdings(Strict):
    """DATA.yaml: what text this silo brings."""

    sources: list[SourceSpec] = Field(
        default_factory=list, description="As `data.sources` of a recipe; paths are relative to this file."
    )
    share_of_recipe: bool = Field(
        False, description="For demonstrations and tests: take the share that the recipe deals to this silo's name."
    )
    base: str | None = Field(
        None, description="With `share_of_recipe`: the folder that holds the files that the recipe names."
    )

    public: str | None = Field(
        None,
        description="With `sources`: the folder of public rows, where files that a recipe names in data.augment are "
        "looked for. Without it this silo takes no public rows.",
    )

    redact: RedactSpec | None = Field(
        None,
        description="Personal data to be replaced in every row, in place of what a recipe says (data.redact); with "
        "`kinds: []` nothing is.",
    )

    @model_validator(mode="after")
    def _possible(self) -> Holdings:
        if bool(self.sources) == self.share_of_recipe:
            raise ValueError("give either `sources`, this silo's own text, or `share_of_recipe: true` for a demo")
        if self.base is not None and not self.share_of_recipe:
            raise ValueError("`base` belongs to `share_of_recipe`: the paths of `sources` are relative to this file")
        if self.public is not None and self.share_of_recipe:
            raise ValueError("`public` belongs to `sources`: files of a demo lie below `base`")
        if self.sources:
            # checked as one silo of a recipe: below data.silos.0 the fields are those of this file
            spec = DataSpec(silos=[SiloSpec(name="silo", sources=self.sources)])
            if found := [(path[3:], reason) for path, reason in data_problems(spec)]:
                text = "; ".join(f"{'.'.join(map(str, path))}: {reason}" for path, reason in found)
                raise PydanticCustomError("impossible", "{text}", {"text": text, "problems": found})
        return self


@dataclass(frozen=True)
class OwnText:
    """A silo's description of its text, read and checked."""

    file: Path
    spec: Holdings

    def recipe_for(self, recipe: Recipe, name: str) -> Recipe:
        """The recipe with this silo's text in place of what the recipe says of data; how it is split stays.

        Raises:
            Forbidden: the text does not fit what is to be learnt, or the recipe deals nothing to this silo, or it names
                files that the owner has not offered.
        """
        redact = recipe.data.redact if self.spec.redact is None else self.spec.redact
        if self.spec.share_of_recipe:
            self._check_share(recipe, name)
            return recipe.model_copy(update={"data": recipe.data.model_copy(update={"redact": redact})})
        own = {
            "silos": [{"name": name, "sources": [s.model_dump(mode="json") for s in self.spec.sources]}],
            "split": recipe.data.split.model_dump(mode="json"),
            "seed": recipe.data.seed,
            "malformed": recipe.data.malformed,
            "instructions": recipe.data.instructions and recipe.data.instructions.model_dump(mode="json"),
            "selection": recipe.data.selection and recipe.data.selection.model_dump(mode="json"),
            "augment": self._augment(recipe),
            "redact": redact and redact.model_dump(mode="json"),
        }
        try:
            return Recipe.model_validate({**recipe.model_dump(mode="json"), "data": own})
        except ValidationError as error:
            raise Forbidden(f"this silo's text does not fit the run: {_reasons(error)}") from None

    def load(self, recipe: Recipe, name: str) -> FederatedData:
        """The rows, for a recipe that `recipe_for` gave; found in the cache where they were read before.

        Raises:
            Forbidden: they cannot be read as the run needs them. The reason stays in the silo's log, since it may name
                files and columns that only the owner knows.
        """
        from fedlm.data.federated import load_data

        try:
            data = load_data(recipe, self.base)
        except FedlmError as error:
            if self.spec.share_of_recipe:
                raise
            log.error("the text of '%s' cannot be used: %s", name, error.sentence())
            raise Forbidden(
                "this silo's own text cannot be read as the run needs it; its owner finds the reason in the silo's log"
            ) from error
        if name not in data.names:
            raise Forbidden(_no_share(data.names))
        if data.redacted:  # for the owner alone: the counts are nobody else's
            told = ", ".join(f"{count} {kind}" for kind, count in sorted(data.redacted.items()))
            log.info("personal data replaced in the text of '%s': %s", name, told)
        return data

    def _augment(self, recipe: Recipe) -> dict[str, Any] | None:
        """The recipe's public rows as they are found here.

        Raises:
            Forbidden: the owner offers no folder for them, or a file is not below it.
        """
        if recipe.data.augment is None:
            return None
        if self.spec.public is None:
            raise Forbidden("this silo takes no public rows: its data file names no folder for them (public)")
        folder = self.file.parent / Path(self.spec.public).expanduser()
        found = recipe.data.augment.model_dump(mode="json")
        for source in found["sources"]:
            if re.match("(hub|pypi|npm):", source["path"]):
                continue
            if not _inside(source["path"], folder):
                raise Forbidden(f"the public file '{source['path']}' is not below the folder that this silo offers")
            source["path"] = str(folder / source["path"])
        return found

    def check_users(self) -> None:
        """For an owner who insists that persons are protected: nobody else is to say whose a row is.

        Raises:
            RecipeError: a source here has no `columns.user`, so that the recipe's `privacy.user` would count.
        """
        if self.spec.share_of_recipe:
            raise RecipeError(
                "the policy insists that persons are protected (privacy.unit: user), and the recipe would say whose a "
                "row is",
                where=f"{self.file}: share_of_recipe",
                fix="describe the text in `sources`, and name the column in each one's `columns.user`",
            )
        for index, source in enumerate(self.spec.sources):
            if source.columns.user is None:
                raise RecipeError(
                    "the policy insists that persons are protected (privacy.unit: user), and the column that says "
                    "whose a row is, is not named here: the recipe would choose it",
                    where=f"{self.file}: sources.{index}.columns",
                    fix="add `user: COLUMN`",
                )

    @property
    def base(self) -> Path:
        """The folder that relative paths start from."""
        folder = self.file.parent
        return folder if self.spec.base is None else folder / Path(self.spec.base).expanduser()

    def _check_share(self, recipe: Recipe, name: str) -> None:
        if recipe.data.at_silos:
            raise Forbidden("each silo is to bring its own text, and this one has none (share_of_recipe)")
        if recipe.data.silos and name not in (names := [silo.name for silo in recipe.data.silos]):
            raise Forbidden(_no_share(names))
        for _, source in all_sources(recipe.data):
            if re.match("(hub|pypi|npm):", source.path):
                continue
            if self.spec.base is None or not _inside(source.path, self.base):
                raise Forbidden(
                    f"the recipe names the file '{source.path}', which is not below the folder that this silo offers "
                    "(share_of_recipe, base)"
                )


def load_holdings(path: Path) -> OwnText:
    """Read DATA.yaml.

    Raises:
        RecipeError: it cannot be read, has unknown or impossible fields (each with its line), or `base` is no folder.
    """
    spec = load_yaml(path, Holdings, what="data file", example="`fedlm silo data --example`")
    text = OwnText(path.resolve(), spec)
    if spec.base is not None and not text.base.is_dir():
        raise RecipeError(f"there is no folder '{spec.base}'", where=f"{path}: base", fix="correct the path")
    if spec.public is not None and not (path.parent / Path(spec.public).expanduser()).is_dir():
        raise RecipeError(f"there is no folder '{spec.public}'", where=f"{path}: public", fix="correct the path")
    return text


def _inside(path: str, base: Path) -> bool:
    """Whether a recipe's path stays below a folder, links followed; of a glob, the part before its first wildcard."""
    if path.startswith("~") or ".." in Path(path).parts:
        return False
    try:
        fixed = Path(*itertools.takewhile(lambda part: not re.search(r"[*?[]", part), (base / path).parts))
        return fixed.resolve().is_relative_to(base.resolve())
    except (OSError, RuntimeError, ValueError):  # a name too long, a loop of links, a NUL
        return False


def _reasons(error: ValidationError) -> str:
    """What the recipe's checks say, without places: those are in a file that the coordinator does not have."""
    told: list[str] = []
    for fault in error.errors(include_url=False):
        context = fault.get("ctx", {})
        told += [reason for _, reason in context["problems"]] if "problems" in context else [str(fault["msg"])]
    return "; ".join(dict.fromkeys(told))


def _no_share(names: list[str]) -> str:
    listed = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
    return f"the recipe deals no share to this silo (it deals to {listed})"
