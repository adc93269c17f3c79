"""HTML of a report: light or dark as the reader's system is, and readable on a telephone."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import NewType

from PIL import Image

__all__ = ["Html", "facts", "page", "picture", "section", "svg", "table", "text"]

Html = NewType("Html", str)
"""Markup. Other text becomes markup by `text`."""

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #8886; text-align: left; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
td { overflow-wrap: anywhere; min-width: 6rem; }
td.number { overflow-wrap: normal; min-width: 0; }
@media (max-width: 40rem) { th, td { padding: .2rem .3rem; } }
figure { margin: 1.2rem 0; }
figcaption { margin-bottom: .3rem; overflow-wrap: anywhere; }
.row { display: grid; gap: .4rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.row img { width: 100%; }
.key { display: inline-block; margin-right: 1rem; }
.key i { display: inline-block; width: .9em; height: .9em; margin-right: .3em;
  border: 1px solid #888; }
summary { cursor: pointer; }
"""


def text(value: object) -> Html:
    """Any text, with the characters that mean something in HTML escaped."""
    # Bytes of a file name that are no text cannot be encoded.
    plain = str(value).encode("utf-8", "backslashreplace").decode()
    return Html(html.escape(plain))


def page(title: str, sections: Iterable[Html]) -> str:
    """A whole file."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><h1>{text(title)}</h1>\n{chr(10).join(sections)}\n</body></html>\n"
    )


def section(heading: str, *parts: Html, folded: bool = False) -> Html:
    """A heading and what is below it; ``folded``: shown when it is clicked."""
    body = "\n".join(parts)
    if folded:
        return Html(f"<details><summary><b>{text(heading)}</b></summary>\n{body}</details>")
    return Html(f"<section><h2>{text(heading)}</h2>\n{body}</section>")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int]) -> Html:
    """A table; the columns in ``numbers`` are aligned to the right."""

    def line(cells: Sequence[object], kind: str) -> str:
        made = (
            f"<{kind}{' class=number' if i in numbers else ''}>{text(cell)}</{kind}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return Html(
        f'<div class="scroll"><table><thead>{line(head, "th")}</thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def facts(rows: Iterable[tuple[str, object]]) -> Html:
    """Names and values."""
    return table(("", ""), rows, ())


def picture(image: Image.Image, alt: str) -> Html:
    """A picture inside the page: photos as JPEG, pictures of few colours as PNG."""
    buffer = io.BytesIO()
    kind = "jpeg" if image.mode == "RGB" else "png"
    image.save(buffer, kind, quality=85) if kind == "jpeg" else image.save(buffer, kind)
    return _embedded(buffer.getvalue(), kind, alt)


def svg(drawing: str, alt: str) -> Html:
    """A drawing inside the page."""
    return _embedded(drawing.encode(), "svg+xml", alt)


def _embedded(data: bytes, kind: str, alt: str) -> Html:
    encoded = base64.b64encode(data).decode()
    return Html(f'<img src="data:image/{kind};base64,{encoded}" alt="{text(alt)}">')
