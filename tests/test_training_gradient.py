"""Autocast, torch.compile and CUDA graphs in training: right where they are used, left out and told where not."""

import sys

import pytest
import torch
from test_capture import StandIn

from fastmeta.training import Reporter, run_config
from fastmeta.training.log import read_log
from fastmeta.training.run import build_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Listener(Reporter):
    def __init__(self):
        self.heard = []

    def left_out(self, step, what):
        self.heard.append((step, what))


def trained(algorithm="maml", steps=5, **changed):
    small = {"hidden": (8,), "task_batch": 4, "iterations": steps, "eval_every": 0, "device": "cpu"}
    listener = Listener()
    trainer = build_trainer(run_config(algorithm, "sinusoid", **{**small, **changed}), None, (listener,))
    trainer.run()
    return [p.detach() for p in trainer.algorithm.parameters()], listener.heard, trainer


def compiled_by(monkeypatch, backend):
    """What inductor makes takes long; how it is called is the same."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile(module, backend=backend))
    torch._dynamo.reset()


@pytest.mark.parametrize("algorithm", ["maml", "ridge"])
def test_autocast_trains_with_weights_as_they_were(algorithm):
    plain, _, _ = trained(algorithm)
    lower, heard, trainer = trained(algorithm, autocast="bf16")
    assert not heard and all(p.dtype == p.grad.dtype == torch.float32 for p in trainer.algorithm.parameters())
    assert not all(map(torch.equal, plain, lower))
    for p, q in zip(plain, lower, strict=True):
        torch.testing.assert_close(q, p, rtol=0.05, atol=0.01)  # five steps of 0.001 each
    with pytest.raises(ValueError, match="autocast must be one of bf16"):
        trained(autocast="fp8")


def test_compiled_steps_are_the_same(monkeypatch):
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    compiled_by(monkeypatch, backend)
    found, heard, _ = trained(compile=True)
    assert not heard and calls
    torch.testing.assert_close(found, trained()[0])


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch):
    def backend(graph, inputs):
        raise NotImplementedError("no such kernel")

    compiled_by(monkeypatch, backend)
    found, heard, _ = trained(compile=True)
    assert [step for step, _ in heard] == [1] and "compile is left out: " in heard[0][1]
    assert "no such kernel" in heard[0][1] and "\n" not in heard[0][1]
    torch.testing.assert_close(found, trained()[0], rtol=0, atol=0)


def test_a_graph_needs_a_gpu_and_it_is_logged_once(tmp_path, run):
    small = ["--hidden", 8, "--task-batch", 4, "--iterations", 3, "--eval-tasks", 8, "--no-report", "--device", "cpu"]
    stdout, _ = run("train", "maml", "--data", "sinusoid", *small, "--capture", "--out", tmp_path / "run")
    assert stdout.count("capture is left out: CUDA graphs need a GPU") == 1
    assert [line["note"] for line in read_log(tmp_path / "run") if "note" in line] == [
        "capture is left out: CUDA graphs need a GPU"
    ]


@pytest.fixture
def gpu(monkeypatch):
    found = StandIn()
    for name in ("current_stream", "Stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    monkeypatch.setattr(sys.modules["fastmeta.functional.capture"], "_on_gpu", lambda tensor: True)
    monkeypatch.setattr("fastmeta.training.gradient.MetaGradient._on_gpu", lambda self: True)
    return found


def test_replayed_steps_are_the_same(gpu):
    found, heard, trainer = trained(steps=7, capture=True, settings=(("learn_inner_lr", True),))
    assert not heard and gpu.used.count("CUDAGraph") == 1
    torch.testing.assert_close(found, trained(steps=7, settings=(("learn_inner_lr", True),))[0])


def test_what_waits_for_the_device_is_not_recorded(gpu):
    found, heard, _ = trained("maml++", capture=True)
    assert heard == [(1, "capture is left out: MAMLPlusPlus counts its steps, which a replay does not")]
    torch.testing.assert_close(found, trained("maml++")[0], rtol=0, atol=0)


def test_tasks_drawn_ahead_are_the_same():
    ahead, _, trainer = trained(prefetch=True)
    assert trainer.tasks._thread is not None  # it drew
    trainer.tasks.close()
    torch.testing.assert_close(ahead, trained()[0], rtol=0, atol=0)
