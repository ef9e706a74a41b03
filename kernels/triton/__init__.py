"""Triton kernels, one file per op: what runs where the compiled extension is absent, and readable where it is not.

`fastmeta.kernels.<op>` holds `<op>(...)` and its gradients, `<op>_bwd(...)` and the like. They take contiguous tensors
of one floating dtype on one device: CUDA, or the CPU under `TRITON_INTERPRET=1`, which is read when this package is
imported. Nothing is checked here; `why_not` says what cannot be served.
"""

from __future__ import annotations

import importlib

from torch import Tensor

from fastmeta.kernels._common import DTYPES, INNER_LOOP_DTYPES, MAX_PROGRAMS
from fastmeta.kernels.conv import images

OPS = (
    "fast_weight_update", "class_prototypes", "pairwise_distance", "prototypical_loss", "functional_mlp",
    "contrastive_loss", "adapt_mlp", "meta_loss_mlp", "task_conv2d", "norm_act_pool", "optimizer_steps",
)  # fmt: skip
FILES = {"norm_moments": "norm_act_pool", "sgd_step": "optimizer_steps", "adam_step": "optimizer_steps"}  # of some ops
INNER_LOOPS = ("adapt_mlp", "meta_loss_mlp")
IMAGES = ("task_conv2d", "norm_act_pool")


def _tensors(args):
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from arg


def why_not(op_name: str, *args) -> str | None:
    """Why the kernels cannot serve the call `op_name(*args)`, as a sentence; None if they can."""
    name = op_name.split("_bwd")[0]
    name = FILES.get(name, name)
    if name not in OPS:
        return f"there is no kernel for {op_name}"
    dtypes = INNER_LOOP_DTYPES if name in INNER_LOOPS else DTYPES
    for t in _tensors(args):
        if t.is_floating_point() and t.dtype not in dtypes:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            return f"dtype {str(t.dtype).removeprefix('torch.')} is not one of {allowed}"
    if name in INNER_LOOPS:
        if any(arg is None for arg in args):  # an engine asks before it knows them all
            return None
        module = importlib.import_module(f"fastmeta.kernels.{name}")
        return (module.why_not if name == op_name else module.why_not_bwd)(*args)
    if name in IMAGES:
        return images.why_not(op_name, list(_tensors(args)), args)
    programs = _programs_at_most(op_name, args)
    if programs > MAX_PROGRAMS:
        return f"{programs} programs > {MAX_PROGRAMS} of a grid"
    return None


def _programs_at_most(op_name: str, args) -> int:
    """No grid is larger: a tile has sides of 8 at least, or covers its dimension."""
    tensors = list(_tensors(args))
    tasks = max((t.shape[0] for t in tensors), default=0)
    if op_name.startswith(("fast_weight_update", "sgd_step", "adam_step")):
        return max(tasks, *(tasks * t.shape[1] // 8 for t in tensors))
    matrices = [t for t in tensors if t.dim() == 3]
    rows = [t.shape[1] for t in matrices] + [arg for arg in args if isinstance(arg, int)]  # the number of classes
    columns = [t.shape[2] for t in matrices]
    if not op_name.startswith(("class_prototypes", "prototypical_loss")):
        columns += [t.shape[1] for t in matrices[1:]]  # a result has rows by rows
    return tasks * -(-max(rows) // 8) * -(-max(columns) // 8)
