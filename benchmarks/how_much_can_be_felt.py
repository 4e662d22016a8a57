"""How much of fewer multiply-adds could be felt at best, with accuracy left out of account?

    python benchmarks/how_much_can_be_felt.py                        # three models, two runtimes, batches of 1 and 8
    python benchmarks/how_much_can_be_felt.py resnet50 --kept-memory

Every layer is timed dense and in all forms of methods svd and tucker, as `compress` does for a budget on latency. Of
all choices of one form or rank per layer whose multiply-adds are the share asked for (one hundredth less at most), the
fastest is found by integer programming. Errors play no part, so that no plan can do better by that table of times;
plans that keep accuracy do worse. `is_the_promised_latency_met.py` has what plans reach in the whole model.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import few
from is_the_promised_latency_met import BATCHES, FELT, KEPT_MEMORY, RUNTIMES, build, options_of_settings, seconds
from scipy.optimize import Bounds, LinearConstraint, milp

import rankfold as rf
from rankfold.latency import Timing, time_layers
from rankfold.planning import Candidates, candidates

RESULTS = Path(__file__).parent / "results" / "how_much_can_be_felt.json"
MODELS = ("resnet18", "resnet50", "vgg16")
WIDTH = 0.01  # of the window of multiply-adds below the share asked for


def first(layers: Any, _: Any) -> Any:
    """Stand for a rule where candidates are all that is wanted: leave every layer dense."""
    return {name: choices[0] for name, choices in layers.items()}


def fastest(found: Candidates, share: float) -> tuple[float, float] | None:
    """Return the shares of multiply-adds and time of the fastest choice near a share of multiply-adds, or None."""
    whole = found.whole
    rows = [(k, choice) for k, choices in enumerate(found.layers.values()) for choice in choices]
    owner = np.array([k for k, _ in rows])
    times, macs = (
        np.array([choice.amounts[name] for _, choice in rows], dtype=float) / whole.dense[name]
        for name in ("latency", "macs")
    )
    one_each = np.equal.outer(np.arange(len(found.layers)), owner)
    dense = [choices[0] for choices in found.layers.values()]
    fixed_time = 1 - sum(choice.latency or 0 for choice in dense) / (whole.dense.latency or 1)
    fixed_macs = 1 - sum(choice.macs or 0 for choice in dense) / (whole.dense.macs or 1)
    limits = (share - WIDTH - fixed_macs, share - fixed_macs)
    done = milp(
        times,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(macs[None], *limits)],
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-3},
    )
    return None if done.x is None else (float(macs @ done.x) + fixed_macs, float(done.fun) + fixed_time)


def check(name: str, runtime: str, batch: int, *, seconds: float) -> dict[str, Any]:
    """Time the layers of one model in one setting and find the fastest choices."""
    torch.set_num_threads(1)
    model, x, _ = build(name, batch, runtime, 1)
    timing = Timing(runtime=runtime, threads=1, seconds=seconds)
    stats = time_layers(model, rf.measure(model, example=x), example=x, timing=timing)
    found = candidates(
        model, quantities=("macs", "latency"), stats=stats, planning=rf.Planning(rule=first, init="random")
    )
    return {"model": name, "runtime": runtime, "batch": batch, "best": {s: fastest(found, s) for s in FELT}}


def write(results: dict[str, dict[str, Any]]) -> None:
    """Write the results as JSON and as a table."""
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    lines = [
        "# How much of fewer multiply-adds could be felt at best?",
        "",
        f"torch {torch.__version__}, one thread, 224x224, float32, BatchNorm folded, methods svd and tucker. Of all "
        "choices of a form per layer with the share of multiply-adds (one hundredth less at most), the fastest by the "
        "measured times of layers, whatever it would do to the accuracy. Felt: the speed-up over the reduction of "
        "multiply-adds.",
        "",
        "| model | runtime | batch | MACs kept | least time | felt at most | asked |",
        "|" + " --- |" * 7,
    ]
    for _, result in sorted(results.items()):
        runtime = result["runtime"] + (", memory kept" if result.get("kept_memory") else "")
        for share, best in result["best"].items():
            cells = "none | - | -" if best is None else f"{best[0]:.1%} | {best[1]:.1%} | {best[0] / best[1]:.2f}"
            lines.append(f"| {result['model']} | {runtime} | {result['batch']} | {cells} | {FELT[float(share)]:g} |")
    lines += ["", "Command: `python benchmarks/how_much_can_be_felt.py`"]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measure the models named, or all that have no result yet, every setting in a process of its own."""
    words = options_of_settings(__doc__).parse_args()
    if words.worker:
        print(json.dumps(check(*json.loads(words.models[0]), seconds=words.seconds)))
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    settings = itertools.product(words.models or MODELS, words.runtime or RUNTIMES, words.batch or BATCHES)
    for setting in few(settings):
        key = " ".join([*map(str, setting), *(["kept memory"] if words.kept_memory else [])])
        if key in results and not (words.models or words.quick):
            continue
        worker = [sys.executable, __file__, json.dumps(setting), "--worker", "--seconds", str(seconds(words))]
        environment = {**os.environ, **(KEPT_MEMORY if words.kept_memory else {})}
        done = subprocess.run(worker, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        results[key] = {**json.loads(done.stdout.splitlines()[-1]), "kept_memory": words.kept_memory}
        if not words.quick:
            write(results)
        print(key, results[key]["best"], flush=True)


if __name__ == "__main__":
    main()
