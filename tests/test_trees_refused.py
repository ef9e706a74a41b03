"""Inputs, targets and predictions of several tensors: what is refused, and in which words."""

import pytest
import torch
from test_trees import batches, make
from torch.nn import functional as F

from fastmeta.algorithms import ANIL, MAML, ImplicitMAML, ProtoNet, Reptile


def test_named_losses_take_one_tensor():
    batch = batches("tuple")[0]
    what = r"takes one tensor, but the model returned a tuple \(\[0\] \[(6|10), 3\], \[1\] \[(6|10), 6\]\)"
    for learner in (MAML, ANIL, Reptile, ImplicitMAML):
        with pytest.raises(ValueError, match=what):
            learner(make("tuple", "tuple"))(batch)
    with pytest.raises(ValueError, match="but the model returned a tuple"):
        MAML(make("tuple", "tuple"), inner_steps=0)(batch)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b._replace(support_x=b.support_x | {"mask": b.support_x["mask"][:, 1:]}),
         r"support_x\['mask'\] and support_x\['x'\] must begin with the same tasks and examples.*\(3, 5, 4\)"),
        (lambda b: b._replace(query_y=b.query_y[:, 1:]),
         r"query_x\['mask'\] and query_y must begin with the same tasks and examples"),
        (lambda b: b._replace(query_y={"labels": b.query_y, "mask": b.query_y[0]}),
         r"query_x\['mask'\] and query_y\['mask'\] must begin with"),
        (lambda b: b._replace(support_x={"x": None}), "support_x must hold a tensor"),
        (lambda b: b._replace(support_y=None), "support_y must hold a tensor"),
        (lambda b: b._replace(query_x={"mask": b.query_x["mask"][1:], "x": b.query_x["x"][1:]}, query_y=b.query_y[1:]),
         "support_x has 3 tasks, query_x has 2"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit_together(change, message):
    batch = batches("dict")[0]
    with pytest.raises(ValueError, match=message):
        MAML(make("dict", "tensor"))(change(batch))


def test_what_cannot_be_told_apart_by_task():
    batch = batches("dict")[0]
    maml = MAML(make("dict", "tensor"))
    with pytest.raises(TypeError, match=r"support_x\['x'\] is a ndarray, which cannot be told apart"):
        maml(batch._replace(support_x=batch.support_x | {"x": batch.support_x["x"].numpy()}))
    net = make("dict", "tuple")
    for engine in ("vmap", "loop"):
        maml = MAML(net, loss=lambda p, t: F.cross_entropy(p[0], t), engine=engine)
        net.pack = lambda y, h: (y, torch.distributions.Normal(h, 1.0))
        with pytest.raises(TypeError, match=r"the model's output\[1\] is a Normal"):
            maml(batch)
        net.pack = lambda y, h: None
        with pytest.raises(ValueError, match="the model must return tensors, got NoneType"):
            MAML(net, loss=lambda p, t: t.sum() * 0.0, engine=engine)(batch)
    net.pack = lambda y, h: (y, float(h.detach().sum()))  # a number that differs, which a loss might use
    for task_chunk in (None, 1):
        with pytest.raises(ValueError, match="must be alike for all tasks|must be alike but for"):
            with torch.set_grad_enabled(task_chunk is not None):
                MAML(net, loss=maml.loss.one_task, engine="loop", task_chunk=task_chunk)(batch)
    state = maml.adapt(*batch[:2])
    with pytest.raises(ValueError, match=r"query_x\['mask'\] and query_x\['x'\] must begin"):
        maml.predict(state, batch.query_x | {"mask": batch.query_x["mask"][1:]})
    with pytest.raises(ValueError, match="query_x has 2 tasks, state has 3"):
        maml.predict(state, {"mask": batch.query_x["mask"][1:], "x": batch.query_x["x"][1:]})


def test_encoders_return_one_tensor_and_take_what_agrees():
    batch = batches("dict")[0]
    with pytest.raises(ValueError, match=r"encoder must return embeddings \[B, D\], got a dict \(\['hidden'\]"):
        ProtoNet(make("dict", "dict"))(batch)
    learner = ProtoNet(make("dict", "tensor"))
    with pytest.raises(ValueError, match=r"support_x\['mask'\] and query_x\['mask'\] must agree"):
        learner(batch._replace(query_x=batch.query_x | {"mask": batch.query_x["mask"][..., 1:]}))
    with pytest.raises(ValueError, match="must hold the same tensors"):
        learner(batch._replace(query_x={"x": batch.query_x["x"]}))
