"""Does a factorised layer run faster than its dense twin, and by how much of what its multiply-adds promise?

    python benchmarks/does_it_run_faster.py

Each layer is cut to half and to a quarter of its multiply-adds by each method alone (`plan` with one method), with
random weights: only shapes matter here. Inference in float32 on one thread, dense and factorised in turn.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from _timing import compare, few, options, ratio, write
from torch import Tensor, nn

import rankfold as rf

CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv 64, 3x3, 56x56, batch 1": (nn.Conv2d(64, 64, 3, padding=1, bias=False), (1, 64, 56, 56)),
    "conv 64, 3x3, 56x56, batch 8": (nn.Conv2d(64, 64, 3, padding=1, bias=False), (8, 64, 56, 56)),
    "conv 256, 3x3, 28x28, batch 1": (nn.Conv2d(256, 256, 3, padding=1, bias=False), (1, 256, 28, 28)),
    "conv 256, 3x3, 28x28, batch 8": (nn.Conv2d(256, 256, 3, padding=1, bias=False), (8, 256, 28, 28)),
    "linear 4096, batch 1": (nn.Linear(4096, 4096), (1, 4096)),
    "linear 4096, batch 32": (nn.Linear(4096, 4096), (32, 4096)),
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "svd, channel": ("svd", {"split": "channel"}),
    "svd, spatial": ("svd", {"split": "spatial"}),
    "tucker": ("tucker", {}),
    "cp": ("cp", {}),
    "cp, separable": ("cp", {"separable": True}),
}
SHARES = (0.5, 0.25)
ROUNDS = 15


def cut(dense: nn.Module, x: Tensor, method: str, options: dict[str, Any], share: float) -> nn.Module:
    """Return the largest form of a layer within a share of its multiply-adds, with fresh weights."""
    options = {} if isinstance(dense, nn.Linear) else options
    layer = rf.layers.layer_class(dense, method)
    calls = [rf.layers.Call(tuple(x.shape), tuple(dense(x).shape))]
    limit = share * rf.layers.dense_cost(dense, calls).macs
    macs = {rank: layer.cost(dense, calls, rank=rank, **options).macs for rank in layer.rank_grid(dense, **options)}
    fitting = [rank for rank in macs if macs[rank] <= limit]
    # Of a pair of ranks the one nearest to equal: the planner would look at the weights.
    return layer.like(dense, rank=max(fitting, key=lambda r: (round(macs[r] / limit, 1), -_uneven(r))), **options)


def _uneven(rank: int | tuple[int, ...]) -> int:
    return 0 if isinstance(rank, int) else max(rank) - min(rank)


def main() -> None:
    options(__doc__).parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (dense, shape) in few(CASES.items()):
        x = torch.randn(shape)
        forms = {"svd": FORMS["svd, channel"]} if isinstance(dense, nn.Linear) else FORMS
        layouts = {"NCHW": torch.contiguous_format} | ({"NHWC": torch.channels_last} if x.ndim == 4 else {})
        for layout, memory in layouts.items():
            given = x.to(memory_format=memory)
            models = {"dense": dense} | {
                f"{form} {share:g}": cut(dense, x, *forms[form], share) for form in forms for share in SHARES
            }
            # The weights follow the layout of the input, so that no convolution has to convert them.
            models = {key: model.to(memory_format=memory).eval() for key, model in models.items()}
            with torch.inference_mode():
                runs = {key: functools.partial(model, given) for key, model in models.items()}
                times = compare(runs, rounds=ROUNDS)
            stats = {key: rf.measure(model, example=x).macs for key, model in models.items()}
            for key in models:
                if key == "dense":
                    continue
                reduction, faster = stats["dense"] / stats[key], ratio(times["dense"], times[key])
                rows.append(
                    {
                        "layer": name,
                        "layout": layout if x.ndim == 4 else "",
                        "form": key.rpartition(" ")[0],
                        "dense": times["dense"],
                        "factorised": times[key],
                        "fewer MACs": f"{reduction:.2f}x",
                        "faster": f"{faster:.2f}x",
                        "faster / fewer MACs": f"{faster / reduction:.2f}",
                    }
                )
    write("does_it_run_faster", rows, title="Does a factorised layer run faster?", dtype="float32", rounds=ROUNDS)


if __name__ == "__main__":
    main()
