"""The same in JAX, for an `nn.Sequential` of Conv4's layers: channels last, and weights in torch's layout."""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read on import: the GPU's memory is shared with torch

import jax
import jax.numpy as jnp
import torch
from torch import Tensor, nn

from ..measure import Contender
from .problem import Problem, in_one_row

LAYOUT = ("NHWC", "OIHW", "NHWC")


def _forward(model: nn.Sequential, params: list[jax.Array], x: jax.Array) -> jax.Array:
    params = iter(params)
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            pads = [(pad, pad) for pad in layer.padding]
            weight, bias = next(params), next(params)
            x = jax.lax.conv_general_dilated(x, weight, layer.stride, pads, dimension_numbers=LAYOUT) + bias
        elif isinstance(layer, nn.BatchNorm2d):
            weight, bias = next(params), next(params)
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            x = (x - mean) * (jax.lax.rsqrt(var + layer.eps) * weight) + bias
        elif isinstance(layer, nn.MaxPool2d):
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        elif isinstance(layer, nn.ReLU):
            x = jax.nn.relu(x)
        elif isinstance(layer, nn.Flatten):
            x = jnp.moveaxis(x, 3, 1).reshape(len(x), -1)
        else:
            weight, bias = next(params), next(params)
            x = x @ weight.T + bias
    return x


def maml(problem: Problem, mapped: bool) -> Contender:
    """`jit(grad(...))` over the tasks by `vmap`, or by `lax.map`: one after the other in one program."""
    device = jax.devices("gpu" if problem.batch.support_x.is_cuda else "cpu")[0]
    wide = problem.batch.support_x.dtype == torch.float64

    def precision():  # double precision is a setting in JAX; and float32 as torch has it, for a GPU's default is TF32
        settings = contextlib.ExitStack()
        settings.enter_context(jax.enable_x64(wide))
        settings.enter_context(jax.default_matmul_precision("highest"))
        return settings

    def array(t: Tensor) -> jax.Array:
        return jax.device_put(t.detach().cpu().contiguous().numpy(), device)

    layers = in_one_row(problem.model)

    def loss(params, x, y):
        logits = jax.nn.log_softmax(_forward(layers, params, x))
        return -jnp.mean(jnp.take_along_axis(logits, y[:, None], 1))

    def task(params, support_x, support_y, query_x, query_y):
        for _ in range(problem.steps):
            grads = jax.grad(loss)(params, support_x, support_y)
            params = [p - problem.lr * g for p, g in zip(params, grads, strict=True)]
        return loss(params, query_x, query_y)

    def meta_loss(params, *tasks):
        if mapped:
            return jnp.mean(jax.vmap(task, in_axes=(None, 0, 0, 0, 0))(params, *tasks))
        return jnp.mean(jax.lax.map(lambda one: task(params, *one), tasks))

    with precision():
        params = [array(p) for p in problem.model.parameters()]
        images = [part.movedim(2, -1) for part in (problem.batch.support_x, problem.batch.query_x)]
        data = [array(t) for t in (images[0], problem.batch.support_y, images[1], problem.batch.query_y)]
    run = jax.jit(jax.grad(meta_loss))

    def contender():
        with precision():
            return run(params, *data)

    return contender
