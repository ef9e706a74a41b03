"""FEAT (Ye et al. 2020, "Few-Shot Learning via Embedding Adaptation With Set-to-Set Functions")."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fastmeta.compat.easyfsl.methods.prototypical_networks import PrototypicalNetworks
from fastmeta.compat.easyfsl.methods.utils import strip_prefix
from fastmeta.compat.easyfsl.modules.attention_modules import MultiHeadAttention
from fastmeta.compat.easyfsl.modules.feat_resnet12 import feat_resnet12


class FEAT(PrototypicalNetworks):
    """`PrototypicalNetworks` whose prototypes go through an attention module together.

    Args:
        attention_module: three times `[1, C, D]` -> a tuple of which the first is `[1, C, D]`.
    """

    def __init__(self, *args, attention_module: nn.Module, **kwargs):
        super().__init__(*args, **kwargs)
        self.attention_module = attention_module

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        super().process_support_set(support_images, support_labels)
        prototypes = self.prototypes.unsqueeze(0)
        self.prototypes = self.attention_module(prototypes, prototypes, prototypes)[0][0]

    @classmethod
    def from_resnet12_checkpoint(
        cls,
        checkpoint_path: Path | str,
        device: torch.device | str = "cpu",
        feature_dimension: int = 640,
        use_backbone: bool = True,
        **kwargs,
    ) -> FEAT:
        """With the weights of a checkpoint of the authors.

        Args:
            checkpoint_path: a file of torch that holds `params`, those of `encoder.` and of `slf_attn.`.
            device: of the model (default "cpu").
            feature_dimension: D (default 640).
            use_backbone: with their network (default), else for embeddings that are there already.
            kwargs: of `FEAT`.

        Raises:
            ValueError: the checkpoint lacks weights.
        """
        weights = torch.load(str(checkpoint_path), map_location=device)["params"]
        backbone = feat_resnet12() if use_backbone else nn.Identity()
        attention_module = MultiHeadAttention(1, feature_dimension, feature_dimension, feature_dimension)
        for part, prefix in ((backbone, "encoder."), (attention_module, "slf_attn.")):
            missing, _ = part.load_state_dict(strip_prefix(weights, prefix), strict=False)
            if missing:
                raise ValueError(f"{checkpoint_path} lacks the weights {missing} of {prefix}")
        return cls(backbone, attention_module=attention_module, **kwargs).to(device)
