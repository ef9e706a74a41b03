"""conv4 and conv4_1d: names that users know, older names, sizes, and every engine on them."""

import pytest
import torch
from module_kinds import plain
from torch import nn

from fastmeta.algorithms import ANIL, MAML, ProtoNet
from fastmeta.nn import conv4, conv4_1d
from fastmeta.tasks import TaskBatch


def test_names_of_published_weights():
    names = list(conv4(num_classes=5).state_dict())
    of_block = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert names == [f"encoder.{i}.{name}" for i in range(4) for name in of_block] + [
        "classifier.weight", "classifier.bias"]  # fmt: skip
    assert [name for name in names if "running" not in name and "num" not in name] == list(
        conv4_1d(num_classes=5, track_running_stats=False).state_dict())  # fmt: skip


@pytest.mark.parametrize("num_classes", [None, 5])
def test_layers_numbered_in_one_row_load(num_classes):
    net = conv4(1, 4, num_classes=num_classes)
    row = nn.Sequential(*[layer for block in list(net.encoder)[:4] for layer in block], nn.Flatten(),
                        *([] if num_classes is None else [net.classifier]))  # fmt: skip
    older = {f"model.{name}": tensor.clone() for name, tensor in row.state_dict().items()}
    new = MAML(conv4(1, 4, num_classes=num_classes))
    new.load_state_dict(older)
    x = torch.randn(3, 1, 28, 28)
    assert torch.equal(new.model(x), net(x))
    inside = nn.Sequential(conv4(1, 4), nn.Linear(4, 3))
    parts = enumerate((row[:17], inside[1]))
    inside.load_state_dict({f"{i}.{name}": t for i, part in parts for name, t in part.state_dict().items()})
    assert torch.equal(inside[0].encoder[0][0].weight, net.encoder[0][0].weight)
    with pytest.raises(RuntimeError, match="encoder.4.0.weight|classifier|encoder.0.0.bias"):
        new.load_state_dict({name: t for name, t in older.items() if name != "model.0.bias"})


def test_shapes():
    assert conv4(num_classes=7)(torch.randn(2, 1, 28, 28)).shape == (2, 7)
    assert conv4(3, 8, num_classes=7, image_size=(84, 48))(torch.randn(2, 3, 84, 48)).shape == (2, 7)
    assert conv4()(torch.randn(2, 1, 28, 28)).shape == (2, 64)
    assert conv4(3, 8)(torch.randn(2, 3, 84, 84)).shape == (2, 200)
    for length in (1, 10, 33, 200):
        assert conv4_1d(2, 8)(torch.randn(3, 2, length)).shape == (3, 8)
    assert conv4_1d(2, 8, kernel_size=3, num_classes=4)(torch.randn(3, 2, 10)).shape == (3, 4)


@pytest.mark.parametrize("engine", ["auto", "layerwise", "vmap", "loop"])
@pytest.mark.parametrize("signal", [False, True], ids=["image", "signal"])
def test_learners_take_them(signal, engine):
    torch.manual_seed(0)
    options = {"num_classes": 3, "track_running_stats": False}
    net = conv4_1d(2, 4, **options) if signal else conv4(1, 4, image_size=16, **options)
    shape = (2, 21) if signal else (1, 16, 16)
    rows = ((torch.randn(2, n, *shape).double(), torch.arange(2 * n).view(2, n) % 3) for n in (6, 3))
    batch = TaskBatch(*(part for pair in rows for part in pair))
    right = plain(net.double(), batch, lr=0.1, steps=2)
    out, found = MAML(net, inner_lr=0.1, inner_steps=2, engine=engine).gradients(batch)
    close = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(out.task_loss, right[0], **close)
    torch.testing.assert_close(found, {f"model.{name}": g for name, g in right[2].items()}, **close)
    anil = ANIL(net)
    assert set(anil.adapting) == {"classifier.weight", "classifier.bias"} and anil(batch).loss.isfinite()


def test_encoders():
    shape, labels = (2, 6, 1, 28, 28), torch.arange(6).expand(2, 6) % 3
    batch = TaskBatch(torch.randn(shape), labels, torch.randn(shape), labels)
    net = ProtoNet(conv4(hidden=4))
    net(batch).loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: conv4(num_classes=0), ValueError, "num_classes must be at least 1"),
        (lambda: conv4(num_classes=5, image_size=15), ValueError, "image_size must be one or two sides of at least 16"),
        (lambda: conv4(num_classes=5, image_size=28.0), TypeError, "image_size must be a list or tuple of ints"),
        (lambda: conv4_1d(kernel_size=4), ValueError, "kernel_size must be odd, got 4"),
        (lambda: conv4_1d(hidden=0), ValueError, "hidden must be at least 1"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
