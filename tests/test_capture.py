"""`capture`: what it does with CUDA graphs, on a stand-in for them that records what torch runs; and on a CPU."""

import sys

import pytest
import torch
from conftest import CUDA
from torch.utils._python_dispatch import TorchDispatchMode

import fastmeta
from fastmeta import MAML, TaskBatch, capture
from fastmeta.nn import mlp

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Recorder(TorchDispatchMode):
    """Operations are noted; those in place do not happen before the replay, as on a GPU."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name.removeprefix("aten::") in WAITS:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")
        in_place = func._schema.is_mutable
        found = args[0] if in_place else func(*args, **kwargs)
        self.calls.append((func, args, kwargs, None if in_place else found))
        return None if in_place and not func._schema.returns else found

    def replay(self):
        for func, args, kwargs, found in self.calls:
            with torch._C._AutoDispatchBelowAutograd():
                again = func(*args, **kwargs)
            for old, new in zip(*map(torch.utils._pytree.tree_leaves, (found, again)), strict=False):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


class StandIn:
    """Of `torch.cuda`: what is used, and how often."""

    def __init__(self):
        self.used = []

    def __getattr__(self, name):
        return lambda *args: self.used.append(name) or self

    def stream(self, side):
        self.used.append("stream")
        return torch.enable_grad()

    def CUDAGraph(self):
        self.used.append("CUDAGraph")
        return Recorder()

    def graph(self, recorder):
        return recorder


@pytest.fixture
def gpu(monkeypatch):
    module = sys.modules["fastmeta.functional.capture"]  # whose name in the package is the function's
    found = StandIn()
    for name in ("current_stream", "Stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    monkeypatch.setattr(module, "_on_gpu", lambda tensor: True)
    return found


def training():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def step(batch):
        """One step."""
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])
        loss.backward()
        optimizer.step()
        return loss, {"first": model[0].weight[0]}, None

    return model, step


def batches(n, rows=5):
    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(rows, 3, generator=g), "y": torch.randn(rows, 2, generator=g)} for _ in range(n)]


def test_every_call_is_one_step(gpu):
    plain, step = training()
    expected = [(loss.detach(), found["first"].detach().clone()) for loss, found, _ in map(step, batches(7))]
    model, step = training()
    captured = capture(step, warmup=2)
    results = [captured(batch) for batch in batches(7)]
    for i, ((loss, found, nothing), (right, first)) in enumerate(zip(results, expected, strict=True)):
        assert nothing is None and not loss.requires_grad
        torch.testing.assert_close(loss, right, rtol=0, atol=0)
        if i >= 2:  # a copy, which further replays do not write over
            torch.testing.assert_close(found["first"], first, rtol=0, atol=0)
    for ours, right in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=0)
    assert gpu.used.count("stream") == 2 and gpu.used.count("CUDAGraph") == 1
    assert captured.__doc__ == "One step."


def test_each_kind_of_inputs_has_a_recording_of_its_own(gpu):
    captured = capture(lambda x, y=None: x * 2, warmup=1)
    for size in (3, 4):
        for i in range(3):
            x = torch.full((size,), float(i))
            torch.testing.assert_close(captured(x), 2 * x)
    assert len(captured.recordings) == 2
    for _ in range(2):
        captured(torch.ones(3, dtype=torch.float64))
        captured(torch.ones(3), y=torch.ones(3))
        captured(torch.ones(3))
        with torch.no_grad():
            captured(torch.ones(3))
    assert len(captured.recordings) == 5  # two sizes; float64; with y; without gradients
    with pytest.warns(UserWarning, match="recorded for 8 kinds of inputs"):
        for size in range(5, 9):
            for _ in range(3):
                captured(torch.ones(size))
    assert len(captured.recordings) == 8


def test_what_cannot_be_recorded_is_told_with_its_cause(gpu):
    captured = capture(lambda x: x * x.sum().item(), warmup=1)
    captured(torch.ones(3))
    text = r"step cannot be recorded as a CUDA graph: CUDA error: operation not permitted when .* capturing\. While"
    with pytest.raises(RuntimeError, match=text) as caught:
        captured(torch.ones(3))
    assert "more of it" in str(caught.value.__cause__)
    assert not captured.recordings


def test_on_the_cpu_it_runs_as_it_is():
    torch.manual_seed(0)
    maml = MAML(mlp([4, 8, 3]), inner_lr=0.1, inner_steps=1)
    x, y = torch.randn(2, 6, 4), torch.arange(6).fmod(3).expand(2, 6)
    batch = TaskBatch(x, y, x + 0.1, y)

    @capture
    def step(batch, scale=1.0):
        loss = scale * maml(batch).loss
        loss.backward()
        return loss

    loss = step(batch, scale=2.0)
    torch.testing.assert_close(loss, 2 * maml(batch).loss.detach())
    assert not loss.requires_grad and all(p.grad is not None for p in maml.parameters()) and not step.recordings


def test_wrong_arguments():
    x, gradient = torch.ones(2), torch.ones(2, requires_grad=True)
    for wrong, error, text in (
        (lambda: capture(3), TypeError, "step must be a function, got 3"),
        (lambda: capture(len, warmup=0), ValueError, "warmup must be at least 1, got 0"),
        (lambda: capture(lambda x: x)(gradient), ValueError, r"\[0\]\[0\] requires a gradient"),
        (lambda: capture(lambda *x: x)(x, x.to("meta")), ValueError, "got cpu, meta"),
        (lambda: capture(lambda x: x)(object()), TypeError, "step's arguments"),
        (lambda: capture(lambda x: object())(x), TypeError, "what step returns"),
    ):
        with pytest.raises(error, match=text):
            wrong()


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_on_a_gpu():
    expected, found = [], []
    for losses, wrap in ((expected, lambda step: step), (found, capture)):
        torch.manual_seed(0)
        maml = fastmeta.MAML(mlp([4, 8, 3]), inner_lr=0.1, inner_steps=1).to("cuda")
        optimizer = torch.optim.Adam(maml.parameters(), 0.01, capturable=True)

        def step(batch, maml=maml, optimizer=optimizer):
            optimizer.zero_grad()
            loss = maml(batch).loss
            loss.backward()
            optimizer.step()
            return loss

        step = wrap(step)
        for i in range(6):
            x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(i)).cuda()
            y = torch.arange(6, device="cuda").fmod(3).expand(2, 6)
            losses.append(step(TaskBatch(x, y, x + 0.1, y)).detach())
    torch.testing.assert_close(found, expected)
