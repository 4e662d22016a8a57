"""What a reproduction does around its measurements: rows kept as they come, then the table and the picture of them."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from reproduce import datasets

Row = dict[str, Any]
Rows = dict[str, Row]
Keep = Callable[[str, Row], None]
Measure = Callable[[Rows, Keep], None]


class Drawing(Protocol):
    """How the rows of one reproduction are shown."""

    def line(self, row: Row) -> str:
        """Return a row on one line, for a person who waits."""

    def write_table(self, rows: Rows, path: Path) -> None:
        """Write the rows as markdown."""

    def write_plot(self, rows: Rows, path: Path) -> None:
        """Draw the rows."""


FEW = 200  # images, or pairs of sentences, of a quick run


def main(
    description: str,
    folder: Path,
    measure: Measure,
    drawing: Drawing,
    *,
    quick: Mapping[str, Any],
    parts: Mapping[str, Measure] | None = None,
) -> None:
    """Measure what `results.json` of the folder lacks, unless told not to, then write `table.md` and `plot.png`.

    `measure` gets the rows that are there and a function to keep a further one under its key; so does each of the
    `parts` of it that may be asked for by name instead. With `--quick` it runs with the constants `quick` in place of
    those of its module, to see whether everything runs.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--redraw", action="store_true", help="only write table.md and plot.png from results.json")
    parser.add_argument("--quick", action="store_true", help="a little of everything on few data; nothing is written")
    if parts:
        parser.add_argument("--only", choices=list(parts), help="measure this part alone")
    results = folder / "results.json"
    rows: Rows = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}

    def keep(key: str, row: Row) -> None:
        rows[key] = row
        store(rows, results)
        print(drawing.line(row), flush=True)

    tried: Rows = {}

    def show(key: str, row: Row) -> None:
        tried[key] = row
        print(drawing.line(row), flush=True)

    words = parser.parse_args()
    if words.quick:
        with shortened(measure, quick) as place:
            measure(tried, show)
            drawing.write_table(rows, place / "table.md")
            drawing.write_plot(rows, place / "plot.png")
        return
    if not words.redraw:
        (parts[words.only] if parts and words.only else measure)(rows, keep)
    drawing.write_table(rows, folder / "table.md")
    drawing.write_plot(rows, folder / "plot.png")


@contextmanager
def shortened(measure: Callable[..., None], constants: Mapping[str, Any]) -> Iterator[Path]:
    """Let a function run with other constants of its module, on few data, with a cache that is thrown away.

    Yields the folder of that cache. Only for a process that does nothing else afterwards.
    """
    unknown = constants.keys() - measure.__globals__.keys()
    if unknown:
        raise KeyError(f"{measure.__module__} has no {sorted(unknown)[0]}")
    measure.__globals__.update(constants)
    with tempfile.TemporaryDirectory() as folder:
        datasets.shorten(FEW, Path(folder))
        yield Path(folder)


def store(rows: Rows, path: Path) -> None:
    """Write the rows whole or not at all."""
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
