"""The amounts of a plan, counted again: what its choices take on a model, whatever the plan says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from rankfold.layers import Call
from rankfold.planning._amounts import Amounts
from rankfold.planning._blocks import SolvedBlock, block_choice, fresh_block, is_block
from rankfold.planning._choice import Choice
from rankfold.planning._fits import Fit, fits
from rankfold.planning._layer import Job, amounts_of, untouched
from rankfold.planning._metrics import check_stats
from rankfold.planning._ties import FOLLOWS, as_one, tied_heads
from rankfold.stats import Stats, walk


def recounted(model: nn.Module, choices: Mapping[str, Choice], stats: Stats | None) -> dict[str, Choice]:
    """Return the choices with their amounts on a model; what can't be counted is as the choices say.

    Raises:
        PlanError: a layer that the model doesn't have or that can't be replaced, a choice that doesn't fit its layer,
            or statistics of another model.
    """
    layers, ties = dict(walk(model)), tied_heads(model)
    check_stats(layers, stats)
    fitted = fits(model, choices, "random")
    whole = {name: untouched(name, layer, stats) for name, layer in layers.items()}
    for pair in ties.items():
        if _as_one(choices, *pair):
            whole |= as_one(whole, pair)
    counted = {}
    for name, choice in choices.items():
        if is_block(choice):
            counted[name] = _block(model, name, choice, stats)
            continue
        before = replace(whole[name].dense, latency=None).or_else(choice.dense)  # seconds of what was timed, and how
        amounts = before
        if choice.method != "dense":
            head_calls = stats.layers[ties[name]].calls if stats and name in ties else ()
            amounts = _amounts(name, fitted[name], replace(choice, dense=before), stats, head_calls)
        counted[name] = replace(choice, amounts=amounts.or_else(choice.amounts), dense=before)
    return counted


def _as_one(choices: Mapping[str, Choice], embedding: str, head: str) -> bool:
    """Tell whether the choice of an embedding counts the work of its head too."""
    if embedding not in choices:
        return False
    follows = head in choices and choices[head].reason.startswith(FOLLOWS)
    return follows or choices[embedding].method != "dense"


def _amounts(name: str, fit: Fit, choice: Choice, stats: Stats | None, head_calls: tuple[Call, ...]) -> Amounts:
    twin, cls = fit
    calls = stats.layers[name].calls if stats else None
    job = Job(name, twin, choice, calls, stats.batch_size if stats else 1, head_calls=head_calls)
    return amounts_of(job, cls, choice.rank or 1, dict(choice.options))


def _block(model: nn.Module, name: str, choice: Choice, stats: Stats | None) -> Choice:
    found = block_choice(model, name, SolvedBlock(fresh_block(model, name, choice), choice.error or 0.0), stats)
    amounts, dense = found.amounts.or_else(choice.amounts), found.dense.or_else(choice.dense)
    return replace(choice, amounts=amounts, dense=dense)
