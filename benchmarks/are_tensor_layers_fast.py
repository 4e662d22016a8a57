"""Are tensor layers as fast as a contraction written by hand, as other libraries, and as the dense layer?

    python benchmarks/are_tensor_layers_fast.py              # the table, under 12 minutes
    python benchmarks/are_tensor_layers_fast.py --search     # first time every order of contraction anew: longer
    python benchmarks/are_tensor_layers_fast.py --duels      # decide anew what the race of the table left open
    python benchmarks/are_tensor_layers_fast.py --quick      # few rounds, prints only
    python benchmarks/are_tensor_layers_fast.py --quick --only "rank 8, batch 1$"

For each layer, in inference (the forward pass) and in training (forward and backward, to the input and all weights;
of a table to the weights): the dense layer, Rankfold, whatever other libraries are installed (`_peers.py`), and the
best contraction written by hand (`_handwritten.py`). `--search` times all of its orders and keeps the fastest of each
row in `results/are_tensor_layers_fast_orders.json`; every run races those anew. All hold the same factors, are modules
(what is written by hand too) and are checked against the dense layer. One thread; processor time; rounds interleaved;
medians. Few rounds of long calls scatter by more than the goal allows for, and the best of several orders is the
luckiest one: where the race leaves Rankfold behind by more than 5 %, it meets the best order once more alone, in at
least nine rounds, and that ratio counts. Memory is the peak of torch's allocator above what is held before the call.
Everything runs twice, in processes of their own: with glibc's allocator as it is, and with its trimming off, because
freed activations are page-faulted again otherwise.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import copy
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _peers as peers
import torch
from _memory import peak_bytes
from _race import Contestant, Result, check, first_call, once, race
from _tensor_cases import Case, Entry, cases, fill, tt_cores
from _tensor_report import report
from _timing import RESULTS, verdict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rankfold as rf

NAME = "are_tensor_layers_fast"
ORDERS = RESULTS / f"{NAME}_orders.json"
ALLOCATORS = {
    "glibc": {},
    "no trimming": {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**34)},
}
MODES = ("inference", "training")
REFINED, KEPT = 6, 4
"""How many of the fastest orders a search tries in chunks, and how many of all take part in the race."""
SCREEN = 128
"""Rows on which orders are compared first, where the batch is much larger."""


OPEN = 1.05
"""Of the time of the best order by hand: from here on a duel decides."""
DUEL_SECONDS, DUEL_ROUNDS = 6.0, (9, 25)

# Orders: searched once, raced always.


def search(case: Case, upstream: Tensor | None, gflops: float) -> list[str]:
    """Time every order once, whole batches first, then the refinements of the best ones; return the fastest.

    An order whose multiply-adds alone take longer, at the speed of a large product of matrices, than the fastest one
    found so far cannot win and is not run. For large batches, orders three times slower than the fastest on a few rows
    are not either.
    """
    every = {entry.contestant.name: entry for entry in case.orders(upstream is not None)}
    passes = 1 if upstream is None else 3  # a backward pass has two products for each of the forward pass
    x = case.x

    def measure(entries: Sequence[Entry], rows: int, found: dict[str, float]) -> dict[str, float]:
        for entry in sorted(entries, key=lambda entry: entry.macs):
            best = min(found.values(), default=float("inf"))
            if 2 * entry.macs * passes * rows / len(x) / (1.2 * gflops * 1e9) < best:
                given = None if upstream is None else upstream[:rows]
                found[entry.contestant.name] = once(entry.contestant, x[:rows], given, limit=best)
        return found

    def fastest(found: dict[str, float], count: int) -> list[str]:
        return sorted(found, key=lambda title: found[title])[:count]

    screened = [entry for entry in every.values() if not entry.parent]
    if len(x) > 2 * SCREEN and x.ndim == 2:
        few = measure(screened, SCREEN, {})
        screened = [every[title] for title in few if few[title] < 3 * min(few.values())]
    found = measure(screened, len(x), {})
    leaders = fastest(found, REFINED)
    measure([entry for entry in every.values() if entry.parent in leaders], len(x), found)
    measure([every[title] for title in fastest(found, 2 * KEPT)], len(x), found)
    kept = fastest(found, KEPT)
    print(f"    {len(found)} of {len(every)} orders timed; {kept[0]}: {1e3 * found[kept[0]]:.3g} ms", file=sys.stderr)
    return kept


def known_orders() -> dict[str, list[str]]:
    """Return the fastest orders of each row and mode that have been searched."""
    return json.loads(ORDERS.read_text(encoding="utf-8")) if ORDERS.exists() else {}


def remember(orders: dict[str, list[str]]) -> None:
    """Add to the orders known, at once: a search that is interrupted is not lost."""
    RESULTS.mkdir(exist_ok=True)
    ORDERS.write_text(json.dumps(known_orders() | orders, indent=1) + "\n", encoding="utf-8")


def matmul_gflops(size: int = 1536) -> float:
    """Return the speed of a large product of matrices."""
    a = torch.randn(size, size)
    times = []
    for _ in range(6):
        start = time.process_time()
        a @ a
        times.append(time.process_time() - start)
    return 2 * size**3 / min(times) / 1e9


def measure(case: Case, training: bool, kept: dict[str, list[str]], options: argparse.Namespace) -> dict[str, Any]:
    """Return one row with everything measured."""
    place = f"{case.name} | {MODES[training]}"
    key = f"{case.searched_as or case.name} | {MODES[training]}"
    upstream = None
    if training:
        with torch.no_grad():
            upstream = torch.randn_like(case.dense(case.x))
    if key not in kept:
        kept[key] = search(case, upstream, options.gflops)
        remember({key: kept[key]})
    every = {entry.contestant.name: entry.contestant for entry in case.orders(training)}
    by_hand = [every[title] for title in kept[key] if title in every]
    dense, ours = Contestant.of("dense", case.dense), Contestant.of("rankfold", case.ours)
    rivals = [Contestant.of(title, layer) for title, layer in case.rivals.items()]
    skipped = [
        rival.name for rival in rivals if options.alone or [case.name, MODES[training], rival.name] in options.skip
    ]
    rivals = [rival for rival in rivals if rival.name not in skipped]
    check([ours, *by_hand, *rivals], dense, case.x)
    firsts = {} if place in options.peaks else {c.name: first_call(c, case.x, upstream) for c in (dense, ours, *rivals)}
    seconds = {name: first[0] for name, first in firsts.items()}
    times = race([dense, ours, *by_hand, *rivals], case.x, upstream, seconds=options.seconds, known=seconds)
    best = min(by_hand, key=lambda contestant: statistics.median(times[contestant.name]))
    held = options.peaks.get(place) or {name: first[1] for name, first in firsts.items()}
    results = {name: Result(found, held.get(name, 0)) for name, found in times.items()}
    by_hand_peak = first_call(best, case.x, upstream)[1]
    open_ = results["rankfold"].median > OPEN * results[best.name].median
    return {
        "row": case.name,
        "mode": MODES[training],
        "duel": duel(case, ours, best, upstream) if open_ else None,
        "dense": results["dense"],
        "ours": results["rankfold"],
        "by hand": Result(times[best.name], by_hand_peak),
        "order": best.name,
        "peers": {rival.name: results[rival.name] for rival in rivals},
        "skipped": skipped,
        "macs": macs(case),
        "plan": schedule_words(case, training),
    }


def duel(case: Case, ours: Contestant, best: Contestant, upstream: Tensor | None) -> dict[str, Result]:
    """Race Rankfold and one order alone."""
    times = race([ours, best], case.x, upstream, seconds=DUEL_SECONDS, known={}, rounds=DUEL_ROUNDS)
    return {"ours": Result(times[ours.name]), "by hand": Result(times[best.name])}


def duels(places: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Return the duels of rows that are named by layer, mode and order."""
    rows = []
    for name, mode, order in places:
        (case,) = (case for case in cases(f"^{re.escape(name)}$") if case.name == name)
        training = mode == MODES[1]
        with torch.no_grad():
            upstream = torch.randn_like(case.dense(case.x)) if training else None
        best = next(entry.contestant for entry in case.orders(training) if entry.contestant.name == order)
        found = duel(case, Contestant.of("rankfold", case.ours), best, upstream)
        print(f"  {name}, {mode}: {found['ours'].median / found['by hand'].median:.2f}", file=sys.stderr, flush=True)
        rows.append({"row": name, "mode": mode, "duel": found})
    return rows


