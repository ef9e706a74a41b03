"""Linear layers with low-rank fast weights: their history of rows, and the query rows' derivatives."""

import pytest
import torch

from fastmeta.engines._linears import LowRank, QueryLinear


def test_history_grows_like_k_log_k():
    """What the graph keeps of a layer's rows: each step reads all blocks, and keeps the tensors that it read."""
    layer, kept, most = LowRank(torch.zeros(2, 3), None), {}, 0
    for _ in range(64):
        layer.append(torch.zeros(1, 5, 3), torch.zeros(1, 5, 2))
        kept.update({id(block[0]): block for block in layer.blocks})
        most = max(most, len(layer.blocks))
    assert sum(block[0].shape[1] for block in kept.values()) <= 5 * 64 * 7 and most <= 7


@pytest.mark.parametrize("bias", [True, False])
def test_a_query_layer_twice_differentiated(bias):
    def layer(x, weight, bias, inputs, deltas):
        return torch.func.vmap(QueryLinear.apply, (0, None, None, 0, 0))(x, weight, bias, inputs, deltas)

    torch.manual_seed(0)
    tensors = [torch.randn(*shape, dtype=torch.double) for shape in ((2, 4, 3), (5, 3), (5,), (2, 2, 3), (2, 2, 5))]
    if not bias:
        tensors[2] = None
    torch.testing.assert_close(
        layer(*tensors), torch.func.vmap(QueryLinear.forward, (0, None, None, 0, 0))(*tensors), rtol=1e-12, atol=1e-12
    )
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)
