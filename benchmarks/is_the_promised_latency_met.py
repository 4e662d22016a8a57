"""Does a plan for half of the latency run in half of the time, and how much of fewer multiply-adds is felt?

    python benchmarks/is_the_promised_latency_met.py                                  # all that have no result yet
    python benchmarks/is_the_promised_latency_met.py resnet18 --runtime eager --batch 1 --threads 1 --budget latency=0.5

Architectures of torchvision with random weights: only shapes matter for speed. Dense and compressed models are treated
alike: BatchNorm is folded first, and in eager PyTorch both are in the memory format that `fastest_layout` chooses.
Every setting runs in a process of its own; results are kept in benchmarks/results/is_the_promised_latency_met.json and
.md as they come, so that a run can be resumed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from _timing import few, options
from torch import Tensor, nn

import rankfold as rf
from rankfold.latency import Timing, fastest_layout, steady_clock, time_models

RESULTS = Path(__file__).parent / "results" / "is_the_promised_latency_met.json"
MODELS = ("resnet18", "resnet50", "vgg16", "mobilenet_v3_large", "vit_b_16")
RUNTIMES, BATCHES, THREADS = ("eager", "onnxruntime"), (1, 8), (1, 2)
BUDGETS = ("latency=0.5", "macs=0.5", "macs=0.25", "macs=0.5,latency=0.55", "macs=0.25,latency=0.31")
MET = 1.1  # of a promised latency
ASKED = 4  # times at most
SLACK = 1.02  # over the closest reachable budget, which the next measurement may find a little higher
KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}
FELT = {0.5: 0.85, 0.25: 0.75}  # shares of MACs kept, and the least speed-up over the reduction of MACs
COLUMNS = (
    "model",
    "runtime",
    "batch",
    "threads",
    "budget",
    "dense ms",
    "small ms",
    "faster",
    "promised",
    "fewer MACs",
    "faster / fewer MACs",
    "params kept",
    "planned in",
    "note",
)


def limits(budget: str) -> dict[str, float]:
    """Return the limits that a text such as "macs=0.5,latency=0.6" stands for."""
    return {name: float(share) for name, share in (part.split("=") for part in budget.split(","))}


def build(name: str, batch: int, runtime: str, threads: int) -> tuple[nn.Module, Tensor, str]:
    """Return a dense model prepared for inference, an input, and the name of its memory format."""
    torch.manual_seed(0)
    model = rf.fold_batchnorm(torchvision.models.get_model(name, weights=None).eval())
    x = torch.randn(batch, 3, 224, 224)
    layout = torch.contiguous_format
    if runtime != "onnxruntime":  # which has a format of its own
        layout = fastest_layout(model, x, runtime=runtime, threads=threads)
    return model.to(memory_format=layout), x.to(memory_format=layout), str(layout).removeprefix("torch.")


def compressed(model: nn.Module, x: Tensor, budget: dict[str, float], timing: Timing) -> tuple[Any, Any, str]:
    """Compress within a budget, or within the closest that the error says is reachable, asked for up to three times.

    Once is not always enough: what was reachable in one measurement may be a little less so in the next.
    """
    asked, note, last = budget, "", ""
    for _ in range(ASKED):
        try:
            return *rf.compress(model, example=x, budget=rf.Budget(**asked), timing=timing), note
        except rf.BudgetError as error:
            told = re.search(r"reachable is (.*?)(;|$)", str(error))
            closest = {name: float(share) for name, share in re.findall(r"(\w+)=([0-9.]+)", told[1] if told else "")}
            asked = {name: min(1.0, max(share, SLACK * closest.get(name, 0.0))) for name, share in asked.items()}
            note = "not reachable; tried " + ", ".join(f"{name}={share:g}" for name, share in asked.items())
            last = str(error)
    return None, None, last


def check(name: str, runtime: str, batch: int, threads: int, budget: str, *, seconds: float) -> dict[str, Any]:
    """Compress one model in one setting and time it beside the dense one."""
    torch.set_num_threads(threads)
    dense, x, layout = build(name, batch, runtime, threads)
    given = rf.separate_attention(dense) if name.startswith("vit") else dense
    start = time.perf_counter()
    timing = Timing(runtime=runtime, threads=threads, seconds=seconds)
    small, plan, note = compressed(given, x, limits(budget), timing)
    planned = time.perf_counter() - start
    key = {"model": name, "runtime": runtime, "batch": batch, "threads": threads, "budget": budget}
    if small is None:
        return {**key, "note": note}
    clock = steady_clock(dense, threads)
    times = time_models({"dense": dense, "small": small}, x, runtime=runtime, threads=threads, clock=clock, seconds=20)
    macs = [rf.measure(model, example=x).macs for model in (dense, small)]
    return {
        **key,
        "layout": layout,
        "dense_seconds": times["dense"].median,
        "small_seconds": times["small"].median,
        "faster": times["small"].ratio,
        "faster_quartiles": times["small"].ratio_quartiles,
        "promised": plan.dense.latency / plan.latency if plan.latency else None,
        "measured_when_planned": 1 / plan.measured.kept if plan.measured else None,
        "fewer_macs": macs[0] / macs[1],
        "params_kept": plan.params / plan.dense.params,
        "methods": sorted({choice.method for choice in plan.layers.values()}),
        "planned_in": planned,
        "note": note,
    }


def verdict(result: dict[str, Any]) -> str:
    """Return what a result says of the targets."""
    if "faster" not in result:
        return result["note"]
    told = [result["note"]] if result["note"] else []
    budget = limits(result["budget"])
    if result["faster"] < 0.98:
        told.append("SLOWER than dense")
    if "latency" in budget and not result["note"] and 1 / result["faster"] > MET * budget["latency"]:
        told.append(f"missed latency={budget['latency']:g}")
    least = FELT.get(budget.get("macs", 0.0))
    if least and result["faster"] / result["fewer_macs"] < least:
        told.append(f"below {least:g}")
    return "; ".join(told)


def row(result: dict[str, Any]) -> list[str]:
    """Return a result as cells of the table."""
    head = [str(result[name]) for name in COLUMNS[:5]]
    head[1] += ", memory kept" if result.get("kept_memory") else ""
    if "faster" not in result:
        return [*head, *["-"] * (len(COLUMNS) - 6), verdict(result)]
    return [
        *head,
        f"{1e3 * result['dense_seconds']:.1f}",
        f"{1e3 * result['small_seconds']:.1f}",
        f"{result['faster']:.2f}x",
        f"{result['promised']:.2f}x" if result["promised"] else "-",
        f"{result['fewer_macs']:.2f}x",
        f"{result['faster'] / result['fewer_macs']:.2f}",
        f"{result['params_kept']:.0%}",
        f"{result['planned_in']:.0f} s",
        verdict(result),
    ]


def write(results: dict[str, dict[str, Any]]) -> None:
    """Write the results as JSON and as a table."""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    lines = [
        "# Is the promised latency met?",
        "",
        f"torchvision {torchvision.__version__}, torch {torch.__version__}, random weights, 224x224, float32, "
        "BatchNorm folded into dense and compressed models alike, methods svd and tucker. Faster: the median over "
        "interleaved rounds of dense over compressed, processor time on one thread, time on the wall on two. "
        "Promised: the sum over layers after the last correction. Planned in: seconds to measure, plan, verify and "
        "decompose; layers that an earlier row timed come from the cache. Memory kept: glibc was told not to give the "
        "memory of large tensors back to the system, by " + " ".join(f"{k}={v}" for k, v in KEPT_MEMORY.items()) + ".",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
        *("| " + " | ".join(row(results[key])) + " |" for key in sorted(results)),
        "",
        "Command: `python benchmarks/is_the_promised_latency_met.py`",
    ]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def in_own_process(setting: tuple[Any, ...], words: argparse.Namespace) -> dict[str, Any]:
    """Run `check` in a process of its own; a failure is a result too."""
    worker = [json.dumps(setting), "--worker", "--seconds", str(seconds(words))]
    head = {**dict(zip(COLUMNS, setting, strict=False)), "kept_memory": words.kept_memory}
    environment = {**os.environ, **(KEPT_MEMORY if words.kept_memory else {})}
    try:
        done = subprocess.run(
            [sys.executable, __file__, *worker],
            capture_output=True,
            text=True,
            timeout=words.timeout,
            check=True,
            env=environment,
        )
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return {**result, "kept_memory": words.kept_memory}
    except subprocess.TimeoutExpired:
        return {**head, "note": f"not finished in {words.timeout:.0f} s"}
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"ended with code {error.returncode}"]
        return {**head, "note": f"failed: {lines[-1]}"}


def seconds(words: argparse.Namespace) -> float:
    """Return the time to spend on the layers of one model."""
    return 1.0 if words.quick else float(words.seconds)


def options_of_settings(doc: str | None) -> argparse.ArgumentParser:
    """Return the options that choose models, runtimes and batch sizes, each setting in a process of its own."""
    parser = options(doc)
    parser.add_argument("models", nargs="*", help="models to measure again; all without a result if none is named")
    parser.add_argument("--runtime", action="append", choices=RUNTIMES, help="only this runtime")
    parser.add_argument("--batch", action="append", type=int, help="only this batch size")
    parser.add_argument("--kept-memory", action="store_true", help="let glibc keep the memory of large tensors")
    parser.add_argument("--seconds", type=float, default=90, help="time to spend on the layers of one model")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Measure the settings named, or all that have no result yet."""
    parser = options_of_settings(__doc__)
    parser.add_argument("--threads", action="append", type=int, help="only this number of threads")
    parser.add_argument("--budget", action="append", help="only this budget, such as macs=0.5,latency=0.6")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one setting")
    words = parser.parse_args()
    if words.worker:
        print(json.dumps(check(*json.loads(words.models[0]), seconds=words.seconds)))
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    settings = itertools.product(
        words.models or MODELS,
        words.runtime or RUNTIMES,
        words.batch or BATCHES,
        words.threads or THREADS,
        words.budget or BUDGETS,
    )
    for setting in few(settings):
        key = " ".join([*map(str, setting), *(["kept memory"] if words.kept_memory else [])])
        if key in results and not (words.models or words.quick):
            continue
        results[key] = in_own_process(setting, words)
        if not words.quick:
            write(results)
        print(" | ".join(row(results[key])), flush=True)


if __name__ == "__main__":
    main()
