"""Rounding with error feedback: GPTQ, and passes of coordinate descent after it.

All minimize ``tr(E H E^T)`` for the error ``E = Q - W`` of a matrix and the Gram matrix ``H`` of
its inputs, each row by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pyllmlite_plugins.quantizer.grid import Grid

BLOCK = 128  # columns whose updates of the rest are made together (GPTQ, section 3.3, step 2)


def inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of ``(H + damping * mean(diag H) I)^-1`` (GPTQ, section 3.3, step
    3), float64.  Inputs that were never seen stand for themselves.  More damping is taken where
    rounding makes the matrix not positive."""
    import torch

    matrix = gram.double().clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal <= 0] = 1.0
    mean = float(diagonal.mean())
    for _ in range(6):
        damped = matrix.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper
        damping = max(damping * 10, 1e-6)
    raise ArithmeticError("the Gram matrix is not positive, even when damped")


def gptq(
    weight: torch.Tensor,
    gram: torch.Tensor,
    grid: Grid,
    order: torch.Tensor | None = None,
    damping: float = 0.01,
    refit: bool = False,
) -> torch.Tensor:
    """GPTQ (Frantar et al. 2022, algorithm 1): columns are rounded one after another, and the
    error of each is made up for by those that are not rounded yet.

    Args:
        weight: float32 ``[rows, columns]``.
        gram: ``[columns, columns]``.
        grid: Written where ``refit``.
        order: Columns in the order of rounding (``act_order``); None: as they stand.
        refit: The grid of a group is made from the weights as they are when it is reached; only
            without ``order``.
    Returns:
        Codes float32 ``[rows, columns]``, in the columns' own order.
    """
    import torch

    from pyllmlite_plugins.quantizer.grid import extreme_grid

    n = weight.shape[1]
    order = torch.arange(n) if order is None else order
    groups = grid.groups_of(n)[order].tolist()
    factor = inverse_factor(gram[order][:, order], damping).float()
    rest = weight.T[order].contiguous()  # [columns, rows]: a column is one run of memory
    codes = torch.empty_like(rest)
    scales, zeros = grid.scale.T.contiguous(), grid.zero.T.contiguous()
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        block, errors = rest[first:last], torch.empty_like(rest[first:last])
        inner = factor[first:last, first:last]
        pivots = inner.diagonal().tolist()
        for i in range(last - first):
            column, group = block[i], groups[first + i]
            if refit and (first + i) % grid.group_size == 0:
                end = min(first + i + grid.group_size, n)
                if end > last:  # the part behind the block has not had this block's updates
                    ahead = rest[last:end] - factor[first : first + i, last:end].T @ errors[:i]
                    whole = torch.cat([block[i:], ahead])
                else:
                    whole = rest[first + i : end]
                made = extreme_grid(whole.T, grid.bits, grid.group_size, grid.symmetric)
                grid.scale[:, group], grid.zero[:, group] = made.scale[:, 0], made.zero[:, 0]
                zeros[group] = made.zero[:, 0]
                scales[group] = torch.where(made.scale[:, 0] == 0, 1.0, made.scale[:, 0])
            scale, zero = scales[group], zeros[group]
            code = torch.div(column, scale).round_().add_(zero).clamp_(0, grid.top)
            codes[first + i] = code
            error = errors[i]
            torch.sub(code, zero, out=error)
            error.mul_(scale).sub_(column).div_(-pivots[i])
            if i + 1 < last - first:
                block[i + 1 :].addr_(inner[i, i + 1 :], error, alpha=-1)
        if last < n:
            rest[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def descend(
    weight: torch.Tensor,
    gram: torch.Tensor,
    grid: Grid,
    codes: torch.Tensor,
    passes: int = 1,
    damping: float = 0.0,
) -> torch.Tensor:
    """Cyclic coordinate descent (QuantEase, Behdin et al. 2023): each column in turn takes the
    codes that are best while all others stay.  The error never grows.

    Returns:
        Codes ``[rows, columns]``.
    """
    import torch

    n = weight.shape[1]
    matrix = gram.float().clone()
    matrix.diagonal().add_(damping * float(matrix.diagonal().mean()))
    matrix.diagonal()[matrix.diagonal() <= 0] = 1.0
    groups = grid.groups_of(n)
    index = groups.tolist()
    scales = torch.where(grid.scale == 0, torch.ones_like(grid.scale), grid.scale).T.contiguous()
    zeros = grid.zero.T.contiguous()
    codes = codes.T.contiguous()
    target = weight.T.contiguous()
    for _ in range(passes):
        error = (codes - zeros[groups]) * scales[groups] - target
        slope = matrix @ error  # [columns, rows]
        for first in range(0, n, BLOCK):
            last = min(first + BLOCK, n)
            inner = matrix[first:last, first:last]
            local, steps = slope[first:last], torch.empty_like(slope[first:last])
            pivots = inner.diagonal().tolist()
            for i in range(last - first):
                scale = scales[index[first + i]]
                old = codes[first + i]
                new = torch.div(local[i], scale).mul_(-1 / pivots[i]).add_(old)
                new.round_().clamp_(0, grid.top)
                step = steps[i]
                torch.sub(new, old, out=step)
                step.mul_(scale)
                codes[first + i] = new
                if i + 1 < last - first:
                    local[i + 1 :].addr_(inner[i + 1 :, i], step)
            if last < n:
                slope[last:].addmm_(matrix[last:, first:last], steps)
    return codes.T.contiguous()


def refit_scales(
    weight: torch.Tensor, gram: torch.Tensor, grid: Grid, codes: torch.Tensor
) -> Grid:
    """The scales of all groups of a row that together make the least error with these codes: a
    linear system a row.  Zero points stay; a scale that would become much smaller or turn its sign
    stays too."""
    import torch

    from pyllmlite_plugins.quantizer.grid import ROWS, Grid, half

    n = weight.shape[1]
    groups = grid.groups_of(n)
    count = grid.scale.shape[1]
    matrix = gram.float()
    member = torch.nn.functional.one_hot(groups, count).float()  # [columns, groups]
    found = []
    for first in range(0, weight.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        levels = codes[rows] - grid.zero[rows][:, groups]
        right = ((weight[rows] @ matrix) * levels) @ member
        system = torch.empty((levels.shape[0], count, count))
        for g in range(count):
            inside = groups == g
            system[:, g] = ((levels[:, inside] @ matrix[inside]) * levels) @ member
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal += 1e-6 * diagonal.mean(dim=1, keepdim=True) + 1e-20
        old = grid.scale[rows]
        new = torch.linalg.solve(system.double(), right.double()[:, :, None])[:, :, 0].float()
        odd = ~torch.isfinite(new) | (new < 0.5 * old) | (new > 2 * old)
        found.append(torch.where(odd, old, half(new)))
    return Grid(grid.bits, grid.group_size, grid.symmetric, torch.cat(found), grid.zero)


def output_error(weight: torch.Tensor, gram: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``tr(E H E^T)`` row by row, float32 ``[rows]``."""
    error = values - weight
    return ((error @ gram) * error).sum(dim=1)
