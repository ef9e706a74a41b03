"""Gradient-based meta-learning with a learned transform between gradient and step."""

from __future__ import annotations

from torch import Tensor, nn

from fastmeta.functional.second_order import differentiate

from .._attention import called
from ..optim.parameter_update import ParameterUpdate
from ..optim.update_rules.differentiable_sgd import DifferentiableSGD
from ..utils import clone_module


class GBML(nn.Module):
    """`clone()` and `adapt(loss)` around any module, whose step is `-lr` times what a transform makes of a gradient.

    Args:
        module: the module; its parameters are the learner's, under `module.`.
        transform: a callable from a parameter to the module that transforms its gradients, or to None; as
            `optim.transforms` has them. The modules' parameters are the learner's, under `compute_update.`.
        lr: step size; 1.0 by default.
        adapt_transform: whether `adapt` takes a step on the transforms' parameters as well, from its second call on;
            False by default.
        first_order, allow_unused, allow_nograd: as in `MAML`, False by default.
        compute_update: the `optim.ParameterUpdate` to use in place of a new one.
    """

    def __init__(
        self,
        module: nn.Module,
        transform,
        lr: float = 1.0,
        adapt_transform: bool = False,
        first_order: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        **kwargs,
    ):
        super().__init__()
        self.module = module
        self.transform = transform
        self.adapt_transform = adapt_transform
        self.lr = lr
        self.first_order = first_order
        self.allow_unused = allow_unused
        self.allow_nograd = allow_nograd
        if "compute_update" in kwargs:
            self.compute_update = kwargs["compute_update"]
        else:
            self.compute_update = ParameterUpdate(self.module.parameters(), transform)
        self.diff_sgd = DifferentiableSGD(lr=lr)
        self._params_updated = False  # whether a loss can depend on the transforms

    def forward(self, *args, **kwargs):
        return called(self.module, args, kwargs, second_order=not self.first_order or self.adapt_transform)

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        adapt_transform: bool | None = None,
    ) -> GBML:
        """A `GBML` around clones of module and transforms, in the graph. Arguments that are None are the learner's."""
        return GBML(
            module=clone_module(self.module),
            transform=self.transform,
            lr=self.lr,
            adapt_transform=self.adapt_transform if adapt_transform is None else adapt_transform,
            first_order=self.first_order if first_order is None else first_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
            compute_update=clone_module(self.compute_update),
        )

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_nograd: bool | None = None,
        allow_unused: bool | None = None,
    ) -> None:
        """One step on `loss`, first of the transforms' parameters where `adapt_transform` says so and a step has been
        taken before, then of the module's. Arguments that are None are the learner's own."""
        second_order = not (self.first_order if first_order is None else first_order)
        allow_unused = self.allow_unused if allow_unused is None else allow_unused
        if self.adapt_transform and self._params_updated:
            gradients = differentiate(
                loss,
                list(self.compute_update.parameters()),
                create_graph=second_order,
                retain_graph=True,  # the module's gradients are taken of the same loss
                allow_unused=allow_unused,
            )
            self.diff_sgd(self.compute_update, gradients)
        updates = self.compute_update(
            loss,
            self.module.parameters(),
            create_graph=second_order or self.adapt_transform,
            retain_graph=second_order or self.adapt_transform,
            allow_unused=allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
        )
        self.diff_sgd(self.module, updates)
        self._params_updated = True
