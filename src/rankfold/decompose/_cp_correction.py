"""Error-preserving correction of CP: the smallest terms that reach a given error."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from rankfold.decompose._cp_als import Grams, Split, Terms, products, solve_to_fit, squared_residual
from rankfold.decompose._unfold import relative

HEALTHY = 10.0  # degeneracy that needs no correction
SLACK = 1.005  # how much of the error a correction may add
FLOOR = 1e-6  # relative error below which a correction cannot resolve the constraint
CORRECTION_SWEEPS = 200
STALL = 1e-4


def degeneracy(terms: Terms, total: float) -> float:
    """Return `sum_r ||term_r||^2 / ||X||^2`."""
    return float(terms.weights.double().square().sum()) / total if total > 0 else 0.0


def sensitivity(terms: Terms) -> float:
    """Return `sum_n dim_n sum_r prod_{k != n} ||u_k,r||^2` for weights spread evenly over the factors."""
    order = len(terms.rows)
    spread = float(terms.weights.double().pow(2 * (order - 1) / order).sum())
    return sum(rows.shape[1] for rows in terms.rows) * spread


def corrected(split: Split, terms: Terms) -> Terms:
    """Return terms of degeneracy above `HEALTHY` with a lower one, at `SLACK` times their error; others as they are.

    Computes in float64. An exact decomposition has no room to trade and stays as it is, as does one without a ceiling.
    """
    if degeneracy(terms, split.total) <= HEALTHY or split.ceiling == math.inf:
        return terms
    precise = replace(split, matrix=split.matrix.double())
    error = relative(squared_residual(precise, terms.to(torch.float64)), split.total)
    if error < FLOOR:
        return terms
    return correct(precise, terms.to(torch.float64), SLACK * error).to(terms.weights.dtype)


def correct(split: Split, terms: Terms, allowed: float) -> Terms:
    """Minimise `sum_r ||term_r||^2` subject to a relative error of at most `allowed`, by alternating modes.

    With the other modes normalised, a mode's minimiser is the ridge solution `(gram + mu I)^-1 product` whose residual
    meets the bound (Phan et al. 2020, section 3.2). Stops at a healthy degeneracy, or when it stalls.
    """
    terms = Terms(terms.weights, list(terms.rows))
    fitted = split.kept - allowed**2 * split.total
    before = degeneracy(terms, split.total)
    for _ in range(CORRECTION_SWEEPS):
        grams = Grams(terms.rows)
        for mode, product in products(split, terms.rows):
            terms.set_mode(mode, solve_to_fit(grams.without(mode), product, fitted))
            grams.update(mode, terms.rows[mode])
        now = degeneracy(terms, split.total)
        if now <= HEALTHY or abs(before - now) <= STALL * before:
            break
        before = now
    return terms
