"""The ops of convolutional inner loops: CUDA kernels and bridges on the CPU's emulation, against plain torch in float64.

Every size where a kernel takes another path has a sample just above it; a grid has at most 3 x 2 x 2 blocks here, so
that the fourth tile of the first dimension, the third of the others, is a block's second:

task_conv2d         64 pixels by 64 outputs a block, 16 terms (channels of taps) at once (216 pixels, 129 outputs, 17
                    channels); tasks and groups are one dimension (3 of each); 128 columns of packed weights a block
  bwd_data          likewise, the pixels of one remainder by the strides for themselves (6 of them, and some that no tap
                    sees)
  bwd_weight        64 outputs by 64 taps and channels a block (129, 153), 16 pixels at once; pieces of 256 pixels or
                    more (832: four)
Not reached: more than 64 pieces, 65535 blocks in a dimension.
"""

import pytest
import torch
from test_kernels_on_host import DTYPES, agree, both_orders, exact, name, ops, poisoned, rand  # noqa: F401
from torch.nn import functional as F

PLAIN, SAME = (1, 1, 0, 0, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1)
# tasks, rows, height, width, channels, outputs, kernel, (strides, paddings, dilations, groups), what the tasks share
CONVOLUTIONS = {
    "216-pixels": (2, 3, 9, 8, 3, 5, (3, 3), SAME, ""),
    "129-outputs": (3, 1, 4, 5, 17, 129, (3, 3), SAME, "w"),
    "129-channels": (1, 2, 3, 3, 129, 3, (1, 1), PLAIN, ""),
    "832-pixels-to-sum": (1, 13, 10, 10, 2, 3, (3, 3), PLAIN, ""),
    "one-channel": (2, 2, 7, 6, 1, 66, (3, 3), SAME, "b"),
    "strides": (2, 3, 11, 8, 3, 4, (4, 3), (3, 2, 2, 1, 2, 1, 1), "x"),
    "strides-over-pixels": (2, 1, 6, 5, 2, 3, (1, 1), (2, 3, 0, 0, 1, 1, 1), "wb"),
    "dilated-by-the-stride": (1, 2, 9, 9, 2, 2, (2, 3), (2, 2, 1, 2, 2, 4, 1), ""),
    "3-groups": (1, 2, 5, 4, 6, 9, (2, 3), (1, 1, 0, 1, 1, 1, 3), ""),
    "depthwise": (2, 1, 5, 5, 5, 5, (3, 3), (1, 1, 1, 1, 1, 1, 5), "xw"),
    "no-bias": (2, 1, 3, 3, 2, 2, (3, 3), SAME, "none"),
    "no-tasks": (0, 2, 4, 4, 3, 2, (3, 3), SAME, "wb"),
    "no-rows": (2, 0, 4, 4, 3, 2, (3, 3), SAME, ""),
    "no-outputs": (2, 1, 4, 4, 3, 0, (3, 3), SAME, ""),
}


def convolution(x, weight, bias, geometry, tasks):
    """Channels last, one task at a time."""
    strides, paddings, dilations, groups = geometry[:2], geometry[2:4], geometry[4:6], geometry[6]
    x, weight, bias = (t if t is None or len(t) == tasks else t.expand(tasks, *t.shape[1:]) for t in (x, weight, bias))
    one = [
        F.conv2d(x[t].movedim(-1, 1), weight[t], None if bias is None else bias[t], strides, paddings, dilations, groups)
        for t in range(tasks)
    ]
    return torch.stack(one).movedim(2, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_task_conv2d(ops, case, dtype):  # noqa: F811
    tasks, rows, high, wide, channels, outputs, kernel, geometry, shared = CONVOLUTIONS[case]
    x = rand(1 if "x" in shared else tasks, rows, high, wide, channels, dtype=dtype)
    weight = rand(1 if "w" in shared else tasks, outputs, channels // geometry[6], *kernel, dtype=dtype)
    bias = None if shared == "none" else rand(1 if "b" in shared else tasks, outputs, dtype=dtype)
    found = both_orders(lambda: ops.task_conv2d(x, weight, [] if bias is None else [bias], *geometry))
    grad = rand(*found.shape, dtype=dtype)
    d_x = both_orders(lambda: ops.task_conv2d_bwd_data(grad, weight, high, wide, *geometry))
    d_weight = both_orders(lambda: ops.task_conv2d_bwd_weight(grad, x, *kernel, *geometry))
    if found.numel() == 0:
        assert found.shape[0] == tasks and found.shape[2:] == (high, wide, outputs)
        assert d_x.shape == (tasks, *x.shape[1:]) and d_weight.shape == (tasks, *weight.shape[1:])
        assert not d_x.any() and not d_weight.any()
        return
    # the gradients are each task's, also of what they share
    each_x, each_weight = (exact(t.expand(tasks, *t.shape[1:])) for t in (x, weight))
    expected = convolution(each_x, each_weight, None if bias is None else bias.double(), geometry, tasks)
    agree(found, expected, dtype)
    for ours, truth in zip(
        (d_x, d_weight), torch.autograd.grad(expected, (each_x, each_weight), grad.double()), strict=True
    ):
        agree(ours, truth, dtype)


def test_convolutions_say_what_does_not_fit(ops):  # noqa: F811
    x, weight, bias = rand(2, 3, 5, 5, 4), rand(2, 6, 4, 3, 3), rand(2, 6)
    for arguments, message in (
        ((x, weight[:, :, :3].contiguous(), [bias], *SAME), "weights of 3 channels, images of 4"),
        ((x, weight, [bias[:, :5].contiguous()], *SAME), "bias is not of 6 channels"),
        ((x, torch.cat([weight, weight]), [bias], *SAME), "tensors of 2 and of 4 tasks"),
        ((x, weight, [bias], 1, 1, 1, 1, 1, 1, 3), "4 and 6 channels in 3 groups"),
        ((x, weight, [bias], 1, 1, 0, 0, 3, 1, 1), "larger than the padded images"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.task_conv2d(*arguments)
    with pytest.raises(RuntimeError, match="not of the output's shape"):
        ops.task_conv2d_bwd_data(rand(2, 3, 4, 5, 6), weight, 5, 5, *SAME)
    with pytest.raises(RuntimeError, match="not of the output's shape"):
        ops.task_conv2d_bwd_weight(rand(2, 3, 5, 5, 6), x, 3, 3, *PLAIN)
