"""The images of a call, and how large they may be."""

from __future__ import annotations

import math

from fastmeta.kernels._common import MAX_PIXELS, MAX_PROGRAMS


def out_size(size, window, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int):
    """Height and width of a convolution's output."""
    return (
        (size[0] + 2 * pad_h - dilation_h * (window[0] - 1) - 1) // stride_h + 1,
        (size[1] + 2 * pad_w - dilation_w * (window[1] - 1) - 1) // stride_w + 1,
    )


def why_not(op_name: str, tensors, args) -> str | None:
    """Why the kernels cannot serve images of such a size; None if they can."""
    images = [t.shape[1:] for t in tensors if t.dim() == 5]  # [B, H, W, C]
    groups = 1
    if op_name == "task_conv2d":
        *geometry, groups = args[3:]
        rows, *size, _ = images[0]
        images[1] = (rows, *out_size(size, images[1][2:], *geometry), images[1][0])
    elif op_name == "task_conv2d_bwd_data":
        groups = args[-1]
        images[1] = (images[0][0], *args[2:4], images[1][1] * groups)
    elif op_name == "task_conv2d_bwd_weight":
        groups = args[-1]
    tasks = max(t.shape[0] for t in tensors)
    pixels = tasks * max(math.prod(image[:3]) for image in images)
    if pixels > MAX_PIXELS:
        return f"{pixels} pixels of all tasks > {MAX_PIXELS}"
    # no grid is larger: a tile has sides of 8 at least, or covers an image's pixels, or a group's channels
    programs = max((pixels // 8 + tasks * image[0]) * (image[3] // 8 + groups) for image in images)
    return f"{programs} programs > {MAX_PROGRAMS} of a grid" if programs > MAX_PROGRAMS else None
