"""The pieces of a page: a document that loads nothing, figures, tables, cards. Whatever is put into them is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources

from fedlm import __version__
from fedlm.report.plots import Figure


def document(title: str, body: str, *scripts: str) -> str:
    """A whole page around a body of escaped HTML, with the figures' library and these scripts in it."""
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    run = "".join(f"<script>{script}</script>" for script in (_plotly(), asset("report.js"), *scripts))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{e(title)}</title>
<style>{asset("report.css")}</style></head><body><main>
{body}
<footer>Written by fedlm {e(__version__)}. This file is complete in itself and loads nothing from the network.</footer>
</main>{run}</body></html>
"""


def e(value: object) -> str:
    """Escaped for HTML, attributes included."""
    return html.escape(str(value))


def asset(name: str) -> str:
    """The text of a file of `assets/`."""
    return (resources.files("fedlm.report") / "assets" / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def figure(drawing: Figure | None, title: str, note: str = "") -> str:
    """A figure with its title; nothing where there is nothing to draw."""
    if drawing is None:
        return ""
    source = json.dumps(drawing, allow_nan=False).replace("<", "\\u003c")
    words = f'<p class="note">{e(note)}</p>' if note else ""
    height = int(drawing["layout"]["height"])
    return (
        f'<div><h3>{e(title)}</h3>{words}<div style="height:{height}px" role="img" aria-label="{e(title)}"></div>'
        f'<script type="application/json" class="figure">{source}</script></div>'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, text: int = 1, main: Sequence[bool] = ()) -> str:
    """A table whose first `text` columns are words and the others numbers; rows flagged in `main` are bold."""
    kinds = [' class="text"' if i < text else "" for i in range(len(head))]
    top = "".join(f"<th{k}>{e(h)}</th>" for h, k in zip(head, kinds, strict=True))
    body = []
    for i, row in enumerate(rows):
        bold = ' class="main"' if i < len(main) and main[i] else ""
        body.append(f"<tr{bold}>" + "".join(f"<td{k}>{e(c)}</td>" for c, k in zip(row, kinds, strict=True)) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def card(name: str, value: str, note: str = "", *, main: bool = False) -> str:
    """One figure that stands out."""
    chosen = " main" if main else ""
    return f'<div class="card{chosen}"><span>{e(name)}</span><b>{e(value)}</b><span>{e(note)}</span></div>'
