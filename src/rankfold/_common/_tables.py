"""Tables of text and numbers, aligned for a terminal or as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape


def text_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[str] = ()) -> str:
    """Return a table with aligned columns and a rule below the heads.

    Args:
        heads: the name of each column.
        rows: the cells of each row, one per head.
        left: heads of the columns to align left (text); all others are aligned right (numbers).

    Example:
        >>> print(text_table(("layer", "params"), [("conv", "1,200"), ("head", "90")], left=("layer",)))
        layer  params
        -----  ------
        conv    1,200
        head       90
    """
    table = [tuple(heads), *(tuple(map(_visible, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(
            cell.ljust(width) if head in left else cell.rjust(width)
            for cell, width, head in zip(row, widths, heads, strict=True)
        ).rstrip()
        for row in table
    )


def _visible(text: str) -> str:
    """Return a text with its control characters escaped: names may come from a file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def html_table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[str] = (),
    caption: str = "",
    below: Iterable[str] = (),
) -> str:
    """Return the same table as HTML that needs no style sheet; all text is escaped.

    Args:
        heads: the name of each column.
        rows: the cells of each row, one per head.
        left: heads of the columns to align left (text); all others are aligned right (numbers).
        caption: title above the table.
        below: lines of text below the table.
    """
    align = ["left" if head in left else "right" for head in heads]
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(f"<tr>{_cells('td', row, align)}</tr>" for row in rows)
    table = f"<table>{title}<thead><tr>{_cells('th', heads, align)}</tr></thead><tbody>{body}</tbody></table>"
    lines = "<br>".join(map(escape, below))
    return f"<div>{table}{f'<p>{lines}</p>' if lines else ''}</div>"


def _cells(tag: str, texts: Sequence[str], align: Sequence[str]) -> str:
    return "".join(
        f'<{tag} style="text-align: {side}">{escape(text)}</{tag}>' for text, side in zip(texts, align, strict=True)
    )
