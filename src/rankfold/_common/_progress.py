"""Progress bars for anything that takes longer than two seconds, on a terminal only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
DELAY = 2.0


def track(items: Iterable[T], description: str, *, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Yield `items`, showing a bar on standard error once they have taken two seconds.

    Nothing is shown if standard error is not a terminal, or with `show=False`.
    """
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(description, total=total)
    start, shown = time.monotonic(), False
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not shown and time.monotonic() - start > DELAY:
                bar.start()
                shown = True
    finally:
        if shown:
            bar.stop()
