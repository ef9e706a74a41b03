"""The ops, as functions: drop-in parts for any PyTorch meta-learning code.

Each runs on the fastest backend that can serve its call (C++ on the CPU, CUDA or Triton on the GPU, plain PyTorch
elsewhere), is differentiable twice and more, and works under `torch.func`, `torch.compile` and autocast. Tensors may
have any strides; float32 and float64 run natively everywhere, float16 and bfloat16 on GPU kernels with float32 sums.

Sizes: T tasks, S support rows, Q query rows, N classes ("way"), D embedding width; B rows, C channels of H x W pixels.
"""

from .blocks import norm_act_pool
from .convolutions import task_conv1d, task_conv2d
from .embeddings import class_prototypes, contrastive_loss, pairwise_distance, prototypical_loss
from .inner_loops import adapt_mlp, meta_loss_mlp
from .meta_gradient import meta_gradient, meta_loss
from .mlp import functional_mlp
from .optimizer_steps import adam_step, sgd_step
from .run_again import functional_call
from .updates import fast_weight_update

__all__ = [
    "adam_step",
    "adapt_mlp",
    "class_prototypes",
    "contrastive_loss",
    "fast_weight_update",
    "functional_call",
    "functional_mlp",
    "meta_gradient",
    "meta_loss",
    "meta_loss_mlp",
    "norm_act_pool",
    "pairwise_distance",
    "prototypical_loss",
    "sgd_step",
    "task_conv1d",
    "task_conv2d",
]
