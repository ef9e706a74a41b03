"""Looking at a module: is it a plain multi-layer perceptron, and if not, why not.

Engines with explicit formulas know `nn.Linear` layers with an elementwise activation in between, in one
chain. This file finds that chain by tracing the module's `forward` with `torch.fx`, so `nn.Sequential` and
hand-written modules are served alike. What is not certain to be such a chain is refused with a sentence, and
the caller takes an engine that runs the module itself.
"""

from __future__ import annotations

import inspect as _python_inspect
import operator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.nn import functional as F

ACTIVATION_MODULES = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Identity: "identity",
}
ACTIVATION_FUNCTIONS = {
    torch.relu: "relu",
    F.relu: "relu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.silu: "silu",
    F.gelu: "gelu",
    torch.sin: "sine",
}
ACTIVATION_METHODS = {"relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid", "sin": "sine"}


class MLPSpec(NamedTuple):
    """A module that computes `x -> activation_L(W_L ... activation_1(W_1 x + b_1) ... + b_L)` for every row.

    Names only, no tensors: parameters are looked up by name at each call, so loading or replacing them is
    seen.
    """

    weights: tuple[str, ...]  # parameter names, first layer first
    biases: tuple[str | None, ...]  # None: the layer has no bias
    activations: tuple[str, ...]  # one per layer, the last mostly "identity"
    in_features: int
    flatten: bool  # each example is flattened to one row first


class _Refused(Exception):
    """The module is not a chain that explicit formulas can serve; the message says why."""


_current: list[tuple[nn.Module, MLPSpec | str, dict]] = []


@contextmanager
def inspected(model: nn.Module):
    """Looks at `model` once for all calls of `mlp_spec` and `parameters_of` inside the block."""
    if torch.compiler.is_compiling():  # there it is a constant
        yield
        return
    _current.append((model, *_look(model)))
    try:
        yield
    finally:
        _current.pop()


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """`dict(model.named_parameters())`."""
    if _current and _current[-1][0] is model:
        return _current[-1][2]
    return dict(model.named_parameters())


class _Seen:
    """What was found in a model, and the layers that it was found in."""

    def __init__(self, model: nn.Module):
        self.top = _state(model)  # without the model itself, which would then live for ever
        self.layers = [(f"{name}.", layer, _state(layer)) for name, layer in model.named_modules() if name]
        self.spec = _inspect(model)

    def still_holds(self, model: nn.Module) -> bool:
        return self.top == _state(model) and all(state == _state(layer) for _, layer, state in self.layers)


def _state(layer: nn.Module) -> tuple[bool, list[tuple[str, nn.Module | None]]]:
    return layer.training, [*layer._modules.items()]


class Snapshot:
    """Tells, faster than looking at it anew, whether a model is as it was: layers, modes and hooks, and parameters with
    the memory that they are in."""

    def __init__(self, model: nn.Module):
        self.layers = [(layer, layer._parameters.copy(), _state(layer)) for layer in model.modules()]
        self.parameters = [(p, p.data_ptr(), p.shape, p.requires_grad) for p in parameters_of(model).values()]

    def shows(self, model: nn.Module) -> bool:
        if model is not self.layers[0][0]:
            return False
        for layer, parameters, state in self.layers:
            if state != _state(layer) or len(parameters) != len(layer._parameters) or _hooks(layer):
                return False
            for key, p in layer._parameters.items():
                if parameters.get(key) is not p:
                    return False
        for p, address, shape, differentiable in self.parameters:
            if p.data_ptr() != address or p.shape != shape or p.requires_grad is not differentiable:
                return False
        return True


def _hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


_seen: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()


def mlp_spec(model: nn.Module) -> MLPSpec | str:
    """The module's `MLPSpec`, or a sentence that says why it has none. Remembered until its layers change."""
    if _current and _current[-1][0] is model:
        return _current[-1][1]
    return _look(model)[0]


# torch.compile takes the answer for a constant: the layers of a model that is compiled already must not be replaced.
# What torch.compiler.assume_constant_result does, without the two seconds in which that imports all of dynamo.
mlp_spec._dynamo_marked_constant = True


def _look(model: nn.Module) -> tuple[MLPSpec | str, dict[str, nn.Parameter]]:
    """What the module is, and `dict(model.named_parameters())`. For few small tasks this takes as long as the kernel:
    layers that have been walked through once are only looked at."""
    known = _seen.get(model)
    if known is None or not known.still_holds(model):
        known = _seen[model] = _Seen(model)
    named, hooked, seen = {}, None, set()
    for prefix, layer, _ in (("", model, None), *known.layers):
        if _hooks(layer):
            hooked = hooked or prefix[:-1] or "model"
        for key, parameter in layer._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                named[prefix + key] = parameter
    spec = known.spec
    # Hooks and ties come and go without a new layer, so they are looked at every time.
    if not isinstance(spec, str) and hooked is not None:
        spec = f"layer {hooked!r} has hooks, which explicit formulas would skip"
    elif not isinstance(spec, str):
        missing = [name for name in (*spec.weights, *spec.biases) if name is not None and name not in named]
        spec = f"parameter {missing[0]!r} is shared with another layer" if missing else spec
    return spec, named


