"""Weights of an encoder that was trained before: into a run's backbone, or as a module of its own."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from .. import values
from ..nn import conv4, mlp
from .checkpoint import CheckpointFolder

# what stands before an encoder's own names in a checkpoint of fastmeta (embedding learners, inner loops)
_PREFIXES = ("model/encoder.", "model/model.")
_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


def read_encoder(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by their names in `fastmeta.nn`'s networks, without a classifier's last layer.

    A checkpoint of fastmeta (`step-N.safetensors`, or a run's folder, of which the best is taken) gives those of its
    encoder.

    Raises:
        ValueError: no such file, none of safetensors, one without tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(values.path("encoder", path))
    if not path.exists():
        raise ValueError(f"encoder {path}: no such file")
    try:
        tensors = CheckpointFolder(path).best().tensors if path.is_dir() else load_file(path)
    except SafetensorError as error:
        raise ValueError(f"encoder {path}: not a safetensors file ({error})") from error
    for prefix in _PREFIXES:
        own = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
        if own:
            return without_head(own) if prefix == "model/model." else own
    if not tensors:
        raise ValueError(f"encoder {path}: holds no tensors")
    return {name: t for name, t in tensors.items() if not name.startswith("classifier.")}


def without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A classifier's weights but for its last layer: `classifier` of `conv4`, the last number of `mlp`."""
    numbers = [int(name.partition(".")[0]) for name in state if name.partition(".")[0].isdecimal()]
    head = f"{max(numbers)}." if numbers else "classifier."
    return {name: t for name, t in state.items() if not name.startswith(head)}


def backbone(learner: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module of a learner that holds its encoder, and that encoder's weights by name: `encoder`, or of a learner
    whose whole model adapts `model` but for its last layer. Raises ValueError where there is none."""
    if isinstance(getattr(learner, "encoder", None), nn.Module):
        module, own = learner.encoder, learner.encoder.state_dict()
    elif isinstance(getattr(learner, "model", None), nn.Sequential):
        module = learner.model
        own = without_head(module.state_dict())
    else:
        module, own = learner, {}
    if not own:
        raise ValueError(f"{type(learner).__name__} has no encoder with weights here: leave encoder out")
    return module, own


def load_encoder(learner: nn.Module, path: str | Path) -> None:
    """Copy the weights of a file into the learner's backbone. A classifier's last layer is left as it is.

    Raises:
        ValueError: names that are missing or that the backbone does not have, shapes that differ; each by name. Running
            statistics of norms that have none here are passed over.
    """
    module, own = backbone(learner)
    given = read_encoder(path)
    rest = {name: t for name, t in module.state_dict().items() if name not in own}
    try:
        found = module.load_state_dict({**rest, **given}, strict=False)
    except RuntimeError as error:
        wrong = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise ValueError(f"encoder {path}: does not fit the backbone: {wrong}") from error
    unexpected = [n for n in found.unexpected_keys if not n.endswith(_STATISTICS) and not n.startswith("classifier.")]
    for what, names in (("lacks", found.missing_keys), ("has, and the backbone does not,", unexpected)):
        if names:
            raise ValueError(f"encoder {path}: {what} {', '.join(names)}")


def freeze_encoder(learner: nn.Module) -> None:
    """No gradients for the backbone's weights."""
    module, own = backbone(learner)
    for name, parameter in module.named_parameters():
        if name in own:
            parameter.requires_grad_(False)


def encoder_of(learner: nn.Module) -> nn.Module:
    """A learner's encoder as a module from examples `[B, ...]` to embeddings `[B, D]`: a classifier without its last
    layer."""
    module, own = backbone(learner)
    if module is getattr(learner, "encoder", None):
        return module
    head = next(reversed(module._modules))
    return nn.Sequential(OrderedDict((name, child) for name, child in module.named_children() if name != head))


def encoder_from(path: str | Path) -> tuple[nn.Module, int]:
    """The `conv4` or `mlp` that a file holds the weights of, in eval mode, and its input channels or width.

    Raises:
        ValueError: names that are of neither.
    """
    state = read_encoder(path)
    first = next((state[name] for name in ("encoder.0.0.weight", "0.weight") if name in state), None)
    if first is not None and first.dim() == 4:
        module = conv4(first.shape[1], first.shape[0])
    else:
        layers = sorted((int(m[1]), t) for n, t in state.items() if (m := re.fullmatch(r"(\d+)\.weight", n)))
        sizes = [t for _, t in layers if t.dim() == 2]
        if not sizes:
            raise ValueError(
                f"encoder {path}: holds neither a conv4 nor an mlp of fastmeta.nn, its names are "
                f"{', '.join(sorted(state)[:4])}, ...: give a run's folder, or embed with its own code"
            )
        norm = "none" if len(sizes) == len(layers) else "batch" if "2.running_mean" in state else "layer"
        module = mlp([sizes[0].shape[1], *(t.shape[0] for t in sizes)], norm=norm)
    holder = nn.Module()
    holder.encoder = module
    load_encoder(holder, path)
    return module.eval(), first.shape[1] if first is not None else sizes[0].shape[1]
