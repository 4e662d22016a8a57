"""One layer of neurons, each with its own activation function, that replaces a whole stretch of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn

from rankfold._common import whole
from rankfold.decompose import ELEMENTS, Basis, Coupled, Shapes, even_knots, values_of
from rankfold.errors import LayerError
from rankfold.layers._build import Device, copy_, fresh_bias_, named, place
from rankfold.layers._contract import Cost, Options

if TYPE_CHECKING:
    from typing_extensions import Self

SPREAD = 0.5  # standard deviation of a fresh layer's coordinates, whose range is [-1, 1]


@final
class FlexibleActivation(nn.Module):
    """One trainable function per neuron, `g_k(u) = sum_d c_kd phi_d(u)`, linear beyond [-1, 1] or the outermost knots.

    Args:
        rank: the number of neurons, the last dim of the input.
        basis: "piecewise" (linear between trainable knots), "legendre" or "chebyshev" (polynomials of degree `size`),
            "spline" (cubic B-splines on `size - 3` equal intervals).
        size: the number of functions per neuron.
        element: "relu", "tanh" or "gelu" for one more function, `element(stretch * u + shift)`; "" for none.
        device: where to put the parameters.
        dtype: of the parameters.

    Raises:
        DecompositionError: an unknown basis or element, a rank or size that is too small.

    Example:
        >>> activation = FlexibleActivation(16, "legendre", 3)
        >>> activation(torch.zeros(2, 16)).shape, sum(p.numel() for p in activation.parameters())
        (torch.Size([2, 16]), 48)
    """

    knots: nn.Parameter | None
    stretch: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(  # noqa: PLR0913 (device and dtype as every layer of torch has them)
        self,
        rank: int,
        basis: str = "piecewise",
        size: int = 8,
        element: str = "",
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.basis = Basis(basis, size, element)
        self.rank = rank = whole(f"{type(self).__name__}: rank", rank, error=LayerError)
        shape = {"dtype": dtype, "device": device}
        self.coefficients = nn.Parameter(torch.empty(rank, self.basis.columns, **shape))  # type: ignore[arg-type]
        for name, size_of in {"knots": (self.basis.knots,), "stretch": (), "shift": ()}.items():
            used = self.basis.knots if name == "knots" else element
            empty = torch.empty(rank, *size_of, **shape) if used else None  # type: ignore[arg-type]
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every function to the element if there is one, or else to what is closest to a ReLU in the basis."""
        with torch.device("cpu"):  # computed on the CPU, whatever the default device
            self.set_functions(*_first_functions(self.basis))

    def set_functions(self, coefficients: Tensor, shapes: Shapes) -> None:
        """Take over coefficients (rank, columns), knots, stretches and shifts; a single one of each is broadcast."""
        new = {"coefficients": coefficients, "knots": shapes.knots, "stretch": shapes.stretch, "shift": shapes.shift}
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                copy_(parameter, new[name].expand(parameter.shape))

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.ReLU gives it
        """Apply to each entry of the last dim the function of its neuron."""
        c = self.coefficients.T.contiguous()  # columns, rank: rows that a kernel reads in one go
        output = _FAMILIES[self.basis.kind](input, c[: self.basis.size], self.knots)  # …, rank
        if self.stretch is not None and self.shift is not None:
            raised = ELEMENTS[self.basis.element][0](input * self.stretch + self.shift)
            output = torch.addcmul(output, c[-1], raised)
        return output

    def extra_repr(self) -> str:
        """Return the rank and the basis."""
        return named(self.rank, _options(self.basis))


def _first_functions(basis: Basis) -> tuple[Tensor, Shapes]:
    """Return coefficients (columns,) and shapes of one neuron with the element alone, or nearest to a ReLU."""
    ones = torch.ones(1, dtype=torch.float64)
    shapes = Shapes(even_knots(basis, 1), ones, 0 * ones)
    if basis.element:
        coefficients = torch.zeros(basis.columns, dtype=torch.float64)
        coefficients[-1] = 1.0
        return coefficients, shapes
    u = torch.linspace(-1, 1, 201, dtype=torch.float64)[:, None]
    # a constant is fitted too, and dropped
    functions = torch.cat([values_of(basis, u, shapes)[:, 0], torch.ones_like(u)], 1)
    return torch.linalg.lstsq(functions, torch.relu(u), driver="gelsd").solution[:-1, 0], shapes


def _options(basis: Basis) -> dict[str, Any]:
    element = {"element": basis.element} if basis.element else {}
    return {"basis": basis.kind, "size": basis.size, **element}


def _piecewise(u: Tensor, c: Tensor, knots: Tensor | None) -> Tensor:
    """Return `c_0 u + sum_j c_j max(0, u - knot_j)`, from `max(0, u - knot) = max(u, knot) - knot`."""
    if knots is None:
        return u * c[0]
    at = knots.T.contiguous()
    output = torch.addcmul(-(c[1:] * at).sum(0), u, c[0])
    for knot, bend in zip(at, c[1:], strict=True):
        output.addcmul_(torch.maximum(u, knot), bend)
    return output


