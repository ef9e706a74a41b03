"""What every op means in plain PyTorch, one task at a time and in the most obvious way: the truth about the references.

Nothing of the package computes it. Arguments are those of the op; `TRUTH` has a function for every op of the registry,
the `_bwd` ops by autograd of the forward.
"""

import torch
import torch.nn.functional as F
from torch import nan

from fastmeta.dispatch.spec import REGISTRY

ACTIVATIONS = {
    "identity": lambda x: x, "relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu,
    "gelu": F.gelu, "sine": torch.sin,
}  # fmt: skip


def number_of_tasks(tensors) -> int:
    return next((len(t) for t in tensors if len(t) != 1), 1)


def of_task(tensor, task):
    """What the tasks share is every task's."""
    return tensor[task if len(tensor) > 1 else 0]


def stack(rows, like, *shape):
    """Of no rows too, which torch cannot stack."""
    return torch.stack(rows) if rows else like.new_zeros(0, *shape)


# embeddings ------------------------------------------------------------------------------------------


def class_prototypes(embeddings, labels, num_classes):
    tasks = []
    for rows, classes in zip(embeddings, labels, strict=True):
        absent = rows.new_zeros(rows.shape[1])
        means = [rows[classes == n].mean(0) if n in classes else absent for n in range(num_classes)]
        tasks.append(stack(means, rows, rows.shape[1]))
    return stack(tasks, embeddings, num_classes, embeddings.shape[2])


def class_prototypes_bwd(grad, labels):
    tasks = []
    for means, classes in zip(grad, labels, strict=True):
        rows = [means[n] / (classes == n).sum() for n in classes]
        tasks.append(stack(rows, means, means.shape[1]))
    return stack(tasks, grad, labels.shape[1], grad.shape[2])


def distances(query, prototypes, metric):
    """Of one query."""
    if metric == "dot":
        return -(prototypes @ query)
    if metric == "cosine":
        return 1 - F.cosine_similarity(prototypes, query.unsqueeze(0))
    difference = prototypes - query
    if metric == "manhattan":
        return difference.abs().sum(1)
    squares = difference.square().sum(1)
    if metric == "sqeuclidean":
        return squares
    # the slope of the root is infinite at 0, where the distance has its least value: there the derivative is 0
    return stack([square.sqrt() if square > 0 else torch.zeros_like(square) for square in squares], squares)


def pairwise_distance(query, prototypes, metric):
    tasks = [
        stack([distances(q, points, metric) for q in queries], query, len(points))
        for queries, points in zip(query, prototypes, strict=True)
    ]
    return stack(tasks, query, query.shape[1], prototypes.shape[1])


def prototypical_loss(support, support_labels, query, query_labels, num_classes, metric):
    prototypes = class_prototypes(support, support_labels, num_classes)
    losses, accuracies = [], []
    for table, labels in zip(pairwise_distance(query, prototypes, metric), query_labels, strict=True):
        if len(labels) == 0:
            losses.append(support.new_tensor(nan))
            accuracies.append(support.new_tensor(nan))
            continue
        losses.append(F.cross_entropy(-table, labels))
        nearest = [row.index(min(row)) for row in table.tolist()]  # of equals the first
        right = [n == label for n, label in zip(nearest, labels.tolist(), strict=True)]
        accuracies.append(support.new_tensor(sum(right) / len(right)))
    return stack(losses, support), stack(accuracies, support)


