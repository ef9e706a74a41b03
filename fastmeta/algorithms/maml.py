"""Model-agnostic meta-learning: learn the weights that a few gradient steps adapt best."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._trees import requires_grad
from ..batch import TaskBatch
from ..dispatch.library import plain_call
from ..engines import Engine, InnerLoop, choose, explain
from ..engines.fused import FusedEngine
from ..engines.inspect import inspected
from ..engines.select import check_name
from ._arguments import check_weights
from ._auto_chunk import AUTO
from ._direct import DirectGradient, direct_gradient
from ._inner_loop import InnerLoopAlgorithm
from ._inner_lr import InnerLR, as_inner_lr, as_rule, described, rates_of
from ._rows import dense_batch, groups_of_batch, without_padding
from .output import MetaOutput, detached, judged


class MAML(InnerLoopAlgorithm):
    """MAML (Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
    algorithm 1 and 2).

    Every task starts at the slow weights and takes `inner_steps` steps `w <- w - inner_lr * grad
    L_support(w)` (their equation in section 2.2); `forward` returns the mean query loss at the weights so
    reached, whose gradient with respect to the slow weights is the meta-gradient of their equation 1, second
    derivatives included; `gradients` returns both. `first_order=True` treats the inner gradients as constants
    (first-order MAML, their section 5.2). Departures: the mean over tasks, where the paper sums (scale the outer
    rate), and all tasks at once.

    Args:
        model: any module from examples `[B, ...]` to predictions `[B, C]`; used as it is, and its parameters
            are the slow weights. Parameters with `requires_grad=False` are neither adapted nor trained. Inputs that are
            a tuple or list are its positional arguments, a dict its keyword arguments, a named tuple or dataclass its
            one argument, of tensors with as many tasks and examples each. It may return any of these, too, for a `loss`
            of your own that takes of it what it needs; `logits` and `predict` then hold all of it. Lazy layers see the
            first task's support rows first, as in a plain call.
        inner_lr: step size in the inner loop, at least 0; 0.01 by default. A float, a tensor `[]` or `[K]` (per step;
            later ones have the last one's), or a dict of such by layer or parameter: `{"": 0.01, "head": 0.1}`. The
            longest name that a parameter's begins with counts, and `""` is the whole model; each parameter that adapts
            needs a rate.
        learn_inner_lr: whether these rates are trained, too: each is a parameter of the learner, and may become
            negative. False by default.
        inner_optimizer: `"sgd"` (default), `"adam"` as `torch.optim.Adam`, or `"adamw"`, whose weights decay by
            themselves. The meta-gradient goes through Adam's moments, with the limit of its derivative where no
            gradient has come; see `functional.adam_step`. All engines but `fused` and `lowrank` take them.
        betas, eps, amsgrad: Adam's; (0.9, 0.999), 1e-8 and False by default.
        momentum: `m <- momentum * m + gradient` in the inner steps, from 0, as in `torch.optim.SGD`; default 0.
        weight_decay: adds `weight_decay * w` to the inner gradient; default 0. Parameters that the loss does not depend
            on do not decay.
        clip_norm: largest norm of the inner gradient of one task over all parameters that adapt, as
            `torch.nn.utils.clip_grad_norm_` has it, before the decay; the derivative goes through. Default None.
        clip_value: largest size of each number of it, before `clip_norm`; default None.
        inner_steps: `K >= 0`; 0 is ordinary training on the query sets. May be set anew between calls.
        first_order: drop the second derivatives.
        loss: `"cross_entropy"` (labels int64 `[T, B]`); `"mse"`, `"binary_cross_entropy"` (of logits) or `"huber"`
            (square below 1), with targets `[T, B, O]`; or any callable `(prediction, target) -> scalar` for one task.
            `torch.nn`'s `CrossEntropyLoss` with all its settings (weights, smoothing, rows ignored, which accuracy
            leaves out too, probabilities as targets), `MSELoss`, `L1Loss`, `SmoothL1Loss`, `HuberLoss` and
            `BCEWithLogitsLoss`, and their functions, run in the fast engines. A loss that is an `nn.Module` is the
            learner's, its parameters are trained.
        engine: `"auto"`, or one by name (`explain` lists them). An engine asked for by name that cannot serve
            the model raises ValueError. `"auto"` tries what maps the model over tasks once against plain autograd;
            where they differ tasks run one after the other (`"loop"`), with a warning that names the layer.
        task_chunk: at most this many tasks at a time, to bound memory; None for all at once. The gradient is
            the same, but for rounding; it is added up in float32 at least. With gradients on, each chunk's gradient is
            then computed during `forward` and handed out by `backward`, so only `loss` is differentiable, once, and
            only with respect to the parameters; inputs may not require gradients. Tasks that run one after the other
            are such chunks, of one task, unless inputs require gradients. Random numbers that the model draws, as in
            dropout, are drawn chunk by chunk. `"auto"`: as many as half of the free memory has room for, found by
            trying more and more in the first chunks; where memory runs out, half as many, and the same tasks again.
            Where inputs require gradients it is None.
        memory: `"graph"` keeps a graph of all inner steps until `backward`. `"sweep"` keeps every step's weights alone:
            the gradient is found during `forward`, by going back through the steps with the graph of one at a time
            (`fastmeta/functional/reverse_sweep.py`). The same gradient, in more time and with the memory of one
            step. As with `task_chunk`, only `loss` is differentiable, and once; with respect to whatever requires
            gradients. The model runs each step twice and has to do the same (random numbers of torch's own generators
            are drawn alike), or RuntimeError is raised. Kernels sweep in any case; engines that keep a graph are passed
            over (asked for by name, ValueError). What `adapt` returns has its graph as ever. Query rows whose
            activations are more than 64 MB (on a GPU 1 GB) go through the model for some tasks after the other.
            `"auto"`, the default, sweeps where the engine runs the module itself, in second order, and the activations
            in a graph over two steps or more would take 512 MB (on a GPU 1 GB) and more than those of the query rows
            (`explain` says so), which one run of the model on a task's support rows tells, once for a size; unless the
            batch or `weights` require gradients, under transforms of `torch.func`, and with a model that does not do
            the same twice. What comes of it can be differentiated as with a graph: for more than the gradients of
            `loss` the tasks run again with one.
        every: with `"sweep"`, keeps the weights before each `every`-th step alone, and takes the steps between once
            more. Default 1.

    Evaluate under `torch.no_grad()`: adaptation still happens, without any graph for the outer loop. Batch
    norm uses each task's own rows in train mode; what it does in eval mode is said in
    `fastmeta/engines/vmap.py`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: InnerLR = 0.01,
        inner_steps: int = 1,
        learn_inner_lr: bool = False,
        inner_optimizer: str = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        amsgrad: bool = False,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        first_order: bool = False,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        engine: str = "auto",
        task_chunk: int | str | None = None,
        memory: str = "auto",
        every: int = 1,
    ):
        check_name(engine)
        super().__init__(
            model, inner_steps=inner_steps, loss=loss, first_order=first_order, task_chunk=task_chunk, memory=memory,
            every=every,
        )  # fmt: skip
        self.inner_lr = as_inner_lr(model, inner_lr, learn_inner_lr, inner_steps)
        self.rule = as_rule(momentum, weight_decay, clip_norm, clip_value, inner_optimizer, betas, eps, amsgrad)
        if self.rule.adam is not None and memory == "sweep":
            raise ValueError(
                f"memory='sweep' goes back through steps of SGD: with inner_optimizer={inner_optimizer!r} take 'graph'"
            )
        rates_of(self.inner_lr, self._adapting())  # raises for what has no rate
        self.engine = engine
        self._direct: DirectGradient | None = None  # the last one, for the next call

    def gradients(
        self, batch: TaskBatch, weights: Tensor | None = None
    ) -> tuple[MetaOutput, dict[str, Tensor]]:
        """What `forward` returns, detached, and the gradient of its loss: `{name: gradient}` for every parameter of
        `named_parameters()` that requires one. Equal to `torch.autograd.grad` of the loss, and for few small tasks much
        faster: where a kernel finds both at once no graph is made. Nothing is added to `parameter.grad`.

        Raises:
            ValueError: as `forward`; with `task_chunk` inputs may not require gradients.
        """
        batch = TaskBatch.of(batch)
        if self.task_chunk is not None and len(batch) == 4 and plain_call(batch):
            self._check_batch(batch)
            check_weights(weights, batch)
            with torch.enable_grad():
                chunks = self._in_chunks(batch, weights)
            if chunks and not any(part is not None and requires_grad(part) for part in (*batch, weights)):
                return self._gradients_in_chunks(batch, weights)
        return self._gradients(batch, weights, self)

    def _gradients_in_chunks(
        self, batch: TaskBatch, weights: Tensor | None
    ) -> tuple[MetaOutput, dict[str, Tensor]]:
        wanted = {name: p for name, p in self.named_parameters() if p.requires_grad}

        def of_chunk(*parts: Tensor | None) -> tuple[MetaOutput, list[Tensor]]:
            chunk, own = TaskBatch(*parts[:4]), parts[4]
            output, found = self._gradients(chunk, own, lambda chunk, own: self._tasks(*chunk, own))
            return output, [found[name] for name in wanted]

        try:
            with torch.enable_grad():
                output, found = self._added_up(of_chunk, batch, weights, self.task_chunk, list(wanted.values()))
        except Exception as error:
            self._raise_misfit_of_batch(error, batch)
            raise
        return output, dict(zip(wanted, found, strict=True))

    def _gradients(
        self, batch: TaskBatch, weights: Tensor | None, run: Callable[..., MetaOutput]
    ) -> tuple[MetaOutput, dict[str, Tensor]]:
        """`gradients` without chunks; `run(batch, weights)` is `forward`."""
        if len(batch) == 4 and plain_call(batch) and not any(t.requires_grad for t in batch):
            inner = self._inner(batch[1], batch[3])
            direct = self._direct  # another thread may leave its own there meanwhile
            if direct is None or not direct.holds(self.model, inner, batch):
                self._check_batch(batch)
                try:
                    with inspected(self.model):
                        direct = direct_gradient(self.engine, self.model, inner, batch, "model.")
                except Exception as error:
                    self._raise_misfit_of_batch(error, batch)
                    raise
                self._direct = direct
            if direct is not None:
                check_weights(weights, batch)
                return direct.run(batch, weights)
        with torch.enable_grad():
            output = run(batch, weights)
        wanted = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if not output.loss.requires_grad:  # it depends on none of them
            return output, {name: torch.zeros_like(p) for name, p in wanted.items()}
        found = torch.autograd.grad(output.loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
        return detached(output), dict(zip(wanted, found, strict=True))

    def explain(self, batch: TaskBatch) -> str:
        """Which engine serves this batch and why the others do not, as readable text. Runs nothing, but for one task
        where it has to be seen whether `torch.func` can follow the model. Tasks with masks run in groups with the same
        numbers of rows: it is of the first."""
        batch = TaskBatch.of(batch)
        if not self._check_batch(batch):
            return self._explained(batch)
        groups = groups_of_batch(batch)
        text = self._explained(TaskBatch(*dense_batch(batch, *groups[0])))
        inner = self._inner(batch.support_y, batch.query_y)
        if self._masks_in_kernels(inner, batch.support_x) and not self._in_chunks(batch):
            return f"{text}\nmasks: the kernels leave out rows, all tasks run together"
        return f"{text}\nmasks: {len(groups)} groups of tasks with the same numbers of rows, this is of the first"

    def _explained(self, batch: TaskBatch) -> str:
        try:
            inner = self._inner(batch[1], batch[3])
            text = explain(self.engine, self.model, inner, batch[0], batch[1])
            engine = self._engine(inner, batch[0], batch[1])
            if self._sweeps_of_itself(engine, self.model, inner, batch[:4], None):
                text += "\nmemory 'auto': no graph over the steps, as large as it would be beside the query rows'"
            return text
        except Exception as error:
            self._raise_misfit_of_batch(error, batch)
            raise

    def _masked(self, batch: TaskBatch, weights: Tensor | None) -> MetaOutput:
        support_mask, query_mask = masks = batch.support_mask, batch.query_mask
        support_y, query_y = without_padding(batch.support_y, support_mask), without_padding(batch.query_y, query_mask)
        inner = self._inner(support_y, query_y)
        with inspected(self.model):
            in_chunks = self.task_chunk != AUTO and self._in_chunks(batch, weights)  # kernels need little memory
            if in_chunks or not self._masks_in_kernels(inner, batch.support_x):
                return super()._masked(batch, weights)
            loop, slow = FusedEngine().loop(self.model, inner)
            support_x = without_padding(batch.support_x, support_mask)
            query_x = without_padding(batch.query_x, query_mask)
            found, mean = loop.meta_loss(slow, support_x, support_y, query_x, query_y, weights, masks)
        output = judged(inner.loss, found.logits, query_y, found.loss, mean, query_mask)
        return output._replace(logits=without_padding(output.logits, query_mask))

    def _masks_in_kernels(self, inner: InnerLoop, x: Tensor) -> bool:
        """Whether the fused inner loops serve this, and leave out rows: trajectories are made of several."""
        fused = FusedEngine()
        if self.engine not in ("auto", fused.name) or fused.why_not(self.model, inner, x) is not None:
            return False
        wanted = self.engine == fused.name or fused.why_slow(self.model, inner, x) is None
        return wanted and inner.loss.in_kernels != "maximum_entropy"

    def extra_repr(self) -> str:
        return f"engine={self.engine!r}, inner_lr={described(self.inner_lr)}, {super().extra_repr()}"

    def _adapted(self, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        return self._engine(inner, support_x, support_y).adapt(self.model, inner, support_x, support_y)

    def _tasks(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, weights: Tensor | None
    ) -> MetaOutput:
        inner = self._inner(support_y, query_y)
        with inspected(self.model):
            engine = self._engine(inner, support_x, support_y)
            if isinstance(engine, FusedEngine):
                loop, slow = engine.loop(self.model, inner)
                (task_loss, logits), mean = loop.meta_loss(slow, support_x, support_y, query_x, query_y, weights)
                return judged(inner.loss, logits, query_y, task_loss, mean)
            batch = support_x, support_y, query_x, query_y
            return self._queried(engine, self.model, inner, batch, weights)

    def _engine(self, inner: InnerLoop, x: Tensor, y: Tensor | None = None) -> Engine:
        return choose(self.engine, self.model, inner, x, y)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_direct": None}  # a copy has memory of its own

    def _inner(self, *targets: Tensor) -> InnerLoop:
        lr = self.inner_lr
        return super()._inner(*targets, lr=lr if isinstance(lr, float) else rates_of(lr, self._adapting()))

    def _adapting(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad]