def _continued(ends: Sequence[Sequence[float]], inside: Tensor, u: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """Return the values at u, given those at x, which is u clamped to [-1, 1]: linear along the tangents beyond."""
    left, right = torch.tensor(ends, dtype=c.dtype, device=c.device) @ c  # slopes of the functions times coefficients
    return torch.addcmul(inside, u - x, torch.where(u > 0, right, left))


def _legendre(u: Tensor, c: Tensor, knots: Tensor | None) -> Tensor:
    """Sum Legendre polynomials by Clenshaw's recurrence."""
    del knots
    x = u.clamp(-1, 1)
    after, later = c[-1], torch.zeros_like(c[-1])
    for n in range(len(c) - 1, 0, -1):
        rest = torch.sub(c[n - 1], later, alpha=(n + 1) / (n + 2))
        after, later = torch.addcmul(rest, x, after, value=(2 * n + 1) / (n + 1)), after
    right = [n * (n + 1) / 2 for n in range(1, len(c) + 1)]
    return _continued([_odd_signs(right), right], x * after - later / 2, u, x, c)


def _chebyshev(u: Tensor, c: Tensor, knots: Tensor | None) -> Tensor:
    """Sum Chebyshev polynomials by Clenshaw's recurrence."""
    del knots
    x = u.clamp(-1, 1)
    after, later = c[-1], torch.zeros_like(c[-1])
    for n in range(len(c) - 1, 0, -1):
        after, later = torch.addcmul(c[n - 1] - later, x, after, value=2), after
    right = [float(n * n) for n in range(1, len(c) + 1)]
    return _continued([_odd_signs(right), right], x * after - later, u, x, c)


def _odd_signs(slopes: Sequence[float]) -> list[float]:
    """Return the slopes at -1 of polynomials of degree 1, 2, …, alternately odd and even, from those at 1."""
    return [slope if n % 2 == 0 else -slope for n, slope in enumerate(slopes)]


def _spline(u: Tensor, c: Tensor, knots: Tensor | None) -> Tensor:
    """Sum cubic B-splines: the cubic of the interval that each entry is in, by Horner's rule."""
    del knots
    x, intervals = u.clamp(-1, 1), len(c) - 3
    place = (x + 1) * (intervals / 2)
    cell = place.detach().clamp(max=intervals - 0.5).floor()
    powers = torch.tensor(_CUBIC, dtype=c.dtype, device=c.device) @ c.unfold(0, 4, 1).mT  # intervals, power, rank
    at = cell.long().reshape(-1, u.shape[-1])
    constant, *others = (powers[:, k].gather(0, at).reshape(u.shape) for k in range(4))
    inner = place - cell
    output = others[2]
    for power in (others[1], others[0], constant):
        output = torch.addcmul(power, output, inner)
    edge, zeros = [-intervals / 4, 0.0, intervals / 4], [0.0] * intervals
    return _continued([edge + zeros, zeros + edge], output, u, x, c)


_CUBIC = [[1 / 6, 4 / 6, 1 / 6, 0], [-0.5, 0, 0.5, 0], [0.5, -1, 0.5, 0], [-1 / 6, 0.5, -0.5, 1 / 6]]
_FAMILIES = {"piecewise": _piecewise, "legendre": _legendre, "chebyshev": _chebyshev, "spline": _spline}


class FlexibleLayer(nn.Module):
    """What flexible layers share: two pointwise stock layers with the activations between them.

    The final classes say what the stages are, and which dim the neurons lie along.
    """

    method: ClassVar[str] = "flexible"
    dense_type: ClassVar[type[nn.Module]]
    kernel: ClassVar[tuple[int, ...]] = ()
    """Positional arguments of a stage's constructor after its two sizes."""

    down: Any
    up: Any

    def __init__(
        self, sizes: tuple[int, int], bias: bool, device: Device, dtype: torch.dtype | None, **neurons: Any
    ) -> None:
        super().__init__()
        self.activation = FlexibleActivation(**neurons, device=device, dtype=dtype)
        make: Any = self.dense_type
        empty: dict[str, Any] = {"device": "meta", "dtype": dtype}
        self.down = place(make(sizes[0], self.rank, *self.kernel, **empty), device)
        self.up = place(make(self.rank, sizes[1], *self.kernel, bias=bias, **empty), device)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values: for white input, coordinates well inside [-1, 1] and the output variance of a dense layer.

        The activations are reset as in `FlexibleActivation.reset_parameters`.
        """
        self.activation.reset_parameters()
        if self.down.weight.is_meta:
            return
        chances = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64, device="cpu")
        u = SPREAD * math.sqrt(2) * torch.erfinv(2 * chances - 1)
        with torch.no_grad():
            hidden = self.activation(u[:, None].expand(-1, self.rank).to(self.down.weight))
            power = float(hidden.double().square().mean())
        for stage, variance in ((self.down, SPREAD**2), (self.up, 1 / 3 / power)):
            bound = math.sqrt(3 * variance / stage.weight.shape[1])
            fresh = torch.empty(stage.weight.shape, device="cpu").uniform_(-bound, bound, generator=generator)
            copy_(stage.weight, fresh)
        copy_(self.down.bias, torch.zeros(self.rank, device="cpu"))
        fresh_bias_(self.up.bias, self.down.weight.shape[1], generator)

    @classmethod
    def from_linear(cls, layer: FlexibleLinear) -> Self:
        """Return a layer that does along its channels what `FlexibleLinear` does along the last dim; copies values."""
        make: Any = cls
        (out, _), (_, into) = layer.up.weight.shape, layer.down.weight.shape
        where: dict[str, Any] = {"device": "meta", "dtype": layer.down.weight.dtype}
        empty: Self = make(into, out, layer.up.bias is not None, **where, rank=layer.rank, **layer.options)
        new = place(empty, layer.down.weight.device)  # no random numbers drawn
        for name, source in layer.named_parameters():
            parameter = new.get_parameter(name)
            copy_(parameter, source.detach().reshape(parameter.shape))
            parameter.requires_grad_(source.requires_grad)
        return new.train(layer.training)

    @property
    def rank(self) -> int:
        """The number of neurons."""
        return self.activation.rank

    @property
    def options(self) -> Options:
        """The basis of the activations, as the constructor takes it."""
        return _options(self.activation.basis)

    @classmethod
    def cost(cls, into: int, out: int, rows: int, *, rank: int, **options: Any) -> Cost:
        """Return the parameters of such a layer and the multiply-adds of both factors over `rows` rows or positions."""
        make: Any = cls
        twin: nn.Module = make(into, out, device="meta", rank=rank, **options)
        params = sum(parameter.numel() for parameter in twin.parameters())
        return Cost(params, rows * rank * (into + out))


@final
class FlexibleLinear(FlexibleLayer):
    """A stretch of a network as one layer of neurons, each with its own activation: `f(x) = W g(V^T x + a) + b`.

    `Linear(in, rank)`, `FlexibleActivation(rank, basis)`, `Linear(rank, out)`: rank * (in + out + 1) weights and a
    few per neuron for its function. It replaces several layers at once (`rankfold.train.decouple` fits it to data) or
    is trained from scratch.

    Args:
        in_features: size of the input's last dim.
        out_features: size of the output's last dim.
        bias: whether the output has a bias.
        device: where to put the parameters.
        dtype: of the parameters.
        rank: the number of neurons.
        basis: "piecewise" (linear between trainable knots), "legendre" or "chebyshev" (polynomials of degree `size`),
            "spline" (cubic B-splines on `size - 3` equal intervals).
        size: the number of functions per neuron.
        element: "relu", "tanh" or "gelu" for one more function, `element(stretch * u + shift)`; "" for none.

    Raises:
        RankfoldError: a rank below 1, an unknown basis or element, a size that is too small.

    References:
        Zniyed, Usevich, Miron and Brie 2021.

    Example:
        >>> layer = FlexibleLinear(64, 10, rank=8)
        >>> layer(torch.ones(2, 64)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([2, 10]), 730)
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(  # noqa: PLR0913 (the signature of nn.Linear, then the options)
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int,
        basis: str = "piecewise",
        size: int = 8,
        element: str = "",
    ) -> None:
        neurons = {"rank": rank, "basis": basis, "size": size, "element": element}
        super().__init__((in_features, out_features), bias, device, dtype, **neurons)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_factors(
        cls, factors: Coupled, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> FlexibleLinear:
        """Return the layer that computes what `rankfold.decompose.coupled` found."""
        out, into = len(factors.left), len(factors.right)
        dtype = factors.left.dtype if dtype is None else dtype
        empty = cls(into, out, device="meta", dtype=dtype, rank=factors.rank, **_options(factors.basis))
        layer = empty.to_empty(device=factors.left.device if device is None else device)  # no random numbers drawn
        layer.activation.set_functions(factors.coefficients, factors.shapes)
        copy_(layer.down.weight, factors.right.T)
        copy_(layer.down.bias, factors.offset)
        copy_(layer.up.weight, factors.left)
        copy_(layer.up.bias, factors.bias)
        return layer

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        """Apply both factors and the activations between them."""
        coordinates = self.down(input)  # …, rank
        hidden = self.activation(coordinates)  # …, rank
        output: Tensor = self.up(hidden)  # …, out
        return output

    def extra_repr(self) -> str:
        """Return the sizes, the rank and the basis."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {named(self.rank, dict(self.options))}"