def contrastive_loss(embeddings, temperature):
    tasks = []
    for rows in embeddings:
        losses = []
        for i, row in enumerate(rows):
            others = [j for j in range(len(rows)) if j != i]
            partner = others.index((i + len(rows) // 2) % len(rows))
            scores = rows[others] @ row / temperature
            losses.append(F.cross_entropy(scores, torch.tensor(partner, device=rows.device)))
        tasks.append(torch.stack(losses).mean() if losses else rows.new_tensor(nan))
    return stack(tasks, embeddings)


# a multi-layer perceptron ----------------------------------------------------------------------------


def layers(x, weights, biases, activation):
    """The net of one task."""
    for i, weight in enumerate(weights):
        x = F.linear(x if i == 0 else ACTIVATIONS[activation](x), weight, biases[i] if biases else None)
    return x


def functional_mlp(x, weights, biases, activation):
    tasks = range(number_of_tasks([x, *weights, *biases]))
    outputs = [
        layers(of_task(x, t), [of_task(w, t) for w in weights], [of_task(b, t) for b in biases], activation)
        for t in tasks
    ]
    return stack(outputs, x, x.shape[1], weights[-1].shape[1])


def fast_weight_update(params, grads, lrs, lr):
    tasks = range(number_of_tasks([*params, *grads, *lrs]))
    updated = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        rows = [of_task(param, t) - (of_task(lrs[i], t) if lrs else lr) * of_task(grad, t) for t in tasks]
        updated.append(stack(rows, param, param.shape[1]))
    return updated


def fast_weight_update_bwd(grad_outs, grads, lrs, lr, needs):
    params = [torch.zeros_like(g) for g in grad_outs]
    return vjp(fast_weight_update, grad_outs, (params, grads, lrs, lr), (1, 2), needs)


def for_each_parameter(step, lists, numbers):
    """`step(*values)` of each parameter and task, where a value is a tensor of `lists` or what `numbers` has for it;
    a list of tensors for each of its results."""
    tasks = range(number_of_tasks([t for tensors in lists for t in tensors]))
    found = []
    for i, param in enumerate(lists[0]):
        rows = [
            step(*(of_task(of[i], t) if of else n for of, n in zip(lists, numbers, strict=True))) for t in tasks
        ] or [step(*(of[i] if of else n for of, n in zip(lists, numbers, strict=True)))]
        found.append([stack(list(of) if tasks else [], param, param.shape[1]) for of in zip(*rows, strict=True)])
    return [list(of) for of in zip(*found, strict=True)]


def sgd_step(*args):
    lists, numbers, (nesterov, keeps) = args[:7], args[7:11], args[11:]

    def step(p, g, buffer, lr, momentum, share, decay):
        g = g + decay * p
        buffer = momentum * buffer + share * g
        return p - lr * (g + momentum * buffer if nesterov else buffer), buffer

    moved, buffers = for_each_parameter(step, lists, (0, 0, 0, *numbers))
    return moved, buffers if keeps else []


def adam_step(*args):
    lists, numbers, (decoupled, amsgrad) = args[:10], args[10:15], args[15:]

    def step(p, g, mean, square, largest, lr, share1, share2, eps, decay):
        g = g if decoupled else g + decay * p
        mean = (1 - share1) * mean + share1 * g
        square = (1 - share2) * square + share2 * g**2
        largest = square.maximum(largest) if amsgrad and isinstance(largest, torch.Tensor) else square
        return (p * (1 - decay) if decoupled else p) - lr * mean / (largest.sqrt() + eps), mean, square, largest

    moved, means, squares, maxima = for_each_parameter(step, lists, (0, 0, 0, 0, 0, *numbers))
    return moved, means, squares, maxima if amsgrad else []


# inner loops -----------------------------------------------------------------------------------------


def maximum_entropy(rewards, target):
    """Of one task: rewards `[S]`, target `[S, d, 1 + M]` or `[d, 1 + M]`."""
    losses = []
    for i in range(target.shape[-2]):
        returns = []
        for j in range(target.shape[-1]):
            if target.dim() == 3:
                returns.append((rewards[:-1] * target[:-1, i, j]).sum() - target[-1, i, j])
            else:
                horizon = len(rewards) // target.numel()
                first = (i * target.shape[1] + j) * horizon
                returns.append(rewards[first : first + horizon].sum() - target[i, j])
        samples = torch.stack(returns[1:])
        most = samples.detach().max()  # steps that diverge soon have returns whose exponential is infinite
        losses.append((samples - most).exp().mean().log() + most - returns[0])
    return torch.stack(losses).mean()


def task_loss(loss, prediction, target, row_weights, delta):
    if loss == "maximum_entropy":
        return maximum_entropy(prediction[:, 0] * row_weights, target)
    if loss == "cross_entropy":
        rows = F.cross_entropy(prediction, target, reduction="none")
    elif loss == "mse":
        rows = F.mse_loss(prediction, target, reduction="none").mean(1)
    elif loss == "binary_cross_entropy":
        rows = F.binary_cross_entropy_with_logits(prediction, target, reduction="none").mean(1)
    else:
        rows = F.huber_loss(prediction, target, reduction="none", delta=delta).mean(1)
    return rows.dot(row_weights)


def adapt_task(x, y, row_weights, gram, weights, biases, rates, element_rates, loss, activation, delta, momentum,
               weight_decay, first_order):  # fmt: skip
    """Fast weights, biases and coefficients of one task; `gram` is None in the dense form.

    In the Gram form the first layer's gradient is that of its output, `x - gram @ coefficients`.
    """
    coefficients = None if gram is None else torch.zeros_like(x)
    params, count = [*weights, *biases], len(weights)
    first_layer = 0 if gram is None else 1  # of those that have weights
    velocity = None
    for of_layer in rates:
        params = [p if p.requires_grad else p.detach().requires_grad_() for p in params]
        h = x if gram is None else x - gram @ coefficients
        if gram is None:
            wanted, prediction = params, layers(h, params[:count], params[count:], activation)
        else:
            h = h if h.requires_grad else h.detach().requires_grad_()
            after = layers(ACTIVATIONS[activation](h), params[:count], params[count:], activation) if params else h
            wanted, prediction = [h, *params], after
        value = task_loss(loss, prediction, y, row_weights, delta)
        gradients = torch.autograd.grad(value, wanted, create_graph=not first_order, materialize_grads=True)
        if gram is None:
            gradients = [g + weight_decay * p for g, p in zip(gradients, params, strict=True)]
        if velocity is not None:
            gradients = [momentum * v + g for v, g in zip(velocity, gradients, strict=True)]
        velocity, step = gradients, list(gradients)
        if gram is not None:
            coefficients = coefficients + of_layer[0] * step.pop(0)
        for i, direction in enumerate(step):
            rate = of_layer[first_layer + i % count]
            params[i] = params[i] - (rate * element_rates[i] if element_rates else rate) * direction
    return params[:count], params[count:], coefficients


def _adapt(support, gram_support, weights, biases, rates, element_rates, options):
    """Of every task what `adapt_task` returns."""
    given = len(weights) < rates.shape[2]
    tasks = range(len(support[0]))
    return [
        adapt_task(
            *(part[t] for part in support), of_task(gram_support, t) if given else None,
            [of_task(w, t) for w in weights], [of_task(b, t) for b in biases], of_task(rates, t),
            [of_task(e, t) for e in element_rates], *options,
        )
        for t in tasks
    ]  # fmt: skip


def adapt_mlp(support_x, support_y, support_weight, gram_support, weights, biases, rates, element_rates, *options):
    support = support_x, support_y, support_weight
    tasks = _adapt(support, gram_support, weights, biases, rates, element_rates, options)
    fast_weights = [stack([w[i] for w, _, _ in tasks], p, *p.shape[1:]) for i, p in enumerate(weights)]
    fast_biases = [stack([b[i] for _, b, _ in tasks], p, *p.shape[1:]) for i, p in enumerate(biases)]
    if len(weights) == rates.shape[2]:
        return fast_weights, fast_biases, support_x.new_zeros(len(support_x), 0, 0)
    return fast_weights, fast_biases, stack([c for _, _, c in tasks], support_x, *support_x.shape[1:])


def meta_loss_mlp(support_x, support_y, support_weight, query_x, query_y, query_weight, gram_support, gram_query,
                  weights, biases, rates, element_rates, *options):  # fmt: skip
    loss, activation, delta = options[:3]
    support = support_x, support_y, support_weight
    tasks = _adapt(support, gram_support, weights, biases, rates, element_rates, options)
    losses, predictions = [], []
    for t, (fast_weights, fast_biases, coefficients) in enumerate(tasks):
        h = query_x[t]
        if coefficients is not None:
            h = h - of_task(gram_query, t) @ coefficients
            h = ACTIVATIONS[activation](h) if weights else h
        predictions.append(layers(h, fast_weights, fast_biases, activation))
        losses.append(task_loss(loss, predictions[-1], query_y[t], query_weight[t], delta))
    outputs = weights[-1].shape[1] if weights else query_x.shape[2]
    return stack(losses, query_x), stack(predictions, query_x, query_x.shape[1], outputs)


# images ----------------------------------------------------------------------------------------------


def convolution(x, weight, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups):
    """Of one task's `[B, H, W, C]`: a product of pixels with the weights of each tap."""
    x = F.pad(x, (0, 0, pad_w, pad_w, pad_h, pad_h))
    rows, columns = (
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            x.shape[1:3], weight.shape[2:], (stride_h, stride_w), (dilation_h, dilation_w), strict=True
        )
    )
    parts = []
    for images, filters in zip(x.chunk(groups, 3), weight.chunk(groups), strict=True):
        total = 0
        for i in range(weight.shape[2]):
            for j in range(weight.shape[3]):
                seen = images[:, i * dilation_h :: stride_h, j * dilation_w :: stride_w][:, :rows, :columns]
                total = total + seen @ filters[:, :, i, j].T
        parts.append(total)
    y = torch.cat(parts, 3)
    return y if bias is None else y + bias


def task_conv2d(x, weight, bias, *geometry):
    tasks = [
        convolution(of_task(x, t), of_task(weight, t), of_task(bias[0], t) if bias else None, *geometry)
        for t in range(number_of_tasks([x, weight, *bias]))
    ]
    if tasks:
        return torch.stack(tasks)
    one = convolution(x.new_zeros(*x.shape[1:]), weight.new_zeros(*weight.shape[1:]), None, *geometry)
    return one.new_zeros(0, *one.shape) + 0 * (x.sum() + weight.sum())


def by_autograd(function, at, grad):
    """The gradient of `function` at a tensor of zeros `at`, in which it is linear."""
    at.requires_grad_()
    return torch.autograd.grad(function(at), at, grad, create_graph=True)[0]


def task_conv2d_bwd_data(grad, weight, height, width, *geometry):
    tasks, channels = number_of_tasks([grad, weight]), weight.shape[2] * geometry[6]
    x = grad.new_zeros(tasks, grad.shape[1], height, width, channels)
    return by_autograd(lambda x: task_conv2d(x, _of(weight, tasks), [], *geometry), x, _of(grad, tasks))


def task_conv2d_bwd_weight(grad, x, kernel_h, kernel_w, *geometry):
    tasks = number_of_tasks([grad, x])
    weight = grad.new_zeros(tasks, grad.shape[4], x.shape[4] // geometry[6], kernel_h, kernel_w)
    return by_autograd(lambda weight: task_conv2d(_of(x, tasks), weight, [], *geometry), weight, _of(grad, tasks))


def _of(tensor, tasks):
    return tensor.expand(tasks, *tensor.shape[1:])


def norm_moments(x, norm, groups):
    tasks, rows, height, width, channels = x.shape
    wide = x.float() if x.dtype == torch.bfloat16 else x
    if norm == "batch":
        parts = wide.reshape(tasks, 1, rows * height * width, channels, 1)
    else:
        parts = wide.reshape(tasks, rows, height * width, groups, channels // groups)
    mean = parts.mean((2, 4))
    return mean, (parts - mean[:, :, None, :, None]).square().mean((2, 4))


def block(x, weight, bias, moments, norm, groups, eps, activation, slope, pool):
    """Of one task's `[B, H, W, C]`."""
    planes = x.permute(0, 3, 1, 2)
    # torch's own norms have no third derivative
    if norm == "batch":
        centred = planes - planes.mean((0, 2, 3), keepdim=True)
        planes = centred / (centred.square().mean((0, 2, 3), keepdim=True) + eps).sqrt()
    elif norm == "group":
        parts = planes.unflatten(1, (groups, -1))
        centred = parts - parts.mean((2, 3, 4), keepdim=True)
        planes = (centred / (centred.square().mean((2, 3, 4), keepdim=True) + eps).sqrt()).flatten(1, 2)
    elif norm == "given":
        mean, var = (m[0][:, None, None] for m in moments)
        planes = (planes - mean) / (var + eps).sqrt()
    if weight is not None:
        planes = planes * weight[:, None, None]
    if bias is not None:
        planes = planes + bias[:, None, None]
    planes = F.leaky_relu(planes, slope) if slope else ACTIVATIONS[activation](planes)
    if pool != "none" and min(planes.shape[2:]) < 2:  # which torch refuses
        planes = planes[:, :, : planes.shape[2] // 2, : planes.shape[3] // 2]
    elif pool != "none":
        planes = F.max_pool2d(planes, 2) if pool == "max" else F.avg_pool2d(planes, 2)
    return planes.permute(0, 2, 3, 1)


def norm_act_pool(x, weight, bias, moments, *options):
    wide = x.float() if x.dtype == torch.bfloat16 else x
    tasks = [
        block(wide[t], *(of_task(part[0], t) if part else None for part in (weight, bias)),
              [of_task(m, t) for m in moments], *options)
        for t in range(len(x))
    ]  # fmt: skip
    step = 1 if options[-1] == "none" else 2
    return stack(tasks, wide, x.shape[1], x.shape[2] // step, x.shape[3] // step, x.shape[4]).to(x.dtype)


# gradients -------------------------------------------------------------------------------------------


def flat(values) -> list:
    return [t for v in values for t in (v if isinstance(v, (list, tuple)) else [v])]


def vjp(function, grads, args, positions, needs) -> list:
    """Gradients of the arguments at `positions`, of size 0 where `needs` has no bit for them."""
    args = list(args)
    for p in positions:
        tensors = [t if t.requires_grad else t.detach().requires_grad_() for t in flat([args[p]])]
        args[p] = tensors if isinstance(args[p], (list, tuple)) else tensors[0]
    outputs = function(*args)
    outputs = flat(outputs if isinstance(outputs, (list, tuple)) else [outputs])
    live = [(o, g) for o, g in zip(outputs, flat(grads), strict=False) if o.requires_grad]
    inputs = [(t, needs >> bit & 1) for bit, p in enumerate(positions) for t in flat([args[p]])]
    wanted = [t for t, needed in inputs if needed]
    if live:
        options = {"create_graph": True, "materialize_grads": True}
        found = iter(torch.autograd.grad([o for o, _ in live], wanted, [g for _, g in live], **options))
    else:
        found = (torch.zeros_like(t) for t in wanted)
    return [next(found) if needed else t.new_empty(0) for t, needed in inputs]


def gradient_of(function):
    """What `<op>_bwd` computes, from gradients of the op's outputs, its arguments and `needs`."""
    spec = REGISTRY[function.__name__]
    count = len(REGISTRY[f"{spec.name}_bwd"].argument_names) - len(spec.argument_names) - 1

    def gradients(*args):
        return vjp(function, args[:count], args[count:-1], spec.differentiable_positions, args[-1])

    gradients.__name__ = f"{spec.name}_bwd"
    return gradients


_DERIVED = (
    pairwise_distance, prototypical_loss, contrastive_loss, functional_mlp, adapt_mlp, meta_loss_mlp, norm_act_pool,
    gradient_of(norm_act_pool), sgd_step, adam_step,
)  # fmt: skip
_WRITTEN = (
    class_prototypes, class_prototypes_bwd, fast_weight_update, fast_weight_update_bwd, task_conv2d,
    task_conv2d_bwd_data, task_conv2d_bwd_weight, norm_moments,
)  # fmt: skip
TRUTH = {function.__name__: function for function in (*_WRITTEN, *_DERIVED)}
TRUTH |= {f"{function.__name__}_bwd": gradient_of(function) for function in _DERIVED}
