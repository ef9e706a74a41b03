"""The network of FEAT with the weights of a checkpoint of its authors."""

from __future__ import annotations

from pathlib import Path

import torch

from fastmeta.compat.easyfsl.methods.utils import strip_prefix
from fastmeta.compat.easyfsl.modules.feat_resnet12 import FEATResNet12, feat_resnet12


def feat_resnet12_from_checkpoint(checkpoint_path: Path | str, device: torch.device | str, **kwargs) -> FEATResNet12:
    """`feat_resnet12(**kwargs)` on `device`, with the weights of `encoder.` among the `params` of a file of torch.

    Raises:
        ValueError: the checkpoint lacks weights.
    """
    weights = torch.load(str(checkpoint_path), map_location=device)["params"]
    model = feat_resnet12(**kwargs).to(device)
    missing, _ = model.load_state_dict(strip_prefix(weights, "encoder."), strict=False)
    if missing:
        raise ValueError(f"Missing keys for backbone: {missing}")
    return model
