"""GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, and what each loses is made up for
by the columns that are still to come, as far as the inputs' correlations allow.

With H the second moments of the inputs (damped) and U the upper Cholesky factor of its inverse (U^T U = H^-1), for each
column i in order:  q = round(w_i);  e = (w_i - q) / U_ii;  w_j -= e U_ij for all j > i.
Updates beyond a block of columns are collected and applied together (the paper's lazy batches).

Order of the columns: `groups` takes whole groups by falling mean of H's diagonal, and within a group its columns;
`columns` takes all columns so, with scales that are fixed beforehand from the weights as they were (static groups);
`none` keeps the order. In all three the stored columns stay where they are: no g_idx, and the layout is the plain one.
Scales are searched (search.py) when their group is reached, from the weights as they are then, each column weighted by
1 / U_ii^2: what an error in it costs once the later columns have made up for what they can.

U comes from one Cholesky factorization of H with its rows reversed, in fp64: H = R R^T with R upper, U = R^-1. Where it
fails, the damping is raised tenfold and the report says so. Inputs that are always zero round to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moai_core.errors import NonFiniteError, UsageError
from moai_core.quant.formats import FORMATS, Spec, decode
from moai_core.quantize import search

DAMP = 0.05
ORDERS = ("groups", "columns", "none")
_BLOCK = 128
_MOST_DAMP = 1e6


@dataclass
class Choice:
    """The numbers that a method chose for one matrix: `tensors` as the format stores them, `weight` (O, I) fp32 what
    they stand for, `report` of plain values.
    """

    tensors: dict[str, Tensor]
    weight: Tensor
    report: dict[str, Any] = field(default_factory=dict)


def encoded(spec: Spec, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> Choice:
    """The nearest codes of weight (O, I) under the scales and zeros (O, G)."""
    storage: Any = FORMATS[spec.format]
    parts = (scales,) if zeros is None else (scales, zeros)
    tensors = storage.encode_with(spec, weight, *parts)
    return Choice(tensors, decode(spec, tensors))


def quantize(
    spec: Spec,
    weight: Tensor,
    hessian: Tensor,
    *,
    name: str,
    damp: float = DAMP,
    order: str = "groups",
    steps: int = search.STEPS,
    signed: bool = True,
) -> Choice:
    """weight (O, I), fp32 or fp64, and hessian (I, I) fp64, the inputs' second moments up to a factor.

    damp: share of the mean of H's diagonal that is added to it. steps: ranges that are tried for each scale (1: the
    whole one). Report: damp (what it took), unused (inputs that are always zero). Raises UsageError for a format that
    has no evenly spaced levels, a group that doesn't divide the columns, bad options; CheckpointError for NaN in the
    weight, NonFiniteError for NaN in the hessian.
    """
    search.levels(spec)
    FORMATS[spec.format].check(spec, *weight.shape)
    search.check_weight(name, weight)
    if order not in ORDERS:
        raise UsageError(f"unknown order {order!r}", hint=f"orders: {', '.join(ORDERS)}")
    if not damp > 0:
        raise UsageError(f"damp must be above 0 (got {damp})")
    if not bool(torch.isfinite(hessian).all()):
        raise NonFiniteError(f"{name}: the second moments of its inputs are not finite")
    size = weight.shape[1]
    group = spec.group_size or size
    taken = _order(hessian.diagonal(), group, order)
    U, used = factor(hessian[taken][:, taken], damp)
    U = U.to(weight.dtype)
    # Columns become rows: each step then works on contiguous memory.
    columns = weight.T[taken].contiguous()
    grids = _Grids(spec, columns, taken, U, steps=steps, signed=signed)
    if order == "columns":
        grids.fix(weight, hessian.diagonal())
    for begin, end in _blocks(size, group):
        _block(columns, U, begin, end, grids)
    back = torch.empty_like(taken)
    back[taken] = torch.arange(size, device=taken.device)
    scales, zeros = grids.stored()
    choice = encoded(spec, columns[back].T.contiguous(), scales, zeros)
    choice.report = {"damp": used, "unused": int((hessian.diagonal() == 0).sum())}
    return choice


def factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """(U, damp): upper triangular with U^T U = (H + damp * mean(diagonal) I)^-1, and the damping that it took."""
    size = len(hessian)
    mean = float(hessian.diagonal().mean())
    mean = mean if mean > 0 else 1.0
    reversed_ = hessian.double().flip(0, 1)
    eye = torch.eye(size, dtype=torch.float64, device=hessian.device)
    while damp < _MOST_DAMP:
        lower, failed = torch.linalg.cholesky_ex(reversed_ + damp * mean * eye)
        if not int(failed):
            # The factor of the reversed matrix is lower; reversed again it is the upper R with R R^T = H.
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True), damp
        damp *= 10
    raise NonFiniteError("the second moments of a layer's inputs have no Cholesky factor, whatever the damping")


def _order(diagonal: Tensor, group: int, order: str) -> Tensor:
    """(I,) int64: the columns in the order in which they are rounded."""
    if order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "columns":
        return diagonal.argsort(descending=True, stable=True)
    groups = diagonal.view(-1, group)
    within = groups.argsort(dim=1, descending=True, stable=True)
    within = within + torch.arange(0, len(diagonal), group, device=diagonal.device)[:, None]
    return within[groups.mean(1).argsort(descending=True, stable=True)].flatten()


def _blocks(size: int, group: int) -> list[tuple[int, int]]:
    """Blocks of columns that no group's beginning lies inside of, unless the whole group does."""
    if group <= _BLOCK:
        step = _BLOCK // group * group
        return [(at, min(at + step, size)) for at in range(0, size, step)]
    return [
        (at, min(at + _BLOCK, first + group))
        for first in range(0, size, group)
        for at in range(first, first + group, _BLOCK)
    ]


