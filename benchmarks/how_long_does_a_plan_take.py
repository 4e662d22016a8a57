"""How long do planning and applying take for a whole network, and how much memory do they need?

    python benchmarks/how_long_does_a_plan_take.py                  # ResNet-50 at half of its multiply-adds
    python benchmarks/how_long_does_a_plan_take.py --model resnet18 --threads 2

Seconds are of the clock. The peak is the most memory that the process held above what it held before the model was
built (libraries loaded and warm), in units of the model's size: the model itself and the compressed one are included.
"""

from __future__ import annotations

import resource
import time

import torch
import torchvision
from _timing import options, write
from torch import nn

import rankfold as rf


def resident() -> int:
    """Return the bytes that the process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def warm_up() -> None:
    """Run each step once on a small network, so that the buffers of the libraries are there."""
    net = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3))
    rf.compress(net, example=torch.randn(1, 8, 32, 32), budget=rf.Budget(macs=0.5))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--threads", type=int, default=1)
    words = parser.parse_args()
    name = "resnet18" if words.quick else words.model
    torch.set_num_threads(words.threads)
    warm_up()
    before = resident()
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    start = time.perf_counter()
    stats = rf.measure(model, example=torch.randn(1, 3, 224, 224))
    measured = time.perf_counter()
    plan = rf.plan(model, budget=rf.Budget(macs=0.5), stats=stats)
    planned = time.perf_counter()
    small = rf.apply(model, plan)
    applied = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    row = {
        "MACs kept": f"{rf.measure(small, example=torch.randn(1, 3, 224, 224)).macs / stats.macs:.1%}",
        "measure": f"{measured - start:.1f} s",
        "plan": f"{planned - measured:.1f} s",
        "apply": f"{applied - planned:.1f} s",
        "plan + apply, target < 60 s": f"{applied - measured:.1f} s: {'met' if applied - measured < 60 else 'missed'}",
        "model": f"{size / 1e6:.0f} MB",
        "peak, target < 3x the model": f"{peak / size:.2f}x: {'met' if peak < 3 * size else 'missed'}",
    }
    title = "How long does a plan take?"
    write("how_long_does_a_plan_take", [{"network": name} | row], title=title, clock="wall time")


if __name__ == "__main__":
    main()
