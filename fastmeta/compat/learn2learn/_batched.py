"""The way out of the loop over tasks: all of them at once, in fastmeta's engines."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fastmeta import MetaOutput, TaskBatch, algorithms, values

from .algorithms.base_learner import BaseLearner
from .algorithms.maml import MAML
from .algorithms.meta_sgd import MetaSGD

_last: WeakKeyDictionary[BaseLearner, tuple[tuple, nn.Module]] = WeakKeyDictionary()


def adapt_batch(
    learner: MAML | MetaSGD,
    batch: TaskBatch,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    steps: int = 1,
    *,
    first_order: bool | None = None,
    engine: str = "auto",
    task_chunk: int | None = None,
) -> MetaOutput:
    """What this loop computes, for all tasks at once::

        losses = []
        for support_x, support_y, query_x, query_y in zip(*batch):
            clone = learner.clone()
            for _ in range(steps):
                clone.adapt(loss(clone(support_x), support_y))
            losses.append(loss(clone(query_x), query_y))
        mean = torch.stack(losses).mean()  # `.loss` of what is returned

    `.loss.backward()` leaves the gradients of the mean in the parameters of `learner`, equal to rounding. Running
    statistics of batch norms are not moved. Not in learn2learn.

    Args:
        learner: a `MAML` or `MetaSGD`, no clone of one. Parameters without `requires_grad`, and those that the loss
            does not depend on, stay as they are, whatever `allow_nograd` and `allow_unused` say.
        batch: support rows `[T, S, ...]`, their targets `[T, S]` or `[T, S, O]`, query rows and targets likewise;
            `data.stack_tasks` and `Taskset.sample_batch` make one.
        loss: as in `fastmeta.MAML`: "cross_entropy" (default), "mse" and others by name, or a callable of a task's
            prediction and targets, such as torch's loss modules.
        steps: calls of `adapt`, 1 by default.
        first_order: by default the learner's own.
        engine: as in `fastmeta.MAML`; of a `MetaSGD` "auto" alone.
        task_chunk: at most this many tasks at a time, to bound memory; default all.

    Returns:
        `loss` `[]`, `task_loss` `[T]`, `accuracy` `[T]` of labels, `logits` `[T, Q, C]`.

    Raises:
        TypeError: another learner, also a subclass with an `adapt` or `forward` of its own.
        ValueError: a clone; a rate that requires a gradient, which would get none; what `fastmeta.MAML` refuses.
    """
    _check_served(learner)
    values.count("steps", steps, 0)
    if task_chunk is not None:
        values.count("task_chunk", task_chunk, 1)
    first_order = learner.first_order if first_order is None else first_order
    rates = float(learner.lr) if isinstance(learner, MAML) else learner.lrs
    key = (learner.module, rates, loss, first_order, engine)
    known = _last.get(learner)
    if known is None or known[0] != key:
        known = _last[learner] = key, _batched(learner, loss, first_order, engine)
    vectorised = known[1]
    vectorised.inner_steps, vectorised.task_chunk = steps, task_chunk
    return vectorised(TaskBatch.of(batch))


def _check_served(learner: MAML | MetaSGD) -> None:
    for kind in (MAML, MetaSGD):
        if isinstance(learner, kind):
            own = type(learner)
            if own.adapt is not kind.adapt or own.forward is not kind.forward:
                raise TypeError(f"adapt_batch cannot know what {own.__name__}'s own adapt and forward do")
            if not all(p.is_leaf for p in learner.parameters()):
                raise ValueError("learner must be no clone: adapt_batch adapts copies of it, one for each task")
            if kind is MAML and getattr(learner.lr, "requires_grad", False):
                raise ValueError("learner.lr must be a number: fastmeta.MAML(learn_inner_lr=True) trains a rate")
            return
    raise TypeError(f"learner must be a MAML or a MetaSGD, got {type(learner).__name__}")


def _batched(learner: MAML | MetaSGD, loss, first_order: bool, engine: str) -> nn.Module:
    """fastmeta's algorithm on the learner's own parameters."""
    options = {"loss": loss, "first_order": first_order}
    if isinstance(learner, MAML):
        return algorithms.MAML(learner.module, inner_lr=float(learner.lr), engine=engine, **options)
    if engine != "auto":
        raise ValueError(f"engine must be 'auto' with MetaSGD, got {engine!r}")
    vectorised = algorithms.MetaSGD(learner.module, **options)
    for (name, _), rates in zip(learner.module.named_parameters(), learner.lrs, strict=True):
        vectorised.rates[name.replace(".", "/")] = rates
    return vectorised
