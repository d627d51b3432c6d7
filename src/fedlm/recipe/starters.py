"""The recipes that come with fedlm (`templates/*.yaml`), and the pipelines (`templates/pipelines/*.yaml`)."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable

from fedlm.errors import RecipeError, nearest

DEFAULT = "own-data"


def templates() -> dict[str, str]:
    """Name of a recipe -> what it is about: the first sentence of its opening comment. In alphabetical order."""
    return _listed(resources.files("fedlm.recipe") / "templates")


def pipelines() -> dict[str, str]:
    """The same of pipelines."""
    return _listed(resources.files("fedlm.recipe") / "templates" / "pipelines")


def read_template(name: str) -> str:
    """The text of a template or pipeline, comments included.

    Raises:
        RecipeError: there is none of this name.
    """
    folder = resources.files("fedlm.recipe") / "templates"
    places = (folder / f"{name}.yaml", folder / "pipelines" / f"{name}.yaml")
    file = next((place for place in places if place.is_file()), None)
    if "/" in name or "\\" in name or file is None:
        raise RecipeError(f"there is no template '{name}'", fix=nearest(name, {**templates(), **pipelines()}))
    return file.read_text(encoding="utf-8")


def _listed(folder: Traversable) -> dict[str, str]:
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    texts = {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}
    return {name: text.partition("\n")[0].removeprefix("# ") for name, text in texts.items()}
