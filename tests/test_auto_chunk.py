"""`task_chunk="auto"`: the same sums in chunks that memory has room for, whatever runs out of it on the way."""

import copy
import json

import pytest
import torch
from torch import nn

from fastmeta.algorithms import (
    ANIL,
    CAVIA,
    MAML,
    ConditionalCAML,
    FiLMMLP,
    ImplicitMAML,
    MAMLPlusPlus,
    MetaSGD,
    ProtoNet,
    RelationMLP,
    RelationNetwork,
    Reptile,
    RidgeHead,
    _chunks,
)
from fastmeta.algorithms._auto_chunk import AutoChunk, Chunk
from fastmeta.engines import _memory as memory
from fastmeta.nn import mlp
from fastmeta.tasks import TaskBatch
from fastmeta.training import CheckpointFolder, Reporter, Trainer, run_config
from fastmeta.training.log import read_log
from fastmeta.training.run import build_trainer

pytestmark = pytest.mark.usefixtures("few_glyphs", "one_thread")
WAYS, DIM = 3, 4


def batch_of(tasks=11, dtype=torch.float64):
    torch.manual_seed(1)
    y = torch.arange(WAYS).repeat(2).expand(tasks, -1)
    x = torch.randn(2, tasks, len(y[0]), DIM, dtype=dtype)
    return TaskBatch(x[0], y.clone(), x[1], y.flip(1).clone())


def net():
    return mlp((DIM, 6, WAYS)).double()


def encoder(*more):
    return nn.Sequential(nn.Linear(DIM, 6), *more, nn.Tanh()).double()


LEARNERS = {
    "MAML": lambda: MAML(net(), inner_lr=0.1, inner_steps=2),
    "MAML mapped": lambda: MAML(nn.Sequential(net(), nn.LayerNorm(WAYS).double()), inner_steps=2, engine="vmap"),
    "ANIL": lambda: ANIL(net(), inner_lr=0.1),
    "Meta-SGD": lambda: MetaSGD(net()),
    "MAML++": lambda: MAMLPlusPlus(net(), inner_lr=0.1, inner_steps=2, multi_step_iterations=5),
    "CAVIA": lambda: CAVIA(mlp((DIM + 2, 6, WAYS)).double(), 2),
    "CAML of 2019": lambda: ConditionalCAML(
        encoder(nn.BatchNorm1d(6)), FiLMMLP(6, [DIM, 6, WAYS]).double(), metric_weight=0.5
    ),
    "implicit MAML": lambda: ImplicitMAML(net(), inner_lr=0.1, inner_steps=3, cg_steps=2),
    "Reptile": lambda: Reptile(net(), batch_size=None),
    "ProtoNet": lambda: ProtoNet(encoder()),
    "RelationNetwork": lambda: RelationNetwork(encoder(), RelationMLP(6).double()),
    "RidgeHead": lambda: RidgeHead(encoder()),
}


def made(name, **attributes):
    torch.manual_seed(0)
    learner = LEARNERS[name]()
    for attribute, value in attributes.items():
        setattr(learner, attribute, value)
    return learner


def result(learner, batch, weights=None):
    if hasattr(learner, "gradients"):
        output, gradients = learner.gradients(batch, weights)
        return output.task_loss, output.loss, list(gradients.values())
    output = learner(batch, weights)
    output.loss.backward()
    return output.task_loss.detach(), output.loss.detach(), [p.grad for p in learner.parameters()]


