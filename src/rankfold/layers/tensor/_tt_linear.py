"""The tensor-train layer of Novikov et al. (2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.layers._build import Device, check_type, finite_weight, fresh_bias_
from rankfold.layers._contract import Call, Cost, Rank
from rankfold.layers.tensor._tt_chain import TTForm, make_form
from rankfold.layers.tensor._tt_contract import core_list, in_chunks, matrices_of, sweep_state
from rankfold.layers.tensor._tt_layer import TTLayer
from rankfold.layers.tensor._tt_order import BATCHES, Sweep, bucket, schedule_sweep
from rankfold.layers.tensor._tt_schedule import TTSchedule, checked_recompute, describe, pick, sweeps, wants_gradients


@final
class TTLinear(TTLayer):
    """A linear layer whose weight is a tensor train over paired modes of outputs and inputs.

    `W[(m_1 ... m_d), (n_1 ... n_d)] = G_1[:, m_1, n_1] ... G_d[:, m_d, n_d]`. The forward pass is a chain of
    reshapes and matrix products in an order chosen for the number of rows and for inference or training (`schedule`),
    and the weight is built only where that is cheaper and the weight small. At ranks 1 to 8 a layer with thousands of
    inputs has a few hundred to a few thousand parameters; at large ranks, or large batches, a dense or a low-rank layer
    is faster. Rows are taken in chunks to keep intermediates small; a compiled or exported program takes them all at
    once.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether to add a bias.
        device: where to put the parameters.
        dtype: of the parameters.
        rank: a cap for every bond, clipped to what each can have, or one per bond.
        in_shape: dims whose product is at least `in_features`; by default balanced. Larger products are padded.
        out_shape: as many dims for `out_features`.
        recompute: recompute intermediates in backward, chunk by chunk, where they have more than this many times the
            entries of input and output; 0 recomputes all of them, None (default) keeps them.
        redundant: allows bonds beyond what the modes can use, and does not clip an int `rank`: for training
            from scratch in a published configuration that has such bonds. No dense weight has that decomposition.

    Raises:
        LayerError: a rank out of range, shapes too small or of different lengths, a negative `recompute`.

    Reference:
        Novikov, Podoprikhin, Osokin, Vetrov (2015), Tensorizing neural networks.

    Example:
        >>> import torch
        >>> layer = TTLinear(25088, 4096, rank=4, in_shape=(2, 7, 8, 8, 7, 4), out_shape=(4,) * 6, bias=False)
        >>> sum(p.numel() for p in layer.parameters())
        2016
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(  # noqa: PLR0913 (the signature of nn.Linear)
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        recompute: float | None = None,
        redundant: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        form = make_form("TTLinear", (out_features, in_features), in_shape, out_shape, redundant=redundant)
        self._assemble(form, rank, device, dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.recompute = checked_recompute("TTLinear", recompute)
        self._schedules = sweeps(self._chain, recompute)
        self._padding = math.prod(form.in_shape) - in_features
        self._surplus = math.prod(form.out_shape) - out_features
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values with the output variance of a fresh `nn.Linear`, 1/3 for white input, and its bias."""
        self._fresh(self.out_features / 3, generator)
        fresh_bias_(self.bias, self.in_features, generator)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        """Multiply the train by the last axis of the input."""
        rows = input if input.dim() == 2 else input.reshape(-1, self.in_features)
        cores = core_list(self, len(self._chain.out_shape))
        sweep = pick(self._schedules, rows.shape[0], wants_gradients(cores))
        matrices = matrices_of(cores, sweep)
        if not sweep.recompute and (torch.compiler.is_compiling() or rows.shape[0] <= sweep.chunk):
            output = self._swept(sweep, rows, *matrices)  # the usual call, kept short
        else:
            run = partial(self._swept, sweep)
            output = in_chunks(run, rows, matrices, chunk=sweep.chunk, recompute=sweep.recompute)
        return output if input.dim() == 2 else output.reshape(*input.shape[:-1], self.out_features)

    def _swept(self, sweep: Sweep, rows: Tensor, *matrices: Tensor) -> Tensor:
        """Apply the matrices of a sweep to rows of the input, and add the bias."""
        if self._padding:
            rows = functional.pad(rows, (0, self._padding))
        output = sweep_state(rows, matrices, sweep)  # rows, padded out
        if self._surplus:
            output = output[:, : self.out_features]
        return output if self.bias is None else output + self.bias.to(output.dtype)  # autocast does not narrow it

    def schedule(self, batch: int, training: bool | None = None) -> TTSchedule:
        """Return how the layer would be computed for a number of rows, and what that costs.

        Args:
            batch: rows of the input, >= 0.
            training: whether a backward pass follows; by default, whether it would after a call here and now.

        Example:
            >>> import torch
            >>> layer = TTLinear(4096, 4096, rank=8, in_shape=(8, 8, 8, 8), out_shape=(8, 8, 8, 8))
            >>> layer.schedule(1024, training=True).groups, layer.schedule(1024, training=True).chunk
            (((0, 2), (2, 4)), 16)
        """
        cores = core_list(self, len(self._chain.out_shape))
        mode = wants_gradients(cores) if training is None else training
        return describe(self._chain, pick(self._schedules, batch, mode), batch, mode, cores[0].element_size())

    @property
    def weight(self) -> Tensor:
        """The dense weight (out_features, in_features), rebuilt from the cores on every read (differentiable)."""
        return self._matrix()

    @classmethod
    def cost(cls, dense: nn.Module, calls: Sequence[Call], *, rank: Rank, **options: Any) -> Cost:
        """Return parameters, and multiply-adds of the order chosen for the rows of each call."""
        form = cls._form_of(dense, **options)
        chain, bias = form.chain(rank), dense.out_features if dense.bias is not None else 0
        rows = [math.prod(call.input[:-1]) for call in calls]
        macs = sum(schedule_sweep(chain, BATCHES[bucket(count)]).macs(count) for count in rows)
        return Cost(form.params(rank) + int(bias), macs)  # type: ignore[arg-type]

    @staticmethod
    def _arguments(dense: Any) -> dict[str, Any]:
        features = {"in_features": dense.in_features, "out_features": dense.out_features}
        return {**features, "bias": dense.bias is not None}

    @classmethod
    def _form_of(
        cls,
        dense: Any,
        *,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        recompute: float | None = None,
        redundant: bool = False,
    ) -> TTForm:
        check_type(cls, dense, nn.Linear)
        checked_recompute("TTLinear", recompute)
        sizes = (dense.out_features, dense.in_features)
        return make_form("TTLinear", sizes, in_shape, out_shape, redundant=redundant)

    @classmethod
    def _matrix_of(cls, dense: Any) -> Tensor:
        check_type(cls, dense, nn.Linear)
        return finite_weight(cls, dense)
