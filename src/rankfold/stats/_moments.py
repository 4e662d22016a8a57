"""Second moments of the inputs of layers: summed chunk by chunk, turned into a metric, written to a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankfold._common import json_text, read_tensors, write_tensors
from rankfold.errors import DataError, StoreError
from rankfold.layers import Metric, Rows, row_size

PATCHES = 32  # per image; 3,000 images with 10 patches each were enough for VGG-16 (Zhang et al. 2016)
MEMORY = 2**31
CHUNK = 8192
BLOCK = 512
LEAST = 2  # a covariance needs two inputs


@dataclass(frozen=True, eq=False)
class Moments:
    """Means over the inputs of one layer.

    Attributes:
        count: number of inputs: rows of a linear layer, patches of a convolution.
        second: (groups, n, n), float64: mean of `x x^T`, not centred.
        mean: (groups, n), float64: mean of x.
        output_second: (out,), float64: mean square of each output at the same positions, bias included.
        output_weights: (out,), float64: mean squared gradient of the loss of one sample in each output, over all
            positions; None
            without a loss.
    """

    count: int
    second: Tensor = field(repr=False)
    mean: Tensor = field(repr=False)
    output_second: Tensor = field(repr=False)
    output_weights: Tensor | None = field(default=None, repr=False)

    def metric(self, *, weighted: bool = False) -> Metric | None:
        """Return the metric of these inputs; None if they are too few for a covariance.

        Args:
            weighted: whether to weight the errors of the outputs by the gradients of the loss.

        Raises:
            DataError: there are no gradients.
        """
        if weighted and self.output_weights is None:
            raise DataError("there are no gradients to weight outputs by: give measure(…, loss=) a loss")
        if self.count < LEAST:
            return None
        mean = self.mean[:, :, None]
        covariance = shrunk(torch.baddbmm(self.second, mean, mean.mT, alpha=-1), self.count)
        return Metric(torch.baddbmm(covariance, mean, mean.mT), self.mean, self.output_weights if weighted else None)


def shrunk(covariance: Tensor, count: int) -> Tensor:
    """Return a covariance C of `count` inputs shrunk towards its diagonal: `(1 - a) C + a diag(C)`.

    `a = min(1, sum_ij (C_ii C_jj + C_ij^2) / (count sum_ij C_ij^2))`, over all i != j, minimises the expected squared
    error for normally distributed inputs: it is near 0 for many or strongly correlated inputs, and 1 if everything off
    the diagonal is noise. A positive semidefinite matrix remains so.

    Args:
        covariance: (groups, n, n), symmetric.
        count: number of inputs from which it was estimated.

    References:
        Ledoit and Wolf 2004; Schaefer and Strimmer 2005, target D.

    Example:
        >>> shrunk(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), 10)
        tensor([[[2.0000, 0.5000],
                 [0.5000, 2.0000]]])
    """
    diagonal = covariance.diagonal(dim1=1, dim2=2).clamp(min=0)
    squares = torch.linalg.vector_norm(covariance, dim=(1, 2)).square() - diagonal.square().sum(1)
    variances = diagonal.sum(1).square() - diagonal.square().sum(1) + squares
    share = torch.where(squares > 0, variances / (count * squares).clamp(min=torch.finfo(squares.dtype).tiny), 1.0)
    share = share.clamp(max=1.0)[:, None]
    result = covariance * (1 - share[..., None])
    result.diagonal(dim1=1, dim2=2).add_(share * diagonal)
    return result


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left^T right` to a float64 sum, multiplying chunks of rows in their own dtype.

    Args:
        total: (groups, m, n), float64, changed in place.
        left: (groups, count, m).
        right: (groups, count, n).
    """
    for a, b in zip(torch.split(left, CHUNK, dim=1), torch.split(right, CHUNK, dim=1), strict=True):
        total += a.mT @ b


def _add_square(total: Tensor, rows: Tensor) -> None:
    """Add the diagonal blocks of `rows^T rows` and those to their right: little more than half the work."""
    for start in range(0, rows.shape[2], BLOCK):
        columns = slice(start, start + BLOCK)
        add_product(total[:, columns, start:], rows[:, :, columns], rows[:, :, start:])


def _mirror(total: Tensor) -> None:
    """Copy the entries above the diagonal to below it."""
    for start in range(0, total.shape[2], BLOCK):
        end = start + BLOCK
        total[:, end:, start:end] = total[:, start:end, end:].mT
        corner = total[:, start:end, start:end]
        corner.copy_((corner + corner.mT) / 2)