def runs_out_above(monkeypatch, most, error=None):
    """Every chunk of more than `most` tasks fails, after it has done its work."""
    added_up, sizes = _chunks.ChunkedLearner._added_up, []

    def failing(self, run, batch, *rest):
        def of_chunk(*parts):
            found = run(*parts)
            sizes.append(len(parts[0]))
            if len(parts[0]) > most:
                raise error or RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
            return found

        return added_up(self, of_chunk, batch, *rest)

    monkeypatch.setattr(_chunks.ChunkedLearner, "_added_up", failing)
    return sizes


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", LEARNERS)
def test_sums_are_those_of_all_tasks_at_once(monkeypatch, name, weighted):
    batch = batch_of()
    weights = torch.rand(11, dtype=torch.float64) if weighted else None
    expected = result(made(name), batch, weights)
    sizes = runs_out_above(monkeypatch, 3)
    learner = made(name, task_chunk="auto")
    heard = []
    learner.auto_chunk.heard = lambda *what: heard.append(what)
    torch.testing.assert_close(result(learner, batch, weights), expected)
    assert sizes == [1, 4, 2, 2, 2, 2, 2] and heard == [(2, "memory ran out with 4")]
    sizes.clear()
    torch.testing.assert_close(result(made(name, task_chunk=3), batch, weights), expected)
    assert sizes == [3, 3, 3, 2]


