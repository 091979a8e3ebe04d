"""Codes and scales once more, when all of a matrix's columns have been rounded.

GPTQ decides about a column before it knows how later ones are rounded, AWQ about each by itself. A sweep of coordinate
descent revisits each, with all others as they are now: the best value of column j is q_j - g_j / H_jj, g = H (q - w),
rounded to its grid. In between the scales of a row are fitted to its codes: the least-squares solution of a system with
one unknown a group. Neither can raise the error of the output, (q - w)^T H (q - w), with H damped as for GPTQ, so that
what the calibration text leaves open stays near the weights. Costs about as much as GPTQ again, and changes nothing of
what is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moai_core.quant.formats import Spec
from moai_core.quantize import gptq, search
from moai_core.quantize.runner import exact_products

SWEEPS = 2
_BLOCK = 128
_ROWS = 2048


def refine(
    spec: Spec, weight: Tensor, hessian: Tensor, choice: gptq.Choice, *, damp: float = gptq.DAMP, sweeps: int = SWEEPS
) -> gptq.Choice:
    """A better choice for weight (O, I) under the inputs' second moments hessian (I, I), starting from `choice`.

    sweeps of coordinate descent, with a fit of the scales between two; 0 gives back `choice`.
    """
    mean = float(hessian.diagonal().mean())
    if sweeps < 1 or not mean > 0:
        return choice
    # Relative to their mean, moments stay in the range of fp32.
    H = hessian / mean
    H.diagonal().add_(damp)
    H = H.to(weight.dtype)
    scales, zeros = choice.tensors["scales"], choice.tensors.get("zeros")
    columns = choice.weight.to(weight.dtype).T.contiguous()
    with exact_products():
        for number in range(sweeps):
            if number:
                scales, columns = _fit(spec, weight, H, columns, scales)
            _sweep(spec, weight, H, columns, scales, zeros)
    made = gptq.encoded(spec, columns.T.contiguous(), scales, zeros)
    made.report = choice.report
    return made


def _sweep(spec: Spec, weight: Tensor, H: Tensor, columns: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
    """One pass of coordinate descent over `columns` (I, O), the transposed rounded weight, in place."""
    size = len(columns)
    group = spec.group_size or size
    steps = scales.to(weight.dtype).T.contiguous()
    low, high = search.levels(spec)
    zero = None if zeros is None else zeros.to(weight.dtype).T.contiguous()
    slope = H @ (columns - weight.T)
    diagonal = H.diagonal().tolist()
    for begin in range(0, size, _BLOCK):
        end = min(begin + _BLOCK, size)
        before, local = columns[begin:end].clone(), slope[begin:end].clone()
        for j in range(begin, end):
            step = steps[j // group]
            best = (columns[j] - local[j - begin] / diagonal[j]).div_(step).round_()
            if zero is None:
                best.clamp_(low, high)
            else:
                best.clamp_(low - zero[j // group], high - zero[j // group])
            best.mul_(step)
            local.addr_(H[begin:end, j], best - columns[j])
            columns[j] = best
        slope.addmm_(H[:, begin:end], columns[begin:end] - before)


def _fit(spec: Spec, weight: Tensor, H: Tensor, columns: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (O, G) fp16 that fit the codes best, row by row, and the columns (I, O) that they give."""
    group = spec.group_size or len(columns)
    old = scales.to(weight.dtype)
    codes = (columns.T.unflatten(1, (-1, group)) / old[..., None]).round()
    parts = zip(codes.split(_ROWS), weight.split(_ROWS), scales.split(_ROWS), strict=True)
    new = torch.cat([_fitted(c, w, H, s) for c, w, s in parts])
    return new, (codes * new.to(weight.dtype)[..., None]).flatten(1).T.contiguous()


def _fitted(codes: Tensor, weight: Tensor, H: Tensor, scales: Tensor) -> Tensor:
    """codes (O, G, g), weight (O, I), scales (O, G) -> better scales of the same shape, fp16."""
    groups, size = codes.shape[1:]
    # Of sum_g s_g c_g against w under H: A_gh = c_g H c_h, b_g = c_g H w.
    b = ((weight @ H).view_as(codes) * codes).sum(-1).double()
    A = torch.stack(
        [((codes[:, g] @ H[g * size : (g + 1) * size]).view_as(codes) * codes).sum(-1).double() for g in range(groups)],
        dim=1,
    )
    unused = A.diagonal(dim1=1, dim2=2) <= 0
    A = A + torch.diag_embed(torch.where(unused, 1.0, 1e-9 * A.diagonal(dim1=1, dim2=2)))
    new = torch.linalg.solve(A, torch.where(unused, scales.double(), b)).half()

    def loss(s: Tensor) -> Tensor:
        s = s.double()
        return ((A @ s[..., None]).squeeze(-1) * s).sum(-1) - 2 * (b * s).sum(-1)

    better = (loss(new) < loss(scales)) & torch.isfinite(new).all(-1) & (new != 0).all(-1)
    return torch.where(better[:, None], new, scales)
