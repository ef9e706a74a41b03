"""The MAML meta-gradient in JAX, `jit(grad(mean(vmap(...))))`: how a JAX user has it. Needs jax (requirements.txt)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from torch import Tensor, nn


def maml(model: nn.Sequential, regression: bool, batch: tuple[Tensor, ...], lr: float, steps: int) -> Callable:
    """A function without arguments that returns the meta-gradients, weight before bias, layer after layer."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    params = [
        (jnp.asarray(layer.weight.detach().numpy()), jnp.asarray(layer.bias.detach().numpy())) for layer in layers
    ]
    data = tuple(jnp.asarray(t.numpy()) for t in batch)

    def loss(params, x, y):
        for i, (weight, bias) in enumerate(params):
            x = x @ weight.T + bias
            x = jax.nn.relu(x) if i < len(params) - 1 else x
        if regression:
            return jnp.mean((x - y) ** 2)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1))

    def task(params, support_x, support_y, query_x, query_y):
        for _ in range(steps):
            gradients = jax.grad(loss)(params, support_x, support_y)
            params = jax.tree.map(lambda p, g: p - lr * g, params, gradients)
        return loss(params, query_x, query_y)

    def meta_loss(params, data):
        return jnp.mean(jax.vmap(task, in_axes=(None, 0, 0, 0, 0))(params, *data))

    run = jax.jit(jax.grad(meta_loss))

    def contender():
        gradients = jax.block_until_ready(run(params, data))
        return [part for layer in gradients for part in layer]

    return contender
