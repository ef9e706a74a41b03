"""Whatever plain PyTorch can differentiate gives the answer of plain autograd, one task at a time."""

import pytest
import torch
from module_kinds import KINDS, adapted, make, plain, tasks

from fastmeta.algorithms import MAML
from fastmeta.tasks import TaskBatch

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
pytestmark = [
    pytest.mark.filterwarnings("ignore:tasks run one after the other:UserWarning"),
    # vmap takes weight_norm task by task and says that this is slow: here the gradient counts
    pytest.mark.filterwarnings("ignore:There is a performance drop.*aten.._weight_norm:UserWarning"),
]


def check(found, right):
    torch.testing.assert_close(found, right, **CLOSE)


@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_maml(kind, steps, first_order):
    batch, options = TaskBatch(*tasks(kind)), {"steps": steps, "first_order": first_order, "lr": 0.3}
    for training in (True, False):
        net = make(kind).train(training)
        maml = MAML(net, inner_lr=0.3, inner_steps=steps, first_order=first_order)
        losses, predictions, gradients = plain(net, batch, **options)
        out = maml(batch)
        check(out.task_loss.detach(), losses)
        check(out.logits.detach(), predictions)
        named = {n: p for n, p in net.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(out.loss, list(named.values()), allow_unused=True, materialize_grads=True)
        check(dict(zip(named, found, strict=True)), gradients)
        check(maml.gradients(batch)[1], {f"model.{n}": g for n, g in gradients.items()})
        with torch.no_grad():
            state = maml.adapt(batch.support_x, batch.support_y)
            check(maml.predict(state, batch.query_x), predictions)
        right = adapted(net, batch.support_x[1], batch.support_y[1], **options)
        check({n: w.detach() for n, w in state[1].items()}, {n: w.detach() for n, w in right.items()})
