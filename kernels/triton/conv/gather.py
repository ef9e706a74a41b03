"""Where a convolution reads: the pixel that a tap of the window meets, for a tile of pixels and taps.

A convolution is a matrix product, "implicit" since the left matrix, a row for each pixel that comes out and a column
for each tap and channel, is never formed: its entries are read where they lie. Pixels are counted within a task, in 32
bits, which `why_not` sees to.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Sizes(NamedTuple):
    """Of a task: the images that a kernel goes through pixel by pixel, those that it reads for each, and the window.

    Channels are those of a group: `outputs` of the images gone through, `inputs` of those read.
    """

    pixels: int
    height: int
    width: int
    outputs: int
    source_height: int
    source_width: int
    inputs: int
    columns: int  # taps * inputs
    groups: int
    taps: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int


@triton.jit
def taps_and_channels(start, inputs, BLOCK: tl.constexpr, ONE_TAP: tl.constexpr):
    """Of the columns from `start` on, tap by tap. ONE_TAP: the blocks of columns do not go beyond one, which leaves
    channels that lie side by side."""
    column = start + tl.arange(0, BLOCK)
    if ONE_TAP:
        return tl.zeros([BLOCK], tl.int32) + start // inputs, start % inputs + tl.arange(0, BLOCK)
    else:
        return column // inputs, column % inputs


@triton.jit
def gathered(pixel, tap, sizes, BACK: tl.constexpr):
    """The pixel that is read for each of `pixel` `[P]` and `tap` `[K]`, and whether there is one. BACK: from a pixel of
    the input to the one of the output whose window has it at that tap."""
    row = pixel // (sizes.height * sizes.width)
    h, w = pixel // sizes.width % sizes.height, pixel % sizes.width
    i, j = tap // sizes.kernel_w * sizes.dilation_h, tap % sizes.kernel_w * sizes.dilation_w
    if BACK:
        y, x = (h + sizes.pad_h)[:, None] - i[None, :], (w + sizes.pad_w)[:, None] - j[None, :]
        inside = (y >= 0) & (x >= 0) & (y % sizes.stride_h == 0) & (x % sizes.stride_w == 0)
        y, x = y // sizes.stride_h, x // sizes.stride_w
    else:
        y = (h * sizes.stride_h - sizes.pad_h)[:, None] + i[None, :]
        x = (w * sizes.stride_w - sizes.pad_w)[:, None] + j[None, :]
        inside = (y >= 0) & (x >= 0)
    inside = inside & (y < sizes.source_height) & (x < sizes.source_width) & (pixel < sizes.pixels)[:, None]
    return ((row * sizes.source_height)[:, None] + y) * sizes.source_width + x, inside
