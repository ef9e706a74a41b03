"""The ops, one file each: formula, schema, reference, fake, gradient, and inputs for tests and benchmarks."""

from fastmeta.ops import (  # noqa: F401  (importing an op registers it)
    class_prototypes,
    fast_weight_update,
    functional_mlp,
    pairwise_distance,
    prototypical_loss,
)
