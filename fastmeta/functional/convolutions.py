"""Convolutions whose weights are each task's own, for all tasks in one call."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastmeta import values
from fastmeta.dispatch.spec import leading_size
from fastmeta.ops import task_conv2d as _task_conv2d

from . import checks
from .autocast import cast

Size = int | tuple[int, ...]


def task_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` of every task's images with the task's own weights.

    Images, weights and bias have a leading task dimension, of size T, or 1 where all tasks share them: nothing is
    copied for that, and shared weights make one dense convolution over the rows of all tasks. Differentiable to any
    order.

    Args:
        x: `[T, B, C, H, W]` or `[1, B, C, H, W]`, floating. In memory best channels last, which the kernels read as
            they lie (as what this function returns); other strides are copied once.
        weight: `[T, O, C / groups, kh, kw]` or `[1, ...]`, same dtype and device.
        bias: `[T, O]` or `[1, O]`, same dtype and device; None (default) for none.
        stride: an int of at least 1 (default 1), or one for height and one for width.
        padding: zeros at each edge, an int (default 0) or a pair; "valid", none; or "same", as many as keep height and
            width, of which, where they are odd in number, one more goes to the bottom or right, as in torch. "same"
            needs a stride of 1.
        dilation: distance between the elements of a kernel, an int of at least 1 (default 1) or a pair.
        groups: C and O are divided by it (default 1).

    Returns:
        `[T, B, O, H', W']`, channels last in memory.

    Raises:
        TypeError: a dtype that is not allowed or differs, an option that is no int.
        ValueError: shapes or devices that do not fit together, an option out of range, a kernel larger than the padded
            image.
    """
    return _convolution(x, weight, bias, stride, padding, dilation, groups, "HW")


def task_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv1d` of every task's sequences with the task's own weights.

    As `task_conv2d`, of images of height 1.

    Args:
        x: `[T, B, C, L]` or `[1, B, C, L]`, floating.
        weight: `[T, O, C / groups, k]` or `[1, ...]`, same dtype and device.
        bias: `[T, O]` or `[1, O]`, same dtype and device; None (default) for none.
        stride: an int of at least 1 (default 1).
        padding: zeros at both ends, an int (default 0); "valid", none; or "same", as many as keep the length, one more
            at the right where they are odd in number, which needs a stride of 1.
        dilation: distance between the elements of a kernel, an int of at least 1 (default 1).
        groups: C and O are divided by it (default 1).

    Returns:
        `[T, B, O, L']`, channels last in memory.

    Raises:
        TypeError: a dtype that is not allowed or differs, an option that is no int.
        ValueError: shapes or devices that do not fit together, an option out of range, a kernel longer than the padded
            sequence.
    """
    return _convolution(x, weight, bias, stride, padding, dilation, groups, "L")


def _convolution(x, weight, bias, stride, padding, dilation, groups, axes: str) -> Tensor:
    stride, dilation = _sizes("stride", stride, 1, axes), _sizes("dilation", dilation, 1, axes)
    padding = _padding(padding, stride, axes)
    values.count("groups", groups)
    # sizes are told from a list of tensors by what holds them
    key = checks.key("task_conv", x, weight, bias, groups, len(axes), *stride, "padding", *padding, *dilation)
    known = checks.passed(key)
    if not known:
        _check_shapes(x, weight, bias, groups, axes)
    x, weight, *rest = cast(_task_conv2d.SPEC.autocast, x, weight, *(() if bias is None else (bias,)))
    if not known:
        checks.same_kind("x", x, weight=weight, bias=rest[0] if rest else None)
        _check_fit(x, weight, padding, dilation, axes)
        checks.remember(key)
    if isinstance(padding[0], str):
        x, padding = _keeping_size(x, weight, dilation)
    pixels = x.movedim(2, -1)
    if axes == "L":
        pixels, weight = pixels.unsqueeze(2), weight.unsqueeze(3)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    # here once, and not in every kernel that reads it
    y = _task_conv2d.SPEC(pixels.contiguous(), weight, rest, *stride, *padding, *dilation, groups)
    return (y.squeeze(2) if axes == "L" else y).movedim(-1, 2)


def _sizes(name: str, value: Size, least: int, axes: str) -> tuple[int, ...]:
    """One int for each of the `axes` of an image."""
    if not isinstance(value, (tuple, list)):
        return (values.count(name, value, least),) * len(axes)
    if len(value) != len(axes):
        wanted = "a pair of them" if len(axes) == 2 else "one in a tuple"
        raise ValueError(f"{name} must be an int or {wanted}, got {len(value)} values")
    return tuple(values.count(f"{name}[{i}]", size, least) for i, size in enumerate(value))


def _padding(value: Size | str, stride: tuple[int, ...], axes: str) -> tuple[int, ...] | tuple[str]:
    if not isinstance(value, str):
        return _sizes("padding", value, 0, axes)
    if value == "valid":
        return (0,) * len(axes)
    if value != "same":
        raise ValueError(f"padding must be an int, {'a pair, ' * (len(axes) == 2)}'same' or 'valid', got {value!r}")
    if any(size != 1 for size in stride):
        raise ValueError(f"padding 'same' needs a stride of 1, got {stride[0] if len(axes) == 1 else stride}")
    return (value,)


def _check_shapes(x, weight, bias, groups: int, axes: str) -> None:
    checks.tensor("x", x, f"[T, B, C, {', '.join(axes)}]")
    kernel = "kh, kw" if axes == "HW" else "k"
    checks.tensor("weight", weight, f"[T, O, C / groups, {kernel}]")
    if bias is not None:
        checks.tensor("bias", bias, "[T, O]")
    given = [t for t in (x, weight, bias) if t is not None]
    tasks = leading_size(given)
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if value is not None:
            checks.choice_of_tasks(name, value, tasks)
    channels, outputs = x.shape[2], weight.shape[1]
    if min(channels, *weight.shape[1:]) < 1:
        raise ValueError(
            f"channels and kernel sizes must be at least 1, got x of shape {list(x.shape)} and weight of shape "
            f"{list(weight.shape)}"
        )
    for name, count in (("C", channels), ("O", outputs)):
        if count % groups:
            raise ValueError(f"groups must divide {name} = {count}, got {groups}")
    checks.same_size("weight", weight, 2, "C / groups", "x divided by groups", channels // groups)
    if bias is not None:
        checks.same_size("bias", bias, 1, "O", "weight", outputs)


def _check_fit(x: Tensor, weight: Tensor, padding, dilation, axes: str) -> None:
    for i, axis in enumerate(axes):
        size, extent = x.shape[3 + i], dilation[i] * (weight.shape[3 + i] - 1) + 1
        pad = padding[i] if len(padding) > i and not isinstance(padding[i], str) else None
        if size < 1 or pad is not None and size + 2 * pad < extent:
            padded = "" if not pad else f", padded to {size + 2 * pad},"
            raise ValueError(
                f"x has {axis} = {size} (shape {list(x.shape)}){padded} but the kernel covers {extent} of them"
            )


def _keeping_size(x: Tensor, weight: Tensor, dilation) -> tuple[Tensor, tuple[int, ...]]:
    """Images and symmetric padding so that the output is as large: what is uneven is padded here."""
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[3:], strict=True)]
    if any(total % 2 for total in totals):
        # F.pad goes from the last dimension to the first; zeros join channels-last memory without another copy
        x = F.pad(x, [size for total in reversed(totals) for size in (0, total % 2)])
    return x, tuple(total // 2 for total in totals)
