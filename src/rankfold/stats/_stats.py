"""The measured statistics of a model: plain data that can be printed, stored and compared."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rankfold._common import html_table, json_text, text_table
from rankfold.errors import PlanError, StoreError
from rankfold.layers import Call, Metric
from rankfold.stats._moments import Moments, read_moments, write_moments
from rankfold.stats._times import LayerTime, LayerTimes

HEADS = ("layer", "kind", "params", "MACs", "calls", "inputs", "ms")  # of the printed table
LEFT = ("layer", "kind")  # columns of words
OPTIONAL = ("inputs", "ms")  # left out where no layer has a value


@dataclass(frozen=True)
class LayerStats:
    """The type and size of one layer, and its calls.

    Attributes:
        kind: name of the layer's type.
        params: number of its parameters, bias included.
        macs: multiply-adds of all its calls in the batch, divided by the batch size.
        calls: the shapes of all calls, in order; empty if the layer was not called as a module.
        moments: moments of its inputs; None if they were not requested or not available.
    """

    kind: str
    params: int
    macs: int
    calls: tuple[Call, ...]
    moments: Moments | None = None


@dataclass(frozen=True)
class Stats:
    """The statistics of a model that `measure` returns; `print` and notebooks show them as a table.

    Attributes:
        layers: by name, every layer that a plan must name: those that can be factorised and those that are.
        params: number of parameters of the whole model, shared ones counted once, without buffers.
        macs: multiply-adds of the whole model on the batch, divided by the batch size.
        batch_size: first dimension of the first tensor of the input.
        left_out: if moments were requested, the layers that have none, with the reason.
        times: measured times of the layers, from `rankfold.latency.time_layers`; not saved to files or JSON.
        uncounted: operators of the model that multiply, and whose multiply-adds no formula gives: they count as none.
    """

    layers: Mapping[str, LayerStats]
    params: int
    macs: int
    batch_size: int
    left_out: Mapping[str, str] = field(default_factory=dict)
    times: LayerTimes | None = None
    uncounted: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the layers as an aligned table, followed by the whole model."""
        return "\n".join([text_table(*self._table(), left=LEFT), "", *self._totals()])

    def _repr_html_(self) -> str:
        return html_table(*self._table(), left=LEFT, below=self._totals())

    def _table(self) -> tuple[list[str], list[list[str]]]:
        timed = {} if self.times is None else self.times.layers
        rows = [_row(name, layer, timed.get(name)) for name, layer in self.layers.items()]
        heads = [head for head in HEADS if head not in OPTIONAL or any(row[head] for row in rows)]
        return heads, [[row[head] for head in heads] for row in rows]

    def _totals(self) -> list[str]:
        lines = [f"whole model: {self.params:,} params, {self.macs:,} MACs per example (batch of {self.batch_size})"]
        if self.uncounted:
            lines.append(f"without the multiply-adds of {', '.join(self.uncounted)}, which no formula gives")
        lines += [f"no moments of {name or '(model)'}: {reason}" for name, reason in self.left_out.items()]
        if self.times is not None:
            lines.append(f"one pass of the whole model: {1e3 * self.times.whole:.4g} ms ({self.times.setting})")
            lines += [f"no time of {name or '(model)'}: {reason}" for name, reason in self.times.left_out.items()]
        return lines

    def metric(self, name: str, *, weighted: bool = False) -> Metric | None:
        """Return the metric of a layer's inputs; None if it has no moments or had too few inputs.

        The covariance of few inputs is shrunk towards its diagonal.

        Args:
            name: name of the layer.
            weighted: whether to weight its outputs by the mean squared gradients of the loss that `measure` was given.

        Raises:
            PlanError: there is no such layer.
            DataError: no gradients were measured.
        """
        if name not in self.layers:
            raise PlanError(f"the statistics have no layer {name!r}: measure the model that has it")
        moments = self.layers[name].moments
        return None if moments is None else moments.metric(weighted=weighted)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics with their moments to one safetensors file, atomically.

        Raises:
            StoreError: the file can't be written; an old file is then intact.
        """
        moments = {name: layer.moments for name, layer in self.layers.items() if layer.moments is not None}
        write_moments(path, moments, {"stats": self.to_json(), "left_out": json.dumps(dict(self.left_out))})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Stats:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: the file is damaged or of another kind.
        """
        moments, texts = read_moments(path)
        left_out = json_text(path, texts, "left_out")
        try:
            stats = cls.from_json(texts.get("stats", ""))
        except PlanError as error:
            raise StoreError(f"{os.fspath(path)}: {error}") from error
        if not isinstance(left_out, dict) or not moments.keys() <= stats.layers.keys():
            raise StoreError(f"{os.fspath(path)}: the moments are of other layers than the statistics: measure again")
        layers = {name: replace(layer, moments=moments.get(name)) for name, layer in stats.layers.items()}
        return replace(stats, layers=layers, left_out={name: str(reason) for name, reason in left_out.items()})

    def to_json(self) -> str:
        """Return the statistics without their moments as JSON text."""
        layers = {
            name: {
                "kind": layer.kind,
                "params": layer.params,
                "macs": layer.macs,
                "calls": [[list(call.input), list(call.output)] for call in layer.calls],
            }
            for name, layer in self.layers.items()
        }
        whole = {"params": self.params, "macs": self.macs, "batch_size": self.batch_size}
        more = {"uncounted": self.uncounted} if self.uncounted else {}
        return json.dumps({"rankfold_stats": 1, **whole, **more, "layers": layers})

    @classmethod
    def from_json(cls, text: str) -> Stats:
        """Read the statistics that `to_json` wrote.

        Raises:
            PlanError: the text is not what `to_json` writes.
        """
        try:
            data = json.loads(text)
            if data["rankfold_stats"] != 1:
                raise PlanError(f"statistics of version {data['rankfold_stats']!r} cannot be read: measure again")
            layers = {name: _read_layer(layer) for name, layer in data["layers"].items()}
            uncounted = tuple(map(str, data.get("uncounted", ())))
            amounts = int(data["params"]), int(data["macs"]), int(data["batch_size"])
            return cls(layers, *amounts, uncounted=uncounted)
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"not the JSON form of measured statistics ({error!r}): measure again") from error


def _row(name: str, layer: LayerStats, time: LayerTime | None) -> dict[str, str]:
    return {
        "layer": name or "(model)",
        "kind": layer.kind,
        "params": f"{layer.params:,}",
        "MACs": f"{layer.macs:,}",
        "calls": str(len(layer.calls)),
        "inputs": "" if layer.moments is None else f"{layer.moments.count:,}",
        "ms": "" if time is None else f"{1e3 * time.dense:.4g}",
    }


def _read_layer(data: Mapping[str, Any]) -> LayerStats:
    calls = tuple(Call(tuple(map(int, shape_in)), tuple(map(int, shape_out))) for shape_in, shape_out in data["calls"])
    return LayerStats(str(data["kind"]), int(data["params"]), int(data["macs"]), calls)
