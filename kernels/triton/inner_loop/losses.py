"""Losses of rows with their first two derivatives: the logits `[rows, C]` of one task, by one program."""

from __future__ import annotations

import triton
import triton.language as tl

# numbers of LOSS
LOSSES = ("cross_entropy", "mse", "binary_cross_entropy", "huber")


@triton.jit
def _partition(logits, r, rows, C, HOW: tl.constexpr):
    """Of each row of logits the largest, and the sum of all `exp(logit - largest)`."""
    most = tl.full([HOW.BLOCK_R], float("-inf"), HOW.ACC)
    for start in range(0, C, HOW.BLOCK_W):
        c = start + tl.arange(0, HOW.BLOCK_W)
        at = r[:, None] * C + c[None, :]
        z = tl.load(logits + at, mask=(r < rows)[:, None] & (c < C)[None, :], other=float("-inf"))
        most = tl.maximum(most, tl.max(z, 1))
    most = tl.where(r < rows, most, 0)
    total = tl.full([HOW.BLOCK_R], 0, HOW.ACC)
    for start in range(0, C, HOW.BLOCK_W):
        c = start + tl.arange(0, HOW.BLOCK_W)
        at = r[:, None] * C + c[None, :]
        z = tl.load(logits + at, mask=(r < rows)[:, None] & (c < C)[None, :], other=float("-inf"))
        total += tl.sum(tl.exp(z - most[:, None]), 1)
    return most, tl.where(r < rows, total, 1)


@triton.jit
def _log_of_one_more(x):
    """log(1 + x) for x of 0 to 1, where log loses the digits of a small x."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * x / tl.where(u == 1, 1, u - 1))


@triton.jit
def _of_output(z, y, delta, LOSS: tl.constexpr):
    """Loss of one output `z` with target `y`, and its two derivatives."""
    difference = z - y
    if LOSS == 1:
        return difference * difference, 2 * difference, tl.full(z.shape, 2, z.dtype)
    elif LOSS == 2:
        e = tl.exp(-tl.abs(z))
        larger = 1 / (1 + e)
        p = tl.where(z > 0, larger, e * larger)
        return tl.where(z > 0, z, 0.0) + _log_of_one_more(e) - y * z, p - y, e * larger * larger
    else:
        size = tl.abs(difference)
        near = size <= delta
        value = tl.where(near, 0.5 * difference * difference, delta * (size - 0.5 * delta))
        slope = tl.where(difference < -delta, -delta, tl.where(difference > delta, delta, difference))
        return value, slope, tl.where(near, tl.full(z.shape, 1, z.dtype), 0.0)


@triton.jit
def task_loss(logits, targets, HOW: tl.constexpr):
    """The weighted sum of the rows' losses."""
    rows, C = targets.rows, targets.outputs
    total = tl.full([HOW.BLOCK_R], 0, HOW.ACC)
    for first in range(0, rows, HOW.BLOCK_R):
        r = first + tl.arange(0, HOW.BLOCK_R)
        v = tl.load(targets.weight + r, mask=r < rows, other=0)
        if HOW.LOSS == 0:
            most, parts = _partition(logits, r, rows, C, HOW)
            label = tl.load(targets.target + r, mask=r < rows, other=0)
            own = tl.load(logits + r * C + label, mask=r < rows, other=0)
            total += v * ((most - own) + tl.log(parts))  # large logits cancel exactly
        else:
            for start in range(0, C, HOW.BLOCK_W):
                c = start + tl.arange(0, HOW.BLOCK_W)
                at, mask = r[:, None] * C + c[None, :], (r < rows)[:, None] & (c < C)[None, :]
                z, y = tl.load(logits + at, mask=mask, other=0), tl.load(targets.target + at, mask=mask, other=0)
                value = _of_output(z, y, targets.bends_at, HOW.LOSS)[0]
                total += v / C * tl.sum(tl.where(mask, value, 0.0), 1)
    return tl.sum(total, 0)


@triton.jit
def loss_gradient(logits, to, targets, scale, extra, HAS_EXTRA: tl.constexpr, HOW: tl.constexpr):
    """to `[rows, C]` = the gradient of `scale` times the task's loss, plus `extra` where there is such."""
    rows, C = targets.rows, targets.outputs
    for first in range(0, rows, HOW.BLOCK_R):
        r = first + tl.arange(0, HOW.BLOCK_R)
        v = tl.load(targets.weight + r, mask=r < rows, other=0) * scale
        if HOW.LOSS == 0:
            most, parts = _partition(logits, r, rows, C, HOW)
            label = tl.load(targets.target + r, mask=r < rows, other=0)
        else:
            v /= C
        for start in range(0, C, HOW.BLOCK_W):
            c = start + tl.arange(0, HOW.BLOCK_W)
            at, mask = r[:, None] * C + c[None, :], (r < rows)[:, None] & (c < C)[None, :]
            z = tl.load(logits + at, mask=mask, other=0)
            if HOW.LOSS == 0:
                p = tl.exp(z - most[:, None]) / parts[:, None]
                slope = tl.where(c[None, :] == label[:, None], p - 1, p)
            else:
                y = tl.load(targets.target + at, mask=mask, other=0)
                slope = _of_output(z, y, targets.bends_at, HOW.LOSS)[1]
            slope *= v[:, None]
            if HAS_EXTRA:
                slope += tl.load(extra + at, mask=mask, other=0)
            tl.store(to + at, slope, mask=mask)


@triton.jit
def times_curvature(logits, dot, targets, HOW: tl.constexpr):
    """dot `[rows, C]`, tangents of the logits, to those of the loss's gradient."""
    rows, C = targets.rows, targets.outputs
    for first in range(0, rows, HOW.BLOCK_R):
        r = first + tl.arange(0, HOW.BLOCK_R)
        v = tl.load(targets.weight + r, mask=r < rows, other=0)
        if HOW.LOSS == 0:
            most, parts = _partition(logits, r, rows, C, HOW)
            mean = tl.full([HOW.BLOCK_R], 0, HOW.ACC)
            for start in range(0, C, HOW.BLOCK_W):
                c = start + tl.arange(0, HOW.BLOCK_W)
                at, mask = r[:, None] * C + c[None, :], (r < rows)[:, None] & (c < C)[None, :]
                z = tl.load(logits + at, mask=mask, other=float("-inf"))
                p = tl.exp(z - most[:, None]) / parts[:, None]
                mean += tl.sum(p * tl.load(dot + at, mask=mask, other=0), 1)
        else:
            v /= C
        for start in range(0, C, HOW.BLOCK_W):
            c = start + tl.arange(0, HOW.BLOCK_W)
            at, mask = r[:, None] * C + c[None, :], (r < rows)[:, None] & (c < C)[None, :]
            z, d = tl.load(logits + at, mask=mask, other=0), tl.load(dot + at, mask=mask, other=0)
            if HOW.LOSS == 0:
                p = tl.exp(z - most[:, None]) / parts[:, None]
                d = (d - mean[:, None]) * p
            else:
                y = tl.load(targets.target + at, mask=mask, other=0)
                d *= _of_output(z, y, targets.bends_at, HOW.LOSS)[2]
            tl.store(dot + at, d * v[:, None], mask=mask)