def macs(case: Case) -> tuple[int, int]:
    """Return the multiply-adds of a forward pass: of the dense layer and of Rankfold's, as its schedule counts them."""
    call = rf.layers.Call(tuple(case.x.shape), (*case.x.shape, case.dense.weight.shape[-1]))
    if case.x.is_floating_point():
        with torch.no_grad():
            call = rf.layers.Call(tuple(case.x.shape), tuple(case.dense(case.x[:1]).shape))
        call = rf.layers.Call(call.input, (len(case.x), *call.output[1:]))
    ours = type(case.ours).cost(case.dense, [call], rank=case.ours.rank, **case.ours.options)
    return rf.layers.dense_cost(case.dense, [call]).macs, ours.macs


def schedule_words(case: Case, training: bool) -> str:
    """Return how Rankfold computes the layer."""
    if isinstance(case.ours, rf.layers.TTLinear):
        schedule = case.ours.schedule(len(case.x), training)
        chunks = f", {schedule.chunk} rows at a time" if schedule.chunk < schedule.rows else ""
        return f"{schedule.order}{chunks}{', recomputed' if schedule.recomputed else ''}"
    if isinstance(case.ours, rf.layers.TTEmbedding):
        return str(case.ours.schedule(len(case.x.unique())))
    schedule = case.ours.schedule(case.x, training)
    return f"{schedule.way} {list(schedule.groups)}"


