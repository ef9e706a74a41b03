"""Layers that take their parameters as an argument: `layer(x, params=None)`.

`params` is a dict of tensors by name; a layer of torch that it is derived from says the names. A bias that is not in
it is not added. Beyond torchmeta a parameter may have a task dimension in front, `[T, ...]`; then the input has one
too, `[T, B, ...]`, or where the layer says so is shared by the tasks, and so has the output.
"""

from fastmeta.compat.torchmeta.modules.activation import MetaMultiheadAttention
from fastmeta.compat.torchmeta.modules.batchnorm import MetaBatchNorm1d, MetaBatchNorm2d, MetaBatchNorm3d
from fastmeta.compat.torchmeta.modules.container import MetaSequential
from fastmeta.compat.torchmeta.modules.conv import MetaConv1d, MetaConv2d, MetaConv3d
from fastmeta.compat.torchmeta.modules.linear import MetaBilinear, MetaLinear
from fastmeta.compat.torchmeta.modules.module import MetaModule
from fastmeta.compat.torchmeta.modules.normalization import MetaLayerNorm
from fastmeta.compat.torchmeta.modules.parallel import DataParallel
from fastmeta.compat.torchmeta.modules.sparse import MetaEmbedding, MetaEmbeddingBag
from fastmeta.compat.torchmeta.modules.utils import get_subdict

__all__ = [
    "DataParallel",
    "MetaBatchNorm1d",
    "MetaBatchNorm2d",
    "MetaBatchNorm3d",
    "MetaBilinear",
    "MetaConv1d",
    "MetaConv2d",
    "MetaConv3d",
    "MetaEmbedding",
    "MetaEmbeddingBag",
    "MetaLayerNorm",
    "MetaLinear",
    "MetaModule",
    "MetaMultiheadAttention",
    "MetaSequential",
    "get_subdict",
]
