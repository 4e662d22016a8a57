"""Fair ratios: all contestants in one process, one after the other in every round, the median over the rounds.

A benchmark is a list of rows (dicts) with the same keys; `write` puts them as a markdown table and as JSON into
`benchmarks/results/`, with the versions and the number of threads they were measured with.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant: the median over the rounds, and half the range between the quartiles."""

    median: float
    spread: float
    seconds: tuple[float, ...]

    def __str__(self) -> str:
        """Return the milliseconds, median ± spread."""
        return f"{1e3 * self.median:.4g} ± {1e3 * self.spread:.2g} ms"


def compare(contestants: Mapping[str, Callable[[], Any]], *, rounds: int = 7, warmup: int = 1) -> dict[str, Timing]:
    """Return the times of every contestant, measured in turn within each round."""
    for _ in range(warmup):
        for run in contestants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            gc.collect()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: _timing(values) for name, values in seconds.items()}


def ratio(slow: Timing, fast: Timing) -> float:
    """Return how many times faster `fast` is: the median of the ratios within a round, so that shared load cancels."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def setting(**more: Any) -> dict[str, Any]:
    """Return what every table states: versions and threads, and what the benchmark adds (dtype, shapes, ...)."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": "cpu", **more}


def markdown(rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any], title: str) -> str:
    """Return a title, one line of conditions and a table."""
    head = list(rows[0])
    lines = [f"# {title}", "", ", ".join(f"{key}: {value}" for key, value in conditions.items()), ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_cell(row[key]) for key in head) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(name: str, rows: Sequence[Mapping[str, Any]], *, title: str, **conditions: Any) -> None:
    """Write `results/<name>.md` and `results/<name>.json`, and print the table."""
    RESULTS.mkdir(exist_ok=True)
    stated = setting(**conditions)
    text = markdown(rows, stated, title)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    plain = [{key: _plain(value) for key, value in row.items()} for row in rows]
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"setting": stated, "rows": plain}, indent=1) + "\n", encoding="utf-8"
    )
    print(text)


def _timing(seconds: list[float]) -> Timing:
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    return Timing(median, (quartiles[2] - quartiles[0]) / 2, tuple(seconds))


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return {"median_s": value.median, "spread_s": value.spread} if isinstance(value, Timing) else value
