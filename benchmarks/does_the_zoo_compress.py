"""Does every classification model of torchvision compress to half of its parameters, run, train and survive a file?

    python benchmarks/does_the_zoo_compress.py                  # all that have no result yet
    python benchmarks/does_the_zoo_compress.py resnet50 vit_b_16

Weights are random and inputs as small as the architecture allows. Each model runs in a process of its own; results
are kept in benchmarks/results/does_the_zoo_compress.json and .md as they come, so that a run can be resumed.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

import torch
import torchvision
from _timing import few, options
from torch import Tensor, nn

import rankfold as rf

RESULTS = Path(__file__).parent / "results" / "does_the_zoo_compress.json"
SIZE = 64  # pixels: enough for every stride-32 architecture
SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 28}
ARGUMENTS: dict[str, dict[str, Any]] = {
    **{name: {"image_size": SIZE} for name in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32")},
    "vit_h_14": {"image_size": 28},
    "inception_v3": {"init_weights": False},
    "googlenet": {"init_weights": False},
}
COLUMNS = (
    "model",
    "params",
    "kept",
    "layers",
    "error",
    "seconds",
    "model MB",
    "extra MB",
    "forward",
    "backward",
    "file",
    "note",
)


def names() -> list[str]:
    """Return every classification model of torchvision."""
    return sorted(torchvision.models.list_models(module=torchvision.models))


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Return a model with random weights, in eval mode, and an input for it."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(name, weights=None, **ARGUMENTS.get(name, {})).eval()
    size = SIZES.get(name, SIZE)
    return model, torch.randn(1, 3, size, size)


def compressed(model: nn.Module, example: Tensor, fraction: float) -> tuple[nn.Module, rf.Plan, str]:
    """Compress to a fraction of the parameters, or to the closest that the error says is reachable."""
    try:
        return *rf.compress(model, example=example, budget=rf.Budget(params=fraction)), ""
    except rf.BudgetError as error:
        closest = float(re.findall(r"reachable is params=([0-9.]+)", str(error))[0])
        return *rf.compress(model, example=example, budget=rf.Budget(params=closest)), str(error)


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(name: str, fraction: float) -> dict[str, Any]:
    """Compress one model and try all that it must be able to do afterwards."""
    model, example = build(name)
    dense = sum(parameter.numel() for parameter in model.parameters())
    before, start = peak_bytes(), time.perf_counter()
    small, plan, note = compressed(model, example, fraction)
    seconds = time.perf_counter() - start
    extra = peak_bytes() - before
    output = small(example)
    output.square().sum().backward()
    used = [name for name, choice in plan.layers.items() if choice.method != "dense"]
    gradients = [p.grad for name in used for p in small.get_submodule(name).parameters()]
    params = sum(parameter.numel() for parameter in small.parameters())
    return {
        "model": name,
        "params": dense,
        "kept": params / dense,
        "as_planned": params == plan.params,
        "layers": f"{len(used)} of {len(plan.layers)}",
        "error": plan.error,
        "seconds": seconds,
        "megabytes": 4 * dense / 1e6,
        "extra_megabytes": extra / 1e6,
        "forward": bool(output.isfinite().all()),
        "backward": all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients),
        "file": survives_a_file(name, small, plan, example),
        "note": note,
    }


def survives_a_file(name: str, small: nn.Module, plan: rf.Plan, example: Tensor) -> bool:
    """Tell whether a model that is saved, and loaded into one with other weights, computes the same to the last bit."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rf.save(small, plan, Path(folder) / "small.safetensors")
        loaded = rf.load(Path(folder) / "small.safetensors", build(name, seed=1)[0])
        return torch.equal(loaded(example), small(example))


def in_own_process(name: str, fraction: float, timeout: float) -> dict[str, Any]:
    """Run `check` in a process of its own; a failure is a result too."""
    command = [sys.executable, __file__, "--worker", name, "--fraction", str(fraction)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    except subprocess.TimeoutExpired:
        return {"model": name, "note": f"not finished in {timeout:.0f} s"}
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"ended with code {error.returncode}"]
        return {"model": name, "note": f"failed: {lines[-1]}"}


def passes(result: dict[str, Any], fraction: float) -> bool:
    """Tell whether a result is what was asked for, or the closest reachable with all else in order."""
    checks = ("forward", "backward", "file", "as_planned")
    return all(result.get(key) for key in checks) and (result["kept"] <= fraction or bool(result["note"]))


def row(result: dict[str, Any], fraction: float) -> list[str]:
    """Return a result as cells of the table."""
    if "kept" not in result:
        return [result["model"], *["-"] * (len(COLUMNS) - 2), result["note"]]
    return [
        result["model"],
        f"{result['params']:,}",
        f"{result['kept']:.1%}",
        result["layers"],
        f"{result['error']:.3f}",
        f"{result['seconds']:.1f}",
        f"{result['megabytes']:.0f}",
        f"{result['extra_megabytes']:.0f}",
        *("yes" if result[key] else "NO" for key in ("forward", "backward", "file")),
        result["note"] or ("" if passes(result, fraction) else "does not pass"),
    ]


def write(results: dict[str, dict[str, Any]], fraction: float) -> None:
    """Write the results as JSON and as a table."""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    passed = sum(passes(result, fraction) for result in results.values())
    lines = [
        "# Does every classification model of torchvision compress to half of its parameters?",
        "",
        f"{passed} of {len(results)} pass. Budget: params = {fraction:g}, default methods (svd, tucker), random "
        f"weights, batch 1, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"{torch.get_num_threads()} threads. "
        "Seconds are those of measuring, planning and applying; extra MB is what the process grew by at its peak "
        "meanwhile, the compressed model and one-off buffers of the libraries included. Error: root mean square "
        "over the layers of the relative error of their random weights.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
        *("| " + " | ".join(row(results[name], fraction)) + " |" for name in sorted(results)),
        "",
        "Command: `python benchmarks/does_the_zoo_compress.py`",
    ]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Check the models named, or all that have no result yet."""
    parser = options(__doc__)
    parser.add_argument("models", nargs="*", help="models to check again; all without a result if none is named")
    parser.add_argument("--fraction", type=float, default=0.5, help="parameters kept")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one model")
    parser.add_argument("--worker", help=SUPPRESS)
    words = parser.parse_args()
    if words.worker:
        print(json.dumps(check(words.worker, words.fraction)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    missing = ["mobilenet_v3_small"] if words.quick else [name for name in names() if name not in results]
    for name in few(words.models or missing):
        results[name] = in_own_process(name, words.fraction, words.timeout)
        if not words.quick:
            write(results, words.fraction)
        print(" | ".join(row(results[name], words.fraction)), flush=True)


if __name__ == "__main__":
    main()
