"""The residual encoders: sizes, names and what few-shot work knows of them."""

import pytest
import torch
from torch import nn

from fastmeta import MAML, ProtoNet
from fastmeta.nn import resnet12, wrn28_10
from fastmeta.tasks import TaskBatch


def size(net):
    return sum(p.numel() for p in net.parameters())


def test_sizes_that_are_published():
    assert size(resnet12()) == 12_424_320  # 12.4 million
    assert size(wrn28_10()) == 36_479_194 - 6_410  # as for CIFAR-10, whose classifier is not here


@pytest.mark.parametrize(
    ("make", "image", "width"),
    [
        (lambda: resnet12(widths=(4, 6, 8, 10)), (3, 84, 84), 10),
        (lambda: resnet12(1, (4, 6), drop_rate=0.2), (1, 16, 16), 6),
        (lambda: wrn28_10(depth=10, factor=1), (3, 32, 32), 64),
        (lambda: wrn28_10(1, depth=16, factor=2, drop_rate=0.2), (1, 28, 28), 128),
    ],
)
def test_shapes(make, image, width):
    net = make()
    assert net(torch.randn(2, *image)).shape == (2, width)
    assert net.eval()(torch.randn(1, *image)).shape == (1, width)


def test_names_of_published_weights():
    names = set(resnet12(widths=(4, 4, 4, 4)).state_dict())
    of_block = {"conv1.weight", "bn1.weight", "conv3.weight", "bn3.running_mean", "downsample.0.weight"}
    assert {f"layer{i}.0.{name}" for i in (1, 2, 3, 4) for name in (*of_block, "downsample.1.bias")} <= names
    names = set(wrn28_10(factor=1).state_dict())
    assert {"conv1.weight", "bn1.weight", "block1.layer.3.conv2.weight", "block2.layer.0.convShortcut.weight"} <= names
    assert "block2.layer.1.convShortcut.weight" not in names and "block1.layer.0.convShortcut.weight" not in names


def test_pooling_before_the_activation_changes_nothing():
    """Against the block as it is written in the papers."""
    torch.manual_seed(0)
    net, x = resnet12(widths=(4, 5)).double(), torch.randn(3, 3, 16, 16, dtype=torch.float64)

    def block(b, x):
        act = nn.functional.leaky_relu
        h = act(b.bn1(b.conv1(x)), 0.1)
        h = act(b.bn2(b.conv2(h)), 0.1)
        return nn.functional.max_pool2d(act(b.bn3(b.conv3(h)) + b.downsample(x), 0.1), 2)

    right = block(net.layer2[0], block(net.layer1[0], x)).mean((2, 3))
    torch.testing.assert_close(net(x), right)


def test_learners_take_them():
    shape, labels = (2, 5, 3, 16, 16), torch.arange(5).expand(2, 5)
    batch = TaskBatch(torch.randn(shape), labels, torch.randn(shape), labels)
    ProtoNet(resnet12(widths=(4, 4)))(batch).loss.backward()
    net = nn.Sequential(resnet12(widths=(4, 4), track_running_stats=False), nn.Linear(4, 5))
    MAML(net, inner_steps=2)(batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net = nn.Sequential(wrn28_10(depth=10, factor=1, track_running_stats=False), nn.Linear(64, 5))
    MAML(net)(batch).loss.backward()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wrn28_10(depth=12), "depth must be 6 n"),
        (lambda: wrn28_10(factor=0), "factor must be at least 1"),
        (lambda: resnet12(widths=()), "widths"),
        (lambda: resnet12(drop_rate=1.0), "drop_rate must be below 1"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
