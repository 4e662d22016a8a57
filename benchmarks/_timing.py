"""Fair ratios: all contestants in one process, one after the other in every round, the median over the rounds.

Times are processor time of the process: on one thread that is what a clock shows on an idle machine, and other
programs disturb it less. A benchmark is a list of rows (dicts) with the same keys; `write` puts them as a markdown
table and as JSON into `benchmarks/results/`, with the versions and the number of threads they were measured with.

With `--quick` a benchmark only shows that it runs: the first of its cases, two rounds, nothing written.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

RESULTS = Path(__file__).parent / "results"
QUICK = "--quick" in sys.argv

T = TypeVar("T")


def options(doc: str | None) -> argparse.ArgumentParser:
    """Return the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case, two rounds: does it run? Nothing is written")
    return parser


def few(cases: Iterable[T]) -> list[T]:
    """Return all cases; the first alone of a quick run."""
    return list(cases)[: 1 if QUICK else None]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant: the median over the rounds, and half the range between the quartiles."""

    median: float
    spread: float
    seconds: tuple[float, ...]

    def __str__(self) -> str:
        """Return the milliseconds, median ± spread."""
        return f"{1e3 * self.median:.4g} ± {1e3 * self.spread:.2g} ms"


def compare(
    contestants: Mapping[str, Callable[[], Any]], *, rounds: int = 7, warmup: int = 1, per: int = 1
) -> dict[str, Timing]:
    """Return the times of every contestant, measured in turn within each round, divided by `per` steps of a call."""
    rounds = min(rounds, 2) if QUICK else rounds
    for _ in range(warmup):
        for run in contestants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            gc.collect()
            start = time.process_time()
            run()
            seconds[name].append((time.process_time() - start) / per)
    return {name: _timing(values) for name, values in seconds.items()}


def ratio(slow: Timing, fast: Timing) -> float:
    """Return how many times faster `fast` is: the median of the ratios within a round, so that shared load cancels."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def verdict(reached: float, target: float | None, *, most: bool = False) -> str:
    """Return whether a ratio is at least (or at most) its target, in words for a table."""
    if target is None:
        return ""
    met = reached <= target if most else reached >= target
    return f"{'<=' if most else '>='} {target:g}: {'met' if met else 'missed'}"


def setting(**more: Any) -> dict[str, Any]:
    """Return what every table states: versions and threads, and what the benchmark adds (dtype, shapes, ...)."""
    fixed = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": "cpu", "clock": "processor time"}
    return fixed | more


def markdown(rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any], title: str) -> str:
    """Return a title, one line of conditions, a table, and the rows that missed a target."""
    head = list(rows[0])
    lines = [f"# {title}", "", ", ".join(f"{key}: {value}" for key, value in conditions.items()), ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_cell(row[key]) for key in head) + " |" for row in rows]
    missed = [", ".join(str(row[key]) for key in head[:3]) for row in rows if "missed" in map(_last_word, row.values())]
    lines += ["", "Targets missed: " + ("; ".join(missed) or "none") + "."]
    return "\n".join(lines) + "\n"


def write(name: str, rows: Sequence[Mapping[str, Any]], *, title: str, **conditions: Any) -> None:
    """Write `results/<name>.md` and `results/<name>.json`, and print the table; a quick run only prints."""
    stated = setting(**conditions)
    text = markdown(rows, stated, title)
    if QUICK:
        print(text)
        return
    RESULTS.mkdir(exist_ok=True)
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


def _last_word(value: Any) -> str:
    return str(value).rpartition(" ")[2]


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return {"median_s": value.median, "spread_s": value.spread} if isinstance(value, Timing) else value
