"""Does a factorised convolution take the faster way, chain or kernel rebuilt, and is that as fast as the dense one?

    python benchmarks/should_a_kernel_be_rebuilt.py            # every layer, then the network of reproduce/cp_mnist
    python benchmarks/should_a_kernel_be_rebuilt.py mnist      # that network alone, printed and not written

Dense, stage by stage, by the kernel rebuilt from its factors, and as the layer schedules it, in turn within each round;
float32, one thread, channels last: on a processor that is the faster format for dense and factorised alike. Training is
forward and backward to the weights, and to the input but for the first layer of a network.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _timing import Timing, compare, few, options, ratio, verdict, write
from torch import Tensor, nn
from torch.nn import functional

import rankfold as rf

sys.path.append(str(Path(__file__).parent.parent))
from reproduce.cp_mnist.model import network

NEAR = 1.1  # "no slower than dense by more than 10 per cent"; and the same of the better of both ways
ROUNDS = 5
WORK = 4e7  # multiply-adds that one sample of a contestant is made of, at least
CP, TUCKER, SVD = rf.layers.CPConv2d, rf.layers.TuckerConv2d, rf.layers.LowRankConv2d
SEPARABLE, SPATIAL = {"separable": True}, {"split": "spatial"}
Form = tuple[type[nn.Module], dict[str, Any]]
SMALL: list[Form] = [
    *((CP, {"rank": rank, **SEPARABLE}) for rank in (3, 6, 9)),
    (TUCKER, {"rank": (5, 5)}),
    (SVD, {"rank": 6, **SPATIAL}),
]
FIRST = [(CP, {"rank": rank, **SEPARABLE}) for rank in (3, 6, 9)]
# A quarter of the multiply-adds of the dense layer, or a little less.
LARGE = {
    16: [(CP, {"rank": 8}), (TUCKER, {"rank": (8, 8)}), (SVD, {"rank": 6, **SPATIAL})],
    64: [(CP, {"rank": 64, **SEPARABLE}), (TUCKER, {"rank": (28, 28)}), (SVD, {"rank": 24, **SPATIAL})],
    256: [(CP, {"rank": 256}), (TUCKER, {"rank": (112, 112)}), (SVD, {"rank": 96, **SPATIAL})],
}  # fmt: skip
# channels in, out, size of the image, batches, padding, forms
CASES: list[tuple[int, int, int, Sequence[int], int, list[Form]]] = [
    (1, 10, 28, (64, 1), 0, FIRST),
    (10, 10, 26, (64, 1), 0, SMALL),
    (16, 16, 32, (128, 1), 1, LARGE[16]),
    (64, 64, 56, (8, 1), 1, LARGE[64]),
    (256, 256, 28, (8, 1), 1, LARGE[256]),
]


def rebuilt(layer: Any, x: Tensor) -> Tensor:
    """Convolve with the kernel rebuilt from its factors."""
    return functional.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)


def inference(run: Callable[[Tensor], Tensor], x: Tensor, _: nn.Module, calls: int) -> None:
    with torch.inference_mode():
        for _ in range(calls):
            run(x)


def training(run: Callable[[Tensor], Tensor], x: Tensor, layer: nn.Module, calls: int) -> None:
    wanted = [*layer.parameters(), *([x] if x.requires_grad else [])]
    for _ in range(calls):
        output = run(x)
        torch.autograd.grad(output, wanted, torch.ones_like(output))


def measured(layer: nn.Module, dense: nn.Module, x: Tensor, step: Callable[..., None], calls: int) -> dict[str, Timing]:
    ways = {"dense": (dense, dense), "chain": (nn.Sequential(*layer.children()), layer)}
    ways |= {"rebuilt": (functools.partial(rebuilt, layer), layer), "planned": (layer, layer)}
    runs = {name: functools.partial(step, run, x, owner, calls) for name, (run, owner) in ways.items()}
    return compare(runs, rounds=ROUNDS, per=calls)


def row(form: Form, dense: nn.Module, x: Tensor, step: Callable[..., None]) -> dict[str, Any]:
    kind, options = form
    layer = kind.like(dense, **options).to(memory_format=torch.channels_last)
    x = x if step is training else x.detach()
    with torch.set_grad_enabled(step is training):
        schedule = layer.schedule(x)
    reduction = rf.measure(dense, example=x).macs / rf.measure(layer, example=x).macs
    calls = max(1, min(20, int(WORK / (rf.measure(dense, example=x).macs * len(x)))))
    times = measured(layer, dense, x, step, calls)
    best = min(times["chain"], times["rebuilt"], key=lambda timing: timing.median)
    over = ratio(times["planned"], times["dense"])
    return {
        "layer": f"{dense.in_channels}→{dense.out_channels}, {x.shape[2]}x{x.shape[3]}, batch {len(x)}",
        "form": ", ".join([kind.__name__, *(f"{name} {value}" for name, value in options.items())]),
        "mode": step.__name__,
        **times,
        "plan": schedule.way,
        "planned / best": f"{ratio(times['planned'], best):.2f}",
        "planned / dense": f"{over:.2f}",
        "of fewer MACs": f"{reduction:.2f}x",
        "goal": verdict(over, NEAR, most=True),
    }


def rows_of_layers() -> list[dict[str, Any]]:
    rows = []
    for into, out, size, batches, padding, forms in few(CASES):
        for batch in batches:
            dense = nn.Conv2d(into, out, 3, padding=padding).to(memory_format=torch.channels_last)
            x = torch.randn(batch, into, size, size).to(memory_format=torch.channels_last).requires_grad_(into > 1)
            for form in forms:
                for step in (inference, training):
                    rows.append(row(form, dense, x, step))
                    print(list(map(str, rows[-1].values())), flush=True)
    return rows


def rows_of_the_network() -> list[dict[str, Any]]:
    """One training step of the whole network: forward, backward, Adam."""
    x, labels = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
    models = {rank: network(rank) for rank in (None, 3, 6, 9)}
    optimisers = {rank: torch.optim.Adam(model.parameters(), 1e-4, fused=True) for rank, model in models.items()}

    def step(rank: int | None, calls: int = 5) -> None:
        for _ in range(calls):
            optimisers[rank].zero_grad()
            functional.cross_entropy(models[rank](x), labels).backward()
            optimisers[rank].step()

    times = compare({str(rank): functools.partial(step, rank) for rank in models}, rounds=2 * ROUNDS, warmup=2, per=5)
    rows = []
    for rank in (3, 6, 9):
        over = ratio(times[str(rank)], times["None"])
        rows.append(
            {
                **{"layer": "network of cp_mnist, batch 64", "form": f"CPConv2d, rank {rank}, separable True"},
                **{"mode": "training step", "dense": times["None"], "chain": "", "rebuilt": ""},
                **{"planned": times[str(rank)], "plan": "", "planned / best": "", "planned / dense": f"{over:.2f}"},
                **{"of fewer MACs": "", "goal": verdict(over, NEAR, most=True)},
            }
        )
    return rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("only", nargs="?", choices=["mnist"], help="that network alone, printed and not written")
    words = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # what is there already need not be looked through before every sample
    if words.only:
        for line in rows_of_the_network():
            print(list(map(str, line.values())))
        return
    rows = rows_of_the_network() + rows_of_layers()
    write(
        "should_a_kernel_be_rebuilt",
        rows,
        title="Should a kernel be rebuilt from its factors?",
        dtype="float32",
        rounds=ROUNDS,
    )


if __name__ == "__main__":
    main()
