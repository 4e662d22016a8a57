"""The tables of the benchmark of tensor layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import _peers as peers
from _timing import markdown, setting, verdict

BY_HAND, PEER = 1.15, 1.0
"""The most that Rankfold may take of the best order's time, and the least that a peer may take of Rankfold's."""
NOISE = 0.05
"""Two contestants nearer than this, or than their spreads together, are a tie."""

NOTES = f"""## How to read this

- Times are medians over interleaved rounds. A contestant more than four times slower than the fastest runs in the
  first rounds only, one that also takes longer than a second once, and not again with the second allocator.
- `by hand` is the fastest of the best orders that the search has found, timed anew in the same race. `(duel)`:
  the race left Rankfold behind it by more than 5 %, and the ratio is that of a second race of these two alone, of 9 to
  25 rounds; the times beside it are still those of the first.
- `peer` is the fastest layer of another library. A tie is a difference below {NOISE:.0%}, or below both
  spreads together.
- Peak is what torch's allocator hands out during a call beyond what was there before: outputs, intermediates, and in
  training gradients.
- Training is forward and backward, to the input and to all weights; of a table to the weights.
- `rf.plan` leaves a layer dense wherever the planned contraction has more multiply-adds than the dense layer (or as
  many, where they are what the budget limits). A table has none when it is dense: it is replaced for its size alone.
"""


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the main table."""
    dense, ours, by_hand = row["dense"], row["ours"], row["by hand"]
    name, peer = min(row["peers"].items(), key=lambda item: item[1]["seconds"], default=("", None))
    duel = row.get("duel") or {"ours": ours, "by hand": by_hand}
    over = duel["ours"]["seconds"] / duel["by hand"]["seconds"]
    faster = peer["seconds"] / ours["seconds"] if peer else None
    noise = max(NOISE, ours["spread"] + peer["spread"]) if peer else NOISE
    cells = {"layer": row["row"], "mode": row["mode"], "allocator": row["allocator"]}
    for title, result in (("dense", dense), ("rankfold", ours), ("by hand", by_hand), ("best peer", peer)):
        cells[title] = f"{1e3 * result['seconds']:.3g} ms" if result else "-"
    cells["best peer"] += f" ({name})" if peer else ""
    cells |= {
        "dense / ours": f"{dense['seconds'] / ours['seconds']:.2f}",
        "ours / by hand": f"{over:.2f}{' (duel)' if row.get('duel') else ''}",
        "goal": verdict(over, BY_HAND, most=True),
        "peer / ours": f"{faster:.2f}" if faster else "-",
        "goal ": "" if faster is None else "tie" if abs(faster - 1) < noise else verdict(faster, PEER),
        "peak MiB: dense, ours, by hand, peer": ", ".join(
            f"{result['peak'] / 2**20:.3g}" if result else "-" for result in (dense, ours, by_hand, peer)
        ),
    }
    return cells


def losers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows in which even the best order by hand is slower than the dense layer."""
    return [
        {
            "layer": row["row"],
            "mode": row["mode"],
            "allocator": row["allocator"],
            "dense / by hand": f"{row['dense']['seconds'] / row['by hand']['seconds']:.2f}",
            "dense / ours": f"{row['dense']['seconds'] / row['ours']['seconds']:.2f}",
            "MACs: dense / planned": f"{row['macs'][0] / max(row['macs'][1], 1):.2f}",
            "left dense by rf.plan": _left_dense(*row["macs"]),
        }
        for row in rows
        if row["by hand"]["seconds"] > row["dense"]["seconds"]
    ]


def _left_dense(dense: int, planned: int) -> str:
    if not dense:
        return "no: replaced for its size"
    return "yes" if planned > dense else "no"


def details(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the best order and every peer of each row."""
    return [
        {
            "layer": row["row"],
            "mode": row["mode"],
            "allocator": row["allocator"],
            "best order by hand": row["order"],
            "Rankfold's plan": row["plan"],
            "peers": "; ".join(
                f"{name} {1e3 * peer['seconds']:.3g} ms, {peer['peak'] / 2**20:.3g} MiB"
                for name, peer in sorted(row["peers"].items(), key=lambda item: item[1]["seconds"])
            ),
        }
        for row in rows
    ]


def report(answers: dict[str, dict[str, Any]], wide_name: str) -> str:
    """Return the tables."""
    rows = [row for answer in answers.values() for row in answer["rows"]]
    order = {row["row"]: k for k, row in enumerate(reversed(rows))}
    rows.sort(key=lambda row: (-order[row["row"]], row["mode"], row["allocator"]))
    speed = ", ".join(f"{answer['gflops']:.0f} ({name})" for name, answer in answers.items())
    stated = setting(dtype="float32", peers=peers.VERSIONS, **{"dense product, GFLOP/s": speed})
    parts = [markdown([table_row(row) for row in rows], stated, "Are tensor layers fast?")] if rows else []
    if slow := losers(rows):
        parts += [_section("Where even the best order loses to the dense layer", slow)]
    wide = [{"allocator": name} | row for name, answer in answers.items() for row in answer["wide"]]
    if wide:
        parts += [_section(f"A step of stochastic gradient descent, {wide_name}", wide)]
    if rows:
        parts += [_section("Orders and peers", details(rows)), NOTES]
    return "\n".join(parts)


def _section(title: str, rows: Sequence[dict[str, Any]]) -> str:
    head = list(rows[0])
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows)]) + "\n"
