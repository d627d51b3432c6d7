"""The recipes that come with fedlm (`templates/*.yaml`)."""

from __future__ import annotations

from importlib import resources

from fedlm.errors import RecipeError, nearest

DEFAULT = "own-data"


def templates() -> dict[str, str]:
    """Name -> what it is about: the first sentence of its opening comment. In alphabetical order."""
    folder = resources.files("fedlm.recipe") / "templates"
    names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    return {name: read_template(name).partition("\n")[0].removeprefix("# ") for name in names}


def read_template(name: str) -> str:
    """The text of a template, comments included.

    Raises:
        RecipeError: there is none of this name.
    """
    folder = resources.files("fedlm.recipe") / "templates"
    file = folder / f"{name}.yaml"
    if "/" in name or "\\" in name or not file.is_file():
        raise RecipeError(f"there is no template '{name}'", fix=nearest(name, templates()))
    return file.read_text(encoding="utf-8")