class Sums:
    """The running sums of one layer, allocated at its first call on the device of its input."""

    def __init__(self) -> None:
        """Start with no sums."""
        self.count = 0
        self.positions = 0
        self.waiting: list[Tensor] = []
        self.shift: Tensor | None = None
        self.second: Tensor | None = None
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None
        self.gradients: Tensor | None = None

    def add(self, rows: Rows) -> None:
        """Add rows to the sums.

        Raises:
            DataError: they hold NaN or Inf, or numbers too large to be squared.
        """
        inputs, outputs = _where_float64_is(rows.inputs), _where_float64_is(rows.outputs)
        if not (inputs.abs() <= math.sqrt(torch.finfo(inputs.dtype).max / CHUNK)).all():
            raise DataError("NaN or Inf, or numbers too large to be squared")
        if self.shift is None or self.second is None or self.mean is None or self.squares is None:
            groups, _, n = inputs.shape
            # With float32 inputs far from zero, a small variance would be lost in rounding.
            self.shift = inputs.mean(1, keepdim=True)
            self.second = inputs.new_zeros(groups, n, n, dtype=torch.float64)
            self.mean = inputs.new_zeros(groups, n, dtype=torch.float64)
            self.squares = inputs.new_zeros(outputs.shape[1], dtype=torch.float64)
        self.mean += inputs.sum(1, dtype=torch.float64)
        self.squares += outputs.double().square().sum(0)
        self.count += inputs.shape[1]
        self.waiting.append(inputs - self.shift)
        # A few rows at a time would take longer to add than to multiply; these take at most half the bytes of the sum.
        if sum(part.shape[1] for part in self.waiting) >= min(CHUNK, inputs.shape[2]):
            self._add_waiting()

    def _add_waiting(self) -> None:
        if self.waiting and self.second is not None:
            _add_square(self.second, torch.cat(self.waiting, dim=1))
        self.waiting = []

    def add_gradients(self, gradients: Tensor, scale: float) -> None:
        """Add the squares of gradients (count, out), multiplied by a scale."""
        scaled = _where_float64_is(gradients).double() * scale
        if self.gradients is None:
            self.gradients = scaled.new_zeros(scaled.shape[1])
        self.gradients += scaled.square().sum(0)
        self.positions += len(scaled)

    def moments(self) -> Moments | None:
        """Return the means on the CPU, consuming the sums; None if nothing was added."""
        self._add_waiting()
        if self.shift is None or self.second is None or self.mean is None or self.squares is None:
            return None
        rows = None if self.gradients is None else (self.gradients / max(1, self.positions)).cpu()
        second, self.second = self.second.div_(self.count).cpu(), None
        _mirror(second)
        mean = (self.mean / self.count).cpu()
        rest = mean - self.shift[:, 0].double().cpu()
        second += mean[:, :, None] * mean[:, None, :] - rest[:, :, None] * rest[:, None, :]
        return Moments(self.count, second, mean, (self.squares / self.count).cpu(), rows)


def _where_float64_is(values: Tensor) -> Tensor:
    return values.cpu() if values.device.type == "mps" else values


def bytes_of(layer: nn.Module) -> int | None:
    """Return the size of a layer's second moment in bytes; None for a kind of layer that has none."""
    size = row_size(layer)
    return None if size is None else 8 * size[0] * size[1] ** 2


WEIGHTS = "rows"  # what the file calls the weights of the outputs
PARTS = {"second": "second", "mean": "mean", "output_second": "output_second", WEIGHTS: "output_weights"}
HEADER = "rankfold_moments"


def write_moments(path: str | os.PathLike[str], moments: Mapping[str, Moments], texts: Mapping[str, str]) -> None:
    """Write the moments of layers, by name, and further texts to one file, atomically.

    Raises:
        StoreError: the file can't be written.
    """
    tensors = {
        f"{name}.{part}": tensor
        for name, layer in moments.items()
        for part, field_name in PARTS.items()
        if (tensor := getattr(layer, field_name)) is not None
    }
    counts = json.dumps({name: layer.count for name, layer in moments.items()})
    write_tensors(path, tensors, {HEADER: counts, **texts})


def read_moments(path: str | os.PathLike[str]) -> tuple[dict[str, Moments], dict[str, str]]:
    """Read and check what `write_moments` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: the file is damaged or of another kind.
    """
    tensors, texts = read_tensors(path)
    counts = json_text(path, texts, HEADER)
    if not isinstance(counts, dict) or not all(type(count) is int and count >= 1 for count in counts.values()):
        raise StoreError(f"{os.fspath(path)}: the header's table of counts is damaged")
    moments = {}
    for name, count in counts.items():
        parts = {part: tensors.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors}
        reason = _damage(parts)
        if reason:
            raise StoreError(f"{os.fspath(path)}: the moments of layer {name!r} are damaged: {reason}")
        moments[name] = Moments(count, **{PARTS[part]: tensor for part, tensor in parts.items()})
    if tensors:
        raise StoreError(f"{os.fspath(path)} holds a tensor {sorted(tensors)[0]!r} that belongs to no layer's moments")
    return moments, texts


def _damage(parts: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong with the tensors of one layer."""
    missing = [part for part in PARTS if part not in parts and part != WEIGHTS]
    if missing:
        return f"{missing[0]} is missing"
    wrong = [part for part, t in parts.items() if t.dtype != torch.float64 or not torch.isfinite(t).all()]
    if wrong:
        return f"{wrong[0]} is not made of finite float64 numbers"
    second, mean, outputs = parts["second"], parts["mean"], parts["output_second"]
    fits = mean.dim() == 2 and second.shape == (*mean.shape, mean.shape[1]) and outputs.dim() == 1
    if not fits or parts.get(WEIGHTS, outputs).shape != outputs.shape:
        return f"the shapes {', '.join(str(tuple(t.shape)) for t in parts.values())} do not fit each other"
    return None if torch.equal(second, second.mT) else "second is not symmetric"
