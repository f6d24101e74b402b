"""Tables and numbers as text, for all reports alike."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def text_table(lines: Sequence[Sequence[str]], left: int, right: int | None = None) -> list[str]:
    """Rows of cells as lines of text, a rule under the first; columns from `left` to before `right` are numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = range(len(widths))[left:right]
    text = [
        "  ".join(c.rjust(w) if i in numbers else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    return [line.rstrip() for line in text]


def html_table(headings: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]], lead: Sequence[str] = ()) -> str:
    """Lines, each of a kind (its class) and its cells, as a table with paragraphs above it."""

    def row(kind: str, cells: Sequence[str], tag: str) -> str:
        return f'<tr class="{kind}">' + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(kind, cells, "td") for kind, cells in lines)
    return (
        "".join(f"<p>{html.escape(text)}</p>" for text in lead)
        + f"<table><thead>{row('head', headings, 'th')}</thead>\n<tbody>{body}</tbody></table>"
    )


def by(sides: Sequence[int]) -> str:
    """16x16."""
    return "x".join(map(str, sides))


def percent(share: float) -> str:
    """90.0%."""
    return f"{share:.1%}"


def bytes_text(nbytes: int) -> str:
    """Three digits or so: 2.76 MB, 96.5 kB."""
    return f"{nbytes / 1e6:.2f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"
