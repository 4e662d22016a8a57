"""Multi-head attention whose four projections are layers of their own: called, measured and replaced one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.errors import LayerError
from rankfold.layers._build import Device, copy_
from rankfold.layers._dense import qualified_name
from rankfold.layers._refusal import hooks_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_PACKED = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_OPTIONS = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")


@final
class SeparateAttention(nn.Module):
    """`nn.MultiheadAttention` with a layer for each projection: the arguments, the call and the result are the same.

    `softmax(q k^T / sqrt(head_dim) + mask) v` for each head, with `q = q_proj(query)`, `k = k_proj(key)`,
    `v = v_proj(value)`, and `out_proj` of the heads side by side. With
    `need_weights=False` it is computed by `torch.nn.functional.scaled_dot_product_attention`.

    Reference:
        Vaswani et al. 2017, section 3.2.

    Example:
        >>> dense = nn.MultiheadAttention(32, 4, batch_first=True)
        >>> layer, x = SeparateAttention.from_dense(dense), torch.randn(2, 5, 32)
        >>> torch.testing.assert_close(layer(x, x, x), dense(x, x, x))
    """

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    # torch's encoder layer reads these of a packed attention: None makes it call this module.
    in_proj_weight: None = None
    in_proj_bias: None = None
    _qkv_same_embed_dim = False

    def __init__(  # noqa: PLR0913 - the signature of the dense twin
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(embed_dim, num_heads) < 1 or embed_dim % num_heads:
            raise LayerError(f"SeparateAttention: {embed_dim} features do not divide into {num_heads} heads")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.add_zero_attn, self.batch_first = dropout, add_zero_attn, batch_first
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **where)
        self.k_proj = nn.Linear(self.kdim, embed_dim, bias, **where)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias, **where)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **where)
        for name in ("bias_k", "bias_v"):
            value = nn.Parameter(torch.empty(1, 1, embed_dim, **where)) if add_bias_kv else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh values as `nn.MultiheadAttention` does."""
        # with equal widths torch draws the packed weight as one matrix with three times the rows
        gain = 1.0 if {self.kdim, self.vdim} != {self.embed_dim} else math.sqrt(0.5)
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(layer.weight, gain)
        self.out_proj.reset_parameters()
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for value in (self.bias_k, self.bias_v):
            if value is not None:
                nn.init.xavier_normal_(value)

    def forward(  # noqa: PLR0913 - the signature of the dense twin
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, if `need_weights`, the attention weights, as `nn.MultiheadAttention` does."""
        batched = query.dim() == 3
        if is_causal and attn_mask is None:
            raise LayerError("is_causal=True only says that attn_mask is causal: pass attn_mask too")
        query, key, value = (self._batch_first(x, batched) for x in (query, key, value))
        q, k, v = self._heads(self.q_proj(query)), self._keys(key), self._values(value)
        # With the hint no mask has to be built, unless something else needs one.
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            weights = functional.dropout(_weights(q, k, mask), dropout)  # batch, heads, target, source
            heads = weights @ v
        else:
            heads = functional.scaled_dot_product_attention(q, k, v, mask, dropout, hinted)
        output: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))  # batch, target, embed_dim
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if x.dim() != (3 if batched else 2):
            raise LayerError(
                f"{type(self).__name__} takes query, key and value alike of 2 axes, or of 3 with a batch, "
                f"not one of shape {tuple(x.shape)} among them"
            )
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)  # batch, heads, length, head_dim

    def _keys(self, key: Tensor) -> Tensor:
        return self._extended(self.k_proj(key), self.bias_k)

    def _values(self, value: Tensor) -> Tensor:
        return self._extended(self.v_proj(value), self.bias_v)

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the heads of keys or values, followed by the learned one and the zero one if the layer has them."""
        if bias is not None:
            x = torch.cat([x, bias.to(x.dtype).expand(x.shape[0], 1, -1)], 1)
        if self.add_zero_attn:
            x = functional.pad(x, (0, 0, 0, 1))
        return self._heads(x)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Return what is added to the scores, broadcast to (batch, heads, target, source); None for nothing."""
        batch, heads, target, source = *q.shape[:3], k.shape[2]
        added = (self.bias_k is not None) + self.add_zero_attn  # keys that no mask covers: every query sees them
        total: Tensor | None = None
        if padding is not None:
            total = _additive(padding, q.dtype, added).reshape(-1, 1, 1, source)
        if attention is not None:
            scores = _additive(attention, q.dtype, added)
            if attention.dim() == 3:
                scores = scores.reshape(batch, heads, target, source)
            total = scores if total is None else total + scores
        return total

    @classmethod
    def from_dense(cls, dense: nn.Module) -> SeparateAttention:
        """Return the module with a copy of the weights of an `nn.MultiheadAttention`; keeps dtype, device and modes.

        Raises:
            LayerError: `dense` is a subclass, has hooks, or its weights are parametrised.
        """
        reason = _refusal(dense)
        if reason:
            raise LayerError(f"its projections cannot be separated: {reason}")
        twin: Any = dense
        flags: dict[str, Any] = {"bias": twin.in_proj_bias is not None, "add_bias_kv": twin.bias_k is not None}
        where: dict[str, Any] = {"device": "meta", "dtype": twin.out_proj.weight.dtype}
        layer = cls(**flags, **{name: getattr(twin, name) for name in _OPTIONS}, **where)
        packed = twin.in_proj_weight
        weights = [getattr(twin, name) for name in _PACKED] if packed is None else _parts(packed)
        biases = _parts(twin.in_proj_bias) if flags["bias"] else [None] * 3
        for name, weight, bias in zip(
            PROJECTIONS, [*weights, twin.out_proj.weight], [*biases, twin.out_proj.bias], strict=True
        ):
            projection = getattr(layer, name)
            projection.weight, projection.bias = _copied(weight), _copied(bias)
        layer.bias_k, layer.bias_v = _copied(twin.bias_k), _copied(twin.bias_v)
        return layer.train(dense.training)

    def to_dense(self) -> nn.MultiheadAttention:
        """Return the `nn.MultiheadAttention` that computes the same function.

        Raises:
            LayerError: a projection is no longer an `nn.Linear`.
        """
        if not self.is_dense:
            raise LayerError("a projection is not an nn.Linear: call rankfold.densify on the model first")
        flags: dict[str, Any] = {"bias": self.q_proj.bias is not None, "add_bias_kv": self.bias_k is not None}
        weight = self.out_proj.weight
        where: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
        made = nn.MultiheadAttention(**flags, **{name: getattr(self, name) for name in _OPTIONS}, **where)
        dense: Any = made.to_empty(device=weight.device)
        layers = (self.q_proj, self.k_proj, self.v_proj)
        packed = [layer.weight for layer in layers]
        whole = [dense.in_proj_weight] if dense.in_proj_weight is not None else [getattr(dense, n) for n in _PACKED]
        for target, parts in zip(whole, [packed] if len(whole) == 1 else [[part] for part in packed], strict=True):
            _take(target, parts)
        if flags["bias"]:
            _take(dense.in_proj_bias, [layer.bias for layer in layers])
            _take(dense.out_proj.bias, [self.out_proj.bias])
        _take(dense.out_proj.weight, [weight])
        for target, value in ((dense.bias_k, self.bias_k), (dense.bias_v, self.bias_v)):
            if value is not None:
                _take(target, [value])
        return made.train(self.training)

    @property
    def is_dense(self) -> bool:
        """Whether all four projections are stock layers that agree on having a bias."""
        layers = [getattr(self, name) for name in PROJECTIONS]
        return all(type(layer) is nn.Linear for layer in layers) and len({layer.bias is None for layer in layers}) == 1

    def extra_repr(self) -> str:
        """Return the number of heads and whatever differs from the defaults."""
        others = {"dropout": 0.0, "add_zero_attn": False, "batch_first": False}
        told = [f"{name}={getattr(self, name)}" for name, usual in others.items() if getattr(self, name) != usual]
        return ", ".join([f"num_heads={self.num_heads}", *told])


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
    return functional.softmax(scores if mask is None else scores + mask, dim=-1)


def _additive(mask: Tensor, dtype: torch.dtype, added: int) -> Tensor:
    """Return a mask as a term to add to the scores (-inf where a bool mask is True), zero-padded for added keys."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return functional.pad(mask.to(dtype), (0, added)) if added else mask.to(dtype)


def _refusal(dense: nn.Module) -> str | None:
    if type(dense) is not nn.MultiheadAttention:
        return f"{qualified_name(dense)} is not nn.MultiheadAttention itself, and may compute something else"
    if hooks_of(dense) or hooks_of(dense.out_proj):
        return "it has hooks, which see the module itself: remove them first"
    own = {name for name, _ in dense.named_parameters()}
    known = {"in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias", *_PACKED}
    if not own <= known:
        return f"its parameters {sorted(own - known)} are not those of nn.MultiheadAttention: undo what changed them"
    return "its forward was overwritten on the instance" if "forward" in vars(dense) else None


def _parts(packed: Tensor) -> list[Tensor]:
    """Return the parts of a packed parameter for q, k and v; requires_grad is that of the whole."""
    return [part.detach().requires_grad_(packed.requires_grad) for part in packed.chunk(3)]


def _copied(value: Tensor | None) -> nn.Parameter | None:
    if value is None:
        return None
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), value.requires_grad)


def _take(target: Tensor, parts: Sequence[Tensor]) -> None:
    """Fill a parameter with parts; it requires a gradient if one of them does."""
    if not target.is_meta:
        copy_(target, torch.cat([part.detach() for part in parts]))
    target.requires_grad_(any(part.requires_grad for part in parts))
