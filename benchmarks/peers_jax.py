"""The MAML meta-gradient in JAX, `jit(grad(mean(vmap(...))))`: how a JAX user has it. Needs jax (requirements.txt)."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read on import: the GPU's memory is shared with torch

import jax
import jax.numpy as jnp
from torch import Tensor, nn


def maml(model: nn.Sequential, regression: bool, batch: tuple[Tensor, ...], lr: float, steps: int) -> Callable:
    """A function without arguments that returns the meta-gradients, weight before bias, layer after layer."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    device = jax.devices("gpu" if batch[0].is_cuda else "cpu")[0]

    def array(t: Tensor) -> jax.Array:
        return jax.device_put(t.detach().cpu().numpy(), device)

    params = [(array(layer.weight), array(layer.bias)) for layer in layers]
    data = tuple(array(t) for t in batch)

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
        with jax.default_matmul_precision("highest"):  # float32 as torch has it: a GPU's default is TF32
            gradients = run(params, data)
        return [part for layer in gradients for part in layer]

    return contender
