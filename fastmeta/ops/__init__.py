"""The ops, one file each: formula, schema, reference, fake, gradient, and inputs for tests and benchmarks."""

from fastmeta.ops import (  # noqa: F401  (importing an op registers it)
    adapt_mlp,
    class_prototypes,
    contrastive_loss,
    fast_weight_update,
    functional_mlp,
    meta_loss_mlp,
    norm_act_pool,
    optimizer_steps,
    pairwise_distance,
    prototypical_loss,
    task_conv2d,
)
