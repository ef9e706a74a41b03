"""What a step of training costs beside its gradients, in calls, and the optimizer that keeps it low."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmeta.training import CheckpointFolder, run_config
from fastmeta.training.checkpoint import pack_optimizer, unpack_optimizer
from fastmeta.training.optimizer import Adam
from fastmeta.training.run import build_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def sinusoid(**changed):
    small = {"hidden": (8,), "task_batch": 4, "iterations": 6, "eval_every": 0, "save_every": 0, "device": "cpu"}
    return run_config("maml", "sinusoid", **{**small, **changed})


class Calls(TorchDispatchMode):
    """Counts calls of PyTorch's operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def waits(self):
        return self.names.count("_local_scalar_dense")


# ----- calls of a step


def calls_of_a_step(**changed):
    trainer = build_trainer(sinusoid(), None)
    for name, value in changed.items():
        setattr(trainer, name, value)
    for _ in range(2):
        trainer.train_step()
    batch = trainer.tasks.sample(4, generator=trainer.generator)
    with Calls() as bare:
        trainer.algorithm.gradients(batch)
    with Calls() as step:
        trainer.train_step()
    return step, bare


def test_a_step_is_few_calls_beside_its_gradients():
    step, bare = calls_of_a_step()
    # 6 for random numbers, 3 for targets, 2 splits, 4 views of tasks; 2 of Adam; norms, and 5 numbers read of them
    assert len(step.names) - len(bare.names) <= 23
    assert step.waits - bare.waits == 1 + 4  # for the loss and each gradient's norm, before they reach the weights


def test_a_step_that_is_checked_late_waits_for_nothing():
    step, bare = calls_of_a_step(_check_every_step=False)
    assert step.waits == bare.waits == 0


# ----- Adam


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def transposed(*shape):
    return random(*reversed(shape)).permute(tuple(reversed(range(len(shape)))))


PARAMETERS = {
    "as PyTorch makes them": lambda: [random(3, 4), random(5), random()],
    "channels last": lambda: [random(3, 4, 2, 2).to(memory_format=torch.channels_last), random(2)],
    "transposed": lambda: [transposed(3, 4)],
    "with gaps": lambda: [random(4, 6)[:, :3], random(2)],
    "of two dtypes": lambda: [random(3, 4), random(5).float()],
}


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("gradient", [random, transposed])
def test_update_is_adam_whatever_the_layout(kind, gradient):
    torch.manual_seed(0)
    own = [nn.Parameter(t) for t in PARAMETERS[kind]()]
    plain = [nn.Parameter(p.detach().clone()) for p in own]
    between = own[0].detach().as_strided((4, 3), (6, 1), 3) if kind == "with gaps" else torch.empty(0)
    untouched = between.clone()
    optimizer, wanted = Adam(own, 0.1), torch.optim.Adam(plain, lr=0.1, foreach=False)
    assert (optimizer.param_groups[0]["fused"] is None) == (kind == "with gaps")
    for step in range(6):
        for group in (*optimizer.param_groups, *wanted.param_groups):
            group["lr"] = 0.1 / (step + 1)
        for p, q in zip(own, plain, strict=True):
            q.grad = None if step == 3 and q is plain[-1] else gradient(*q.shape).to(q.dtype)
            p.grad = None if q.grad is None else q.grad.clone()
        optimizer.update()
        wanted.step()
        for p, q in zip(own, plain, strict=True):
            torch.testing.assert_close(p, q)
    assert torch.equal(between, untouched)


def test_update_is_the_fused_step_to_the_bit_and_goes_on_from_its_state():
    torch.manual_seed(0)
    own, plain = ([nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))] for _ in range(2))
    optimizer, wanted, heard = Adam(own, 0.1), torch.optim.Adam(plain, lr=0.1, fused=True), []
    for step in range(9):
        for p, q in zip(own, plain, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.clone()
        if step == 3:  # as a run that is resumed
            unpack_optimizer(optimizer, *pack_optimizer(optimizer))
        if step == 6:
            optimizer.register_step_pre_hook(lambda *_: heard.append(1))
        optimizer.update()
        wanted.step()
        assert all(torch.equal(p, q) for p, q in zip(own, plain, strict=True))
    assert len(heard) == 3


def test_a_run_whose_checkpoint_has_another_adam_goes_on_with_that_one(tmp_path):
    def plain(trainer):
        trainer.optimizer.param_groups[0]["fused"] = None
        return trainer

    straight = plain(build_trainer(sinusoid(), None))
    straight.run()
    halfway = plain(build_trainer(sinusoid(), tmp_path))
    while halfway.step < 3:
        halfway.train_step()
    halfway.save()
    resumed = build_trainer(sinusoid(), tmp_path, resume=CheckpointFolder(tmp_path).newest()[0])
    resumed.run()
    assert resumed.optimizer.param_groups[0]["fused"] is None and resumed.step == 6
    pairs = zip(straight.algorithm.parameters(), resumed.algorithm.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