def _block(columns: Tensor, U: Tensor, begin: int, end: int, grids: _Grids) -> None:
    """Round columns[begin:end] (rows of `columns` (I, O)) in place and pass their errors on to the later ones."""
    errors = torch.empty_like(columns[begin:end])
    diagonal = U.diagonal()[begin:end].tolist()
    for i in range(begin, end):
        rounded = grids.round(i)
        error = errors[i - begin]
        torch.sub(columns[i], rounded, out=error).div_(diagonal[i - begin])
        columns[i] = rounded
        if i + 1 < end:
            columns[i + 1 : end].addr_(U[i, i + 1 : end], error, alpha=-1)
    if end < len(columns):
        columns[end:].addmm_(U[begin:end, end:].T, errors, alpha=-1)


class _Grids:
    """The grid of each group: searched when the group's first column comes up, or beforehand."""

    def __init__(self, spec: Spec, columns: Tensor, taken: Tensor, U: Tensor, **options: Any) -> None:
        self.spec, self.columns, self.options = spec, columns, options
        self.group = spec.group_size or len(columns)
        self.number = (taken // self.group).tolist()
        self.cost = U.diagonal().pow(-2)
        self.found: dict[int, search.Grid] = {}

    def fix(self, weight: Tensor, importance: Tensor) -> None:
        """Search all of them now, from weight (O, I) as it is stored."""
        for number, groups in enumerate(search.split(self.spec, weight).unbind(1)):
            span = importance[number * self.group : (number + 1) * self.group]
            self.found[number] = search.search(self.spec, groups[:, None], _relative(span, weight), **self.options)

    def round(self, i: int) -> Tensor:
        """The nearest values to column i (O,) on its group's grid."""
        number = self.number[i]
        if number not in self.found:
            span = slice(i, i + self.group)
            groups = self.columns[span].T.contiguous()[:, None]
            self.found[number] = search.search(
                self.spec, groups, _relative(self.cost[span], self.columns), **self.options
            )
        return self.found[number].round(self.columns[i][:, None, None]).flatten()

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros (O, G) fp16."""
        grids = [self.found[number] for number in sorted(self.found)]
        scales = torch.cat([grid.scale for grid in grids], 1).half()
        zeros = [grid.zeros for grid in grids if grid.zeros is not None]
        return scales, torch.cat(zeros, 1).half() if zeros else None


def _relative(importance: Tensor, like: Tensor) -> Tensor:
    """With a mean of 1, so that sums stay in the range of `like`'s dtype."""
    return (importance / importance.mean().clamp(min=torch.finfo(importance.dtype).tiny)).to(like.dtype)
