"""Stands in for higher 0.2.1: `from fastmeta.compat import higher`.

Differentiable inner loops with unchanged modules and torch's optimisers: `innerloop_ctx` gives a copy of the module
whose weights are fast weights, and an optimiser whose `step(loss)` replaces them by new ones that remember where they
came from.

Names, signatures, defaults, errors and numbers are those of higher. It differs in this:
 - Where an average of squared gradients is 0, the second and further derivatives of Adam, AdamW, Adagrad and RMSprop
   are the analytic limit; higher gives NaN there. Its warning that the gradients of RMSprop are not correct is gone.
 - `maximize` and `decoupled_weight_decay`, which torch's optimisers have since, are followed; higher ignores them.
 - Steps are counted in Python, so that a bias correction has the precision of a float also where the optimiser that is
   continued counts in a float32 tensor.
 - A module that is reached in two ways is one module in the copy too: batch norm counts in one place.

As in higher, a hyper-parameter that is 0 switches its term off also where it is a tensor (its gradient is None), and
the bias correction of the second moment and the decay of ASGD's rate count as numbers: what `override` learns for
`betas[1]`, `lambd` and `alpha` leaves these out. `fastmeta.functional.adam_step` and `sgd_step` are differentiable in
all of theirs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from . import optim, patch, utils
from .optim import create_diff_optim, get_diff_optim, register_optim
from .patch import monkeypatch

__version__ = "0.2.1"
__all__ = [
    "create_diff_optim",
    "get_diff_optim",
    "innerloop_ctx",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "utils",
]


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    override: dict | None = None,
    track_higher_grads: bool = True,
) -> Iterator[tuple[nn.Module, optim.DifferentiableOptimizer]]:
    """A functional copy of `model` and a differentiable `opt` for it.

    Args:
        model: any module.
        opt: an optimiser of torch, or of a class given to `register_optim`, over parameters of `model`. Its
            hyper-parameters and state are where the inner loop starts; neither it nor `model` changes.
        device: where fast weights, buffers and state go. Default: where they are.
        copy_initial_weights: whether the initial weights are detached copies. False for what learns them, as MAML.
        override: hyper-parameters by name, each a list of one value, or one per parameter group. They may be tensors
            that require gradients.
        track_higher_grads: False forgets the graph after each step: first order, and for evaluation.
    """
    fmodel = monkeypatch(model, device, copy_initial_weights, track_higher_grads)
    diffopt = get_diff_optim(
        opt,
        model.parameters(),
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
    )
    yield fmodel, diffopt