def _inspect(model: nn.Module) -> MLPSpec | str:
    arguments = _python_inspect.signature(model.forward).parameters
    if len(arguments) != 1 and not isinstance(model, nn.Sequential):
        return f"{type(model).__name__}.forward takes {len(arguments)} arguments, not one"
    for name, layer in model.named_modules():
        # Named before tracing: "has dropout" helps more than "a branch could not be traced".
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            return f"layer {name!r} is {type(layer).__name__}: random layers need the module itself"
        if isinstance(layer, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)):
            return f"layer {name!r} is {type(layer).__name__}: norms have no explicit formula"
    try:
        if type(model) is nn.Linear or type(model) in ACTIVATION_MODULES:
            model = nn.Sequential(model)
            spec = _chain(model, fx.symbolic_trace(model).graph)
            return spec._replace(weights=("weight",), biases=("bias" if spec.biases[0] else None,))
        return _chain(model, fx.symbolic_trace(model).graph)
    except _Refused as refused:
        return str(refused)
    except Exception as error:  # anything can happen in a user's forward; the vmap engine then runs it as it is
        text = str(error).strip().splitlines()
        return f"torch.fx could not trace it: {text[0] if text else type(error).__name__}"


def _chain(model: nn.Module, graph: fx.Graph) -> MLPSpec:
    weights: list[str] = []
    biases: list[str | None] = []
    activations: list[str] = []
    in_features, width, flatten = 0, 0, False
    current: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            current = node
            continue
        if _is_batch_size(node):
            continue
        if node.op == "output":
            if node.args[0] is not current:
                raise _Refused("it returns something else than its last layer's output")
            break
        if node.op == "get_attr":
            raise _Refused(f"it uses {node.target!r} directly")
        inputs = [other for other in node.all_input_nodes if not _is_batch_size(other)]
        if inputs != [current]:
            raise _Refused(f"{_name(node)} does not continue a single chain of layers (a branch or a residual)")
        current = node
        layer = model.get_submodule(node.target) if node.op == "call_module" else None

        if type(layer) is nn.Linear:
            if f"{node.target}.weight" in weights:
                raise _Refused(f"layer {node.target!r} is used twice")
            if weights and layer.in_features != width:
                raise _Refused(f"layer {node.target!r} takes {layer.in_features} features but is given {width}")
            weights.append(f"{node.target}.weight")
            biases.append(None if layer.bias is None else f"{node.target}.bias")
            activations.append("identity")
            in_features, width = in_features or layer.in_features, layer.out_features
        elif _flatten_to(node, layer) is not None:
            if weights or activations or flatten:
                raise _Refused(f"{_name(node)} reshapes between layers")
            flatten = True
            in_features = max(_flatten_to(node, layer), 0)
        else:
            activation = _activation(node, layer)
            if activation is None:
                raise _Refused(f"{_name(node)} has no explicit formula")
            if activation != "identity":
                if not weights or activations[-1] != "identity":
                    raise _Refused(f"{_name(node)} does not directly follow a linear layer")
                activations[-1] = activation
    if not weights:
        raise _Refused("it has no nn.Linear layer")
    first = model.get_submodule(weights[0].rpartition(".")[0]).in_features
    if in_features != first:
        raise _Refused(f"it reshapes to rows of {in_features}, but its first layer takes {first}")
    return MLPSpec(tuple(weights), tuple(biases), tuple(activations), first, flatten)


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        return f"layer {node.target!r}"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"operation {target!r}"


def _is_batch_size(node: object) -> bool:
    """`x.size(0)`, `x.shape[0]`, `len(x)` and the `x.shape` they come from, as used in `x.view(x.size(0),
    -1)`."""
    if not isinstance(node, fx.Node) or not node.args:
        return False
    source = node.args[0]
    if node.op == "call_method" and node.target == "size":
        return source.op == "placeholder" and node.args[1:] == (0,)
    if node.op == "call_function" and node.target is getattr and node.args[1] == "shape":
        return source.op == "placeholder"
    if node.op == "call_function" and node.target is operator.getitem:
        return _is_batch_size(source) and node.args[1] == 0
    return False


def _flatten_to(node: fx.Node, layer: nn.Module | None) -> int | None:
    """None: does not flatten each example to one row. 0: flattens whatever the size. n: makes rows of n."""
    if isinstance(layer, nn.Flatten):
        return 0 if (layer.start_dim, layer.end_dim) == (1, -1) else None
    if node.target in (torch.flatten, "flatten"):
        start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
        end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
        return 0 if (start, end) == (1, -1) else None
    if node.target in ("view", "reshape", torch.reshape) and not node.kwargs:
        shape = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        if len(shape) != 2 or not isinstance(shape[1], int):
            return None
        rows, columns = shape
        if _is_batch_size(rows) and columns != 0:
            return max(columns, 0)
        if rows == -1 and columns > 0:
            return columns
    return None


def _activation(node: fx.Node, layer: nn.Module | None) -> str | None:
    if node.op == "call_module":
        name = ACTIVATION_MODULES.get(type(layer))
        exact = getattr(layer, "approximate", "none") == "none"
    elif node.op == "call_method":
        name, exact = ACTIVATION_METHODS.get(node.target), len(node.args) == 1
    else:
        name = ACTIVATION_FUNCTIONS.get(node.target)
        exact = len(node.args) == 1 and node.kwargs.get("approximate", "none") == "none"
        exact = exact and set(node.kwargs) <= {"inplace", "approximate"}
    return name if exact else None
