"""Stands in for TorchOpt 0.7.3: `from fastmeta.compat import torchopt`.

Differentiable optimisers that step a module in place of its parameters (`MetaSGD`, `MetaAdam`, `MetaAdamW`,
`MetaRMSProp`), states out and back, optimisers as functions, implicit gradients, and estimates of gradients.

Names, signatures, defaults, errors and numbers are those of TorchOpt. It differs in this:
 - Where an average of squared gradients is 0, derivatives through the root are the analytic limit. TorchOpt gives NaN
   there, and with `use_accelerated_op` 0.
 - `use_accelerated_op=True` runs the same operations as without.
 - `update(..., inplace=True)` leaves the gradients that it is given as they are, but for `nan_to_num`.
 - A rate or a weight decay may be a tensor, and is learned then.
 - A second derivative of an implicit gradient is refused; TorchOpt gives one that leaves terms out.
 - The estimate "forward" of `diff.zero_order` is a difference divided by `sigma`; TorchOpt multiplies, and takes each
   difference to the one before.
 - Trees are those of torch.utils._pytree, so that optree is not needed.
"""

from . import (
    accelerated_op,
    alias,
    base,
    clip,
    combine,
    diff,
    distributed,
    hook,
    linalg,
    linear_solve,
    nn,
    optim,
    pytree,
    schedule,
    transform,
    typing,
    update,
    utils,
    visual,
)
from .accelerated_op import is_available as accelerated_op_available
from .alias import adadelta, adagrad, adam, adamax, adamw, radam, rmsprop, sgd
from .clip import clip_grad_norm
from .combine import chain
from .hook import register_hook
from .optim import (
    SGD,
    AdaDelta,
    Adadelta,
    AdaGrad,
    Adagrad,
    Adam,
    AdaMax,
    Adamax,
    AdamW,
    FuncOptimizer,
    Optimizer,
    RAdam,
    RMSProp,
    RMSprop,
)
from .optim.meta import (
    MetaAdaDelta,
    MetaAdadelta,
    MetaAdaGrad,
    MetaAdagrad,
    MetaAdam,
    MetaAdaMax,
    MetaAdamax,
    MetaAdamW,
    MetaOptimizer,
    MetaRAdam,
    MetaRMSProp,
    MetaRMSprop,
    MetaSGD,
)
from .transform import nan_to_num
from .update import apply_updates
from .utils import extract_state_dict, module_clone, module_detach_, recover_state_dict, stop_gradient
from .version import __version__ as __version__

__all__ = [
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FuncOptimizer",
    "MetaAdaDelta",
    "MetaAdaGrad",
    "MetaAdaMax",
    "MetaAdadelta",
    "MetaAdagrad",
    "MetaAdam",
    "MetaAdamW",
    "MetaAdamax",
    "MetaOptimizer",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaRMSprop",
    "MetaSGD",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "RMSprop",
    "SGD",
    "accelerated_op",
    "accelerated_op_available",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "alias",
    "apply_updates",
    "base",
    "chain",
    "clip",
    "clip_grad_norm",
    "combine",
    "diff",
    "distributed",
    "extract_state_dict",
    "hook",
    "linalg",
    "linear_solve",
    "module_clone",
    "module_detach_",
    "nan_to_num",
    "nn",
    "optim",
    "pytree",
    "radam",
    "recover_state_dict",
    "register_hook",
    "rmsprop",
    "schedule",
    "sgd",
    "stop_gradient",
    "transform",
    "typing",
    "update",
    "utils",
    "visual",
]