def test_what_is_no_lack_of_memory_is_raised(monkeypatch):
    runs_out_above(monkeypatch, 1, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        result(made("MAML", task_chunk="auto"), batch_of())
    runs_out_above(monkeypatch, 0)
    with pytest.raises(RuntimeError, match="can't allocate"):  # not one task fits
        result(made("MAML", task_chunk="auto"), batch_of())


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_chunk_that_fails_leaves_no_trace(monkeypatch, error):
    """Neither in running statistics nor in random states."""

    def learner(chunk):
        torch.manual_seed(0)
        found = ProtoNet(encoder(nn.BatchNorm1d(6), Noisy()))
        found.task_chunk = chunk
        return found

    plain = learner(2)
    found = learner("auto")
    torch.manual_seed(5)
    expected = result(plain, batch_of(4))
    runs_out_above(monkeypatch, 2, error)
    monkeypatch.setattr("fastmeta.algorithms._auto_chunk.Chunk", lambda: Chunk(tasks=4))
    torch.manual_seed(5)
    torch.testing.assert_close(result(found, batch_of(4)), expected, rtol=0, atol=0)
    for mine, other in zip(found.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, other)
    assert int(found.encoder[1].num_batches_tracked) == 2


def test_chunks_grow_to_what_memory_has_room_for(monkeypatch):
    used, free = iter([100, 400, 1600]), 12_000

    class Probe:
        def __init__(self, device):
            self.free = free

        def used(self):
            return next(used)

    monkeypatch.setattr(memory, "Probe", Probe)
    chunks, ran, heard, module, cpu = AutoChunk(), [], [], nn.Linear(2, 2), torch.device("cpu")
    chunks.heard = lambda *what: heard.append(what)
    for _ in range(2):
        chunks.over("kind", 100, lambda start, end: ran.append((start, end)), module, cpu)
    assert ran[:4] == [(0, 1), (1, 5), (5, 21), (21, 81)] and ran[4:] == [(81, 100), (0, 60), (60, 100)]
    assert len(heard) == 1 and heard[0][0] == 60
    again = AutoChunk()
    again.restore(json.loads(json.dumps(chunks.as_json())), cpu)
    assert again.known == chunks.known
    monkeypatch.setattr(memory, "free", lambda device: 11_000)
    again.restore(chunks.as_json(), cpu)  # 6,000 bytes are more than half of it
    assert again.known == {}
    assert copy.deepcopy(chunks).heard is None


def test_half_precision_is_added_up_in_float32():
    tasks = 256
    torch.manual_seed(0)
    learner = ProtoNet(encoder()).bfloat16()
    batch = batch_of(tasks, torch.bfloat16)
    whole = copy.deepcopy(learner).double()
    whole(TaskBatch(*(t.double() if t.is_floating_point() else t for t in batch))).loss.backward()
    learner.task_chunk = 1
    learner(batch).loss.backward()
    for p, q in zip(learner.parameters(), whole.parameters(), strict=True):
        assert p.grad.dtype == torch.bfloat16
        assert (p.grad.double() - q.grad).norm() < 0.01 * q.grad.norm()


def test_serial_reptile_takes_no_chunks():
    learner = Reptile(net(), serial=True)
    learner.task_chunk = "auto"
    learner(batch_of())
    learner.task_chunk = 2
    with pytest.raises(ValueError, match="task_chunk: a serial Reptile"):
        learner(batch_of())


def test_inputs_that_require_gradients_run_at_once():
    learner, batch = made("MAML", task_chunk="auto"), batch_of()
    x = batch[0].clone().requires_grad_()
    learner(TaskBatch(x, *batch[1:])).loss.backward()
    assert x.grad.abs().sum() > 0 and not learner.auto_chunk.known


# ----- in training


@pytest.fixture
def room_for_ten(monkeypatch):
    class Probe:
        free = 20

        def __init__(self, device):
            pass

        def used(self):
            return 4  # with the four tasks of the second chunk: one byte each

    monkeypatch.setattr(memory, "Probe", Probe)
    monkeypatch.setattr("fastmeta.algorithms._auto_chunk.Chunk", lambda **given: Chunk(**{"tasks": 4, **given}))


def config(**changed):
    small = {"hidden": (8,), "task_batch": 25, "iterations": 6, "eval_tasks": 8, "eval_every": 0, "device": "cpu"}
    return run_config("maml", "sinusoid", **{**small, **changed})


def weights(trainer):
    return [p.detach().clone() for p in trainer.algorithm.parameters()]


def test_training_goes_on_with_the_size_that_was_found(tmp_path, room_for_ten):
    heard = []

    class Listener(Reporter):
        def chunked(self, *what):
            heard.append(what)

    straight = build_trainer(config(task_chunk="auto"), None, (Listener(),))
    straight.run()
    assert [what[:2] for what in heard] == [(1, 10)]
    whole = build_trainer(config(), None)
    whole.run()
    torch.testing.assert_close(weights(straight), weights(whole), rtol=1e-4, atol=1e-5)

    halfway = build_trainer(config(task_chunk="auto", iterations=3), tmp_path)
    halfway.run()
    heard.clear()
    resumed = build_trainer(
        config(task_chunk="auto"), tmp_path, (Listener(),), resume=CheckpointFolder(tmp_path).newest()[0]
    )
    resumed.run()
    assert resumed.step == 6 and not heard
    assert all(map(torch.equal, weights(resumed), weights(straight)))


def test_every_learner_takes_chunks_in_training():
    small = {"train_ways": 3, "ways": 3, "query_shots": 2, "train_query_shots": 2, "hidden": (8,), "task_batch": 4}
    trainer = build_trainer(
        run_config("protonet", "glyphs", iterations=2, eval_every=0, task_chunk=3, device="cpu", **small), None
    )
    assert trainer.algorithm.task_chunk == 3
    trainer.run()
    assert trainer.step == 2
    with pytest.raises(ValueError, match="task_chunk: Linear takes no tasks in chunks"):
        Trainer(nn.Linear(2, 2), trainer.tasks, task_batch=2, iterations=1, task_chunk=2)


def test_the_choice_is_logged_once(tmp_path, run):
    small = ["--hidden", 8, "--task-batch", 40, "--iterations", 3, "--eval-tasks", 8, "--no-report", "--device", "cpu"]
    stdout, _ = run("train", "maml", "--data", "sinusoid", *small, "--task-chunk", "auto", "--out", tmp_path / "run")
    assert stdout.count("all tasks at a time: there is room") == 1
    lines = [line for line in read_log(tmp_path / "run") if "task_chunk" in line]
    assert [(line["task_chunk"], line["why"]) for line in lines] == [("all", "there is room")]
    settings = tmp_path / "run" / "run.toml"
    assert 'task-chunk = "auto"' in settings.read_text()
    for given in ("0", "all"):
        _, stderr = run("train", "--config", settings, "--task-chunk", given, code=2)
        assert "at least 1, or auto" in " ".join(stderr.replace("│", " ").split())
