"""The ops of convolutional inner loops: CUDA kernels and bridges on the CPU's emulation, against plain torch in
float64.

Every size where a kernel takes another path has a sample just above it; a grid has at most 3 x 2 x 2 blocks here, so
that the fourth tile of the first dimension, the third of the others, is a block's second:

task_conv2d         64 pixels by 64 outputs a block, 16 terms (channels of taps) at once (216 pixels, 129 outputs, 17
                    channels); tasks and groups are one dimension (3 of each); 128 columns of packed weights a block
  bwd_data          likewise, the pixels of one remainder by the strides for themselves (6 of them, and some that no tap
                    sees)
  bwd_weight        64 outputs by 64 taps and channels a block (129, 153), 16 pixels at once; pieces of 256 pixels or
                    more (832: four)
norm_moments        32 channels of a piece of 64 pixels a block, more from 16385 pixels on, 64 pixels at once; then 32
                    groups a block, 8 pieces or channels at once (3 pieces, 257 channels, groups of 13)
norm_act_pool       32 channels of a piece of 64 windows a block, 8 windows at once (140 windows)
  gradients         likewise; pieces, and the units of a shared parameter, 8 at once (10 units); means of 128 groups a
                    block (257)
Not reached: more than 64 pieces of a weight's gradient, 65535 blocks in a dimension.
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
    options = geometry[:2], geometry[2:4], geometry[4:6], geometry[6]
    x, weight, bias = (t if t is None or len(t) == tasks else t.expand(tasks, *t.shape[1:]) for t in (x, weight, bias))
    one = [
        F.conv2d(x[t].movedim(-1, 1), weight[t], None if bias is None else bias[t], *options)
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


NORMS, POOLS = ("none", "batch", "group", "given"), ("none", "max", "average")
ACTIVATIONS = {"identity": 0, "relu": 1, "silu": 4, "gelu": 5}
# tasks, rows, height, width, channels, norm, groups, activation, slope, pool, which of weight and bias there are (in
# capitals: the tasks share it, and "M" the moments)
BLOCKS = {
    "140-windows": (2, 4, 13, 9, 3, "batch", 1, "relu", 0.0, "max", "wb"),
    "4-tasks": (4, 2, 3, 3, 2, "batch", 1, "silu", 0.0, "none", "WB"),
    "257-channels": (1, 2, 3, 2, 257, "batch", 1, "gelu", 0.0, "average", "wB"),
    "16385-pixels": (1, 1, 1, 16385, 1, "batch", 1, "silu", 0.0, "none", "w"),
    "groups-of-13": (1, 2, 5, 4, 39, "group", 3, "relu", 0.1, "max", "wb"),
    "10-units": (2, 5, 2, 3, 5, "group", 1, "gelu", 0.0, "none", "WB"),
    "66-instances": (2, 2, 3, 3, 66, "group", 66, "identity", 0.0, "average", ""),
    "given": (3, 2, 3, 4, 6, "given", 1, "gelu", 0.0, "max", "wb"),
    "given-to-all-by-rows": (2, 2, 3, 4, 6, "given", 2, "silu", 0.0, "none", "WbM"),
    "no-norm": (2, 3, 4, 5, 3, "none", 1, "silu", 0.0, "max", "wb"),
    "leaky": (2, 2, 4, 4, 3, "none", 1, "relu", 0.3, "average", ""),
    "all-dropped": (2, 2, 1, 1, 3, "batch", 1, "relu", 0.0, "max", "wb"),
    "no-tasks": (0, 2, 4, 4, 3, "batch", 1, "gelu", 0.0, "max", "WB"),
    "no-rows-of-groups": (2, 0, 4, 4, 4, "group", 2, "gelu", 0.0, "max", "WB"),
}


def moments(x, norm, groups):
    over = (1, 2, 3) if norm == "batch" else (2, 3, 5)
    x = x[..., None] if norm == "batch" else x.unflatten(4, (groups, x.shape[4] // groups))
    mean = x.mean(over, keepdim=True)
    return [m[:, :, 0, 0, :, 0] for m in (mean, (x - mean).square().mean(over, keepdim=True))]


def block(x, weight, bias, given, norm, groups, activation, slope, pool):
    """Norm, activation and pool in plain torch."""
    shape, channels = x.shape, x.shape[4]
    if norm != "none":
        mean, var = (
            m.repeat_interleave(channels // m.shape[2], 2)[:, :, None, None] for m in given or moments(x, norm, groups)
        )
        x = (x - mean) / (var + 1e-5).sqrt()
    for parameter, add in ((weight, False), (bias, True)):
        for p in parameter:
            x = x + p[:, None, None, None] if add else x * p[:, None, None, None]
    if activation != "identity":
        x = F.leaky_relu(x, slope) if slope else getattr(F, activation)(x)
    if pool == "none" or 0 in shape:
        size = 1 if pool == "none" else 2
        return x[:, :, : shape[2] // size, : shape[3] // size]
    if min(shape[2:4]) == 1:
        return x[:, :, :0, :0]
    pooled = (F.max_pool2d if pool == "max" else F.avg_pool2d)(x.flatten(0, 1).movedim(3, 1), 2)
    return pooled.movedim(1, 3).unflatten(0, shape[:2])


def problem(case, dtype):
    """x, weight, bias, moments and the options, as the ops take them; and the block of the first three in float64."""
    tasks, rows, high, wide, channels, norm, groups, activation, slope, pool, parameters = BLOCKS[case]
    x = rand(tasks, rows, high, wide, channels, dtype=dtype) + 1
    weight, bias = (
        [rand(1 if kind.upper() in parameters else tasks, channels, dtype=dtype)] if kind in parameters.lower() else []
        for kind in "wb"
    )
    given = []
    if norm == "given":
        size = (1, rows, groups) if "M" in parameters else (tasks, 1, channels)
        given = [rand(*size, dtype=dtype), rand(*size, dtype=dtype).square() + 0.5]
    elif norm != "none":
        given = [m.to(dtype) for m in moments(x.double(), norm, groups)]
    options = (NORMS.index(norm), groups, 1e-5, ACTIVATIONS[activation], slope, POOLS.index(pool))

    def plain(x, weight, bias):
        fixed = [m.double() for m in given] if norm == "given" else None
        return block(x, weight, bias, fixed, norm, groups, activation, slope, pool)

    return x, weight, bias, given, options, plain


def flat(values):
    return [t for v in values for t in (v if isinstance(v, (list, tuple)) else [v])]


def check_block(ops, problem, dtype, needs=7, second_needs=15):  # noqa: F811
    """The op and both its gradients, and that those not asked for are empty."""
    x, weight, bias, given, options, plain = problem
    inputs = exact(x), [exact(t) for t in weight], [exact(t) for t in bias]
    expected = plain(*inputs)
    found = both_orders(lambda: ops.norm_act_pool(x, weight, bias, given, *options))
    agree(found, expected, dtype)
    grad = rand(*found.shape, dtype=dtype)
    at = exact(grad)
    firsts = torch.autograd.grad(expected, flat(inputs), at, create_graph=True)
    bits = [1, *[2] * len(weight), *[4] * len(bias)]
    ours = both_orders(lambda: ops.norm_act_pool_bwd(grad, x, weight, bias, given, *options, needs))
    for one, truth, bit in zip(flat(ours), firsts, bits, strict=True):
        agree(one, truth if needs & bit else torch.empty(0, dtype=torch.float64), dtype)
    outer = [rand(*t.shape, dtype=dtype) for t in flat(ours)]
    total = sum((t * v.double()).sum() for t, v, bit in zip(firsts, outer, bits, strict=True) if needs & bit)
    seconds = torch.autograd.grad(total, (at, *flat(inputs)), allow_unused=True, materialize_grads=True)
    lists = outer[1 : 1 + len(weight)], outer[1 + len(weight) :]
    ours = both_orders(
        lambda: ops.norm_act_pool_bwd_bwd(
            outer[0], *lists, grad, x, weight, bias, given, *options, needs, second_needs
        )
    )
    for one, truth, bit in zip(flat(ours), seconds, [1, *[2 * bit for bit in bits]], strict=True):
        agree(one, truth if second_needs & bit else torch.empty(0, dtype=torch.float64), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", BLOCKS)
def test_norm_act_pool(ops, case, dtype):  # noqa: F811
    check_block(ops, problem(case, dtype), dtype)


@pytest.mark.parametrize("needs, second_needs", [(1, 3), (2, 14), (4, 1), (6, 8), (5, 6), (3, 9)])
@pytest.mark.parametrize("case", ["10-units", "no-norm"])
def test_norm_act_pool_of_what_is_needed(ops, case, needs, second_needs):  # noqa: F811
    check_block(ops, problem(case, torch.float64), torch.float64, needs, second_needs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation, slope", [*((a, 0.0) for a in ACTIVATIONS), ("relu", 0.2)])
def test_pool_takes_the_first_of_equals_and_nan_before_all(ops, activation, slope, value):  # noqa: F811
    x = torch.randint(-1, 3, (2, 3, 4, 6, 5)).double()
    x[1, 1, 2:4, 3, 4] = value
    options = (NORMS.index("none"), 1, 1e-5, ACTIVATIONS[activation], slope, POOLS.index("max"))
    check_block(
        ops, (x, [], [], [], options, lambda x, *_: block(x, [], [], [], "none", 1, activation, slope, "max")), x.dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", [c for c in BLOCKS if BLOCKS[c][5] in ("batch", "group")])
def test_norm_moments(ops, case, dtype):  # noqa: F811
    tasks, rows, high, wide, channels, norm, groups, *_ = BLOCKS[case]
    x = rand(tasks, rows, high, wide, channels, dtype=dtype) + 100
    found = both_orders(lambda: ops.norm_moments(x, NORMS.index(norm), groups))
    for ours, truth in zip(found, moments(x.double(), norm, groups), strict=True):
        agree(ours, truth, dtype)


def test_norms_say_what_does_not_fit(ops):  # noqa: F811
    x, weight, batch, groups = rand(2, 3, 4, 4, 6), rand(2, 6), [torch.ones(2, 1, 6)] * 2, [torch.ones(2, 3, 4)] * 2
    options = (0, 1e-5, 1, 0.0, 1)  # groups, eps, activation, slope, pool
    for arguments, message in (
        ((x, [weight[:, :5].contiguous()], [], batch, 1, *options), "weight does not fit"),
        ((x, [], [torch.cat([weight, weight])], batch, 1, *options), "bias does not fit 2 tasks"),
        ((x, [], [], [], 1, *options), "expects a mean and a variance"),
        ((x, [], [], groups, 1, *options), "moments of 3 rows and 4 groups"),
        ((x, [], [], groups, 2, *options), "moments of 3 rows and 4 groups"),
        ((x, [], [], [m.double() for m in batch], 1, *options), "dtype"),
        ((x, [], [], batch, 1, 0, 1e-5, 2, 0.0, 1), "activation 2 is not"),
        ((x, [], [], batch, 4, *options), "norm 4 is not"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.norm_act_pool(*arguments)
    with pytest.raises(RuntimeError, match="not of the output's shape"):
        ops.norm_act_pool_bwd(x, x, [], [], batch, 1, *options, 1)
    with pytest.raises(RuntimeError, match="6 channels in 4 groups"):
        ops.norm_moments(x, 2, 4)