# The wide network of Novikov et al. (2015).

WIDE = (((8,) * 6, (4, 4, 4, 4, 4, 3)), ((4,) * 6, (8,) * 6))  # (out, in) modes of its two tensor layers
WIDE_RANK, WIDE_BATCH, WIDE_GIB = 8, 32, 4.0
WIDE_NAME = f"wide net 3072 -> 262,144 -> 4096 -> 10 TT rank {WIDE_RANK}, batch {WIDE_BATCH}"


def wide_nets() -> dict[str, nn.Module]:
    """Return the network 3072 -> 262,144 -> 4096 -> 10 in Rankfold's layers and in those of the others."""
    trains = [tuple(tt_cores(*shapes, WIDE_RANK)) for shapes in WIDE]
    pairs: list[dict[str, nn.Module]] = []
    for cores, (out_shape, in_shape) in zip(trains, WIDE, strict=True):
        sizes = torch.Size(in_shape).numel(), torch.Size(out_shape).numel()
        ours = rf.layers.TTLinear(*sizes, bias=False, rank=WIDE_RANK, in_shape=in_shape, out_shape=out_shape)
        rivals = {name: layer for name, layer in peers.tt_linear(cores).items() if "reconstructed" not in name}
        pairs.append({"rankfold": fill(ours, cores), **rivals})
    head = nn.Linear(4096, 10)
    return {
        name: nn.Sequential(pairs[0][name], nn.ReLU(), pairs[1][name], nn.ReLU(), copy.deepcopy(head))
        for name in pairs[0]
    }


def wide_row(gflops: float, rounds: int, alone: bool) -> list[dict[str, Any]]:
    """Return what a step of stochastic gradient descent takes; Rankfold first, before anybody else has used memory."""
    x, labels = torch.randn(WIDE_BATCH, 3072), torch.arange(WIDE_BATCH) % 10
    nets = wide_nets()

    def step(net: nn.Module) -> Callable[[], None]:
        optimiser = torch.optim.SGD(net.parameters(), lr=1e-3)

        def run() -> None:
            nn.functional.cross_entropy(net(x), labels).backward()
            optimiser.step()
            optimiser.zero_grad()

        return run

    rows = []
    for name, net in nets.items():
        if alone and name != "rankfold":
            continue
        run = step(net)
        run()
        peak = peak_bytes(run)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with FlopCounterMode(display=False) as counter:
            run()
        times = []
        for _ in range(rounds):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        seconds = statistics.median(times)
        flops = counter.get_total_flops()
        rows.append(
            {
                "network": name,
                "step": f"{1e3 * seconds:.4g} ms",
                "MACs of a step": f"{flops / 2:.4g}",
                "GFLOP/s": f"{flops / seconds / 1e9:.3g}",
                "dense product's GFLOP/s": f"{gflops:.3g}",
                "peak": f"{peak / 2**20:.4g} MiB",
                "process so far": f"{resident / 2**20:.4g} MiB",
                "goal, GiB": verdict(peak / 2**30, WIDE_GIB, most=True) if name == "rankfold" else "",
            }
        )
    return rows


# Workers, one per allocator, and the table.


def worker(options: argparse.Namespace) -> None:
    """Measure all rows in this process and write them to the file of the answer."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    answer = Path(options.answer)
    given = json.loads(answer.read_text(encoding="utf-8"))
    kept, options.skip, options.peaks = given["orders"], given["skip"], given["peaks"]
    if given.get("duels"):
        answer.write_text(json.dumps({"rows": duels(given["duels"])}, default=_plain), encoding="utf-8")
        return
    options.gflops = matmul_gflops()
    wide = (
        wide_row(options.gflops, 2 if options.quick else 5, options.alone) if re.search(options.only, WIDE_NAME) else []
    )
    rows: list[dict[str, Any]] = []
    for case in cases(options.only):
        for training in (False, True):
            print(f"  {case.name}, {MODES[training]}", file=sys.stderr, flush=True)
            row = measure(case, training, kept, options)
            rows.append({"allocator": options.allocator, **row})
            _say(rows[-1])
    text = json.dumps({"rows": rows, "wide": wide, "gflops": options.gflops, "orders": kept}, default=_plain)
    answer.write_text(text, encoding="utf-8")


def _say(row: dict[str, Any]) -> None:
    shown = {name: row[name] for name in ("dense", "ours", "by hand")} | row["peers"]
    print(
        "    " + "; ".join(f"{name} {1e3 * r.median:.3g} ms {r.peak / 2**20:.3g} MiB" for name, r in shown.items()),
        file=sys.stderr,
        flush=True,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return {"seconds": value.median, "spread": value.spread, "rounds": len(value.seconds), "peak": value.peak}
    raise TypeError(type(value).__name__)


def in_own_process(allocator: str, given: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Measure everything with one allocator; `given` are the orders known and the peers to skip."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        answer.write_text(json.dumps(given), encoding="utf-8")
        command = [sys.executable, __file__, *arguments, "--allocator", allocator, "--answer", str(answer)]
        print(f"allocator: {allocator}", file=sys.stderr)
        subprocess.run(command, check=True, env=os.environ | ALLOCATORS[allocator])
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="time every order of contraction anew")
    parser.add_argument("--quick", action="store_true", help="few rounds, one allocator; no table is written")
    parser.add_argument(
        "--only", default="", help="rows in whose name this regular expression is found; no table is written"
    )
    parser.add_argument("--duels", action="store_true", help="only the duels of the open rows of the table there is")
    parser.add_argument("--alone", action="store_true", help="without the other libraries")
    parser.add_argument("--seconds", type=float, default=0.6, help="per row, mode and allocator")
    parser.add_argument("--allocator", choices=ALLOCATORS, help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.seconds = min(options.seconds, 0.3)
    if options.answer:
        worker(options)
        return
    if options.duels:
        decide_again()
        return
    given: dict[str, Any] = {"orders": {} if options.search else known_orders(), "skip": [], "peaks": {}}
    answers: dict[str, dict[str, Any]] = {}
    for allocator in list(ALLOCATORS)[: 1 if options.quick else None]:
        answers[allocator] = answer = in_own_process(allocator, given, sys.argv[1:])
        given["orders"] = answer.pop("orders")
        given["skip"] = [[row["row"], row["mode"], name] for row in answer["rows"] for name in hopeless(row)]
        given["peaks"] = {f"{row['row']} | {row['mode']}": peaks(row) for row in answer["rows"]}
    if not answer["rows"] and not answer["wide"]:
        parser.error(f"--only {options.only!r} matches no row")
    if not (options.quick or options.only or options.alone):
        write(answers)
    print(report(answers, WIDE_NAME))


def write(answers: dict[str, dict[str, Any]]) -> None:
    """Write the table and what it is made of."""
    (RESULTS / f"{NAME}.md").write_text(report(answers, WIDE_NAME), encoding="utf-8")
    (RESULTS / f"{NAME}.json").write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


def decide_again() -> None:
    """Have every open row of the table decided by a duel, in a process per allocator as ever."""
    answers = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
    for allocator, answer in answers.items():
        rows = {(row["row"], row["mode"]): row for row in answer["rows"]}
        left = [row for row in rows.values() if row["ours"]["seconds"] > OPEN * row["by hand"]["seconds"]]
        places = [[row["row"], row["mode"], row["order"]] for row in left]
        given = {"orders": {}, "skip": [], "peaks": {}, "duels": places}
        for found in in_own_process(allocator, given, [])["rows"] if places else []:
            rows[found["row"], found["mode"]]["duel"] = found["duel"]
    write(answers)


def peaks(row: dict[str, Any]) -> dict[str, int]:
    """Return the peaks of a row by contestant: they do not depend on the allocator."""
    named = {"dense": row["dense"], "rankfold": row["ours"]} | row["peers"]
    return {name: result["peak"] for name, result in named.items()}


def hopeless(row: dict[str, Any]) -> list[str]:
    """Return the peers that need not be run with the second allocator: four times slower than Rankfold, and long."""
    limit = max(4 * row["ours"]["seconds"], 0.1)
    return [name for name, peer in row["peers"].items() if peer["seconds"] > limit]


if __name__ == "__main__":
    main()
