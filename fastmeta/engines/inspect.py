"""Looking at a module: is it a plain multi-layer perceptron, and if not, why not.

Engines with explicit formulas know `nn.Linear` layers with an elementwise activation in between, in one chain. An
`nn.Sequential` of plain layers shows that chain itself. A hand-written `forward` is run on a symbol, each time anew,
since what it does may depend on attributes, flags and globals: nothing about it is remembered, and nothing outside of
the call is touched (`torch.fx`'s own tracer patches `nn.Module` for the whole process while it runs). What is not
certain to be such a chain is refused with a sentence, and the caller takes an engine that runs the module itself.
"""

from __future__ import annotations

import inspect as _python_inspect
import operator
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
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


class _Current(threading.local):
    def __init__(self):
        self.models: list[tuple[nn.Module, MLPSpec | str, dict[str, nn.Parameter]]] = []


_current = _Current()


@contextmanager
def inspected(model: nn.Module):
    """Looks at `model` once for all calls of `mlp_spec` and `parameters_of` that this thread makes inside the block."""
    if torch.compiler.is_compiling() or _current.models and _current.models[-1][0] is model:  # there it is a constant
        yield
        return
    _current.models.append((model, *_look(model)))
    try:
        yield
    finally:
        _current.models.pop()


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """`dict(model.named_parameters())`."""
    if _current.models and _current.models[-1][0] is model:
        return _current.models[-1][2]
    return dict(model.named_parameters())


def mlp_spec(model: nn.Module) -> MLPSpec | str:
    """The module's `MLPSpec`, or a sentence that says why it has none."""
    if _current.models and _current.models[-1][0] is model:
        return _current.models[-1][1]
    return _look(model)[0]


# torch.compile takes the answer for a constant: the layers of a model that is compiled already must not be replaced.
# What torch.compiler.assume_constant_result does, without the two seconds in which that imports all of dynamo.
mlp_spec._dynamo_marked_constant = True


class Snapshot:
    """Tells, faster than looking at it anew, whether a model is as it was: layers, modes and hooks, and parameters with
    the memory that they are in; what a hand-written `forward` does is looked at anew."""

    def __init__(self, model: nn.Module):
        self.layers = [(layer, layer._parameters.copy(), _state(layer)) for layer in model.modules()]
        self.parameters = [(p, p.data_ptr(), p.shape, p.requires_grad) for p in parameters_of(model).values()]
        self.spec = None if _is_plain(model) else mlp_spec(model)

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
        return self.spec is None or mlp_spec(model) == self.spec


def _state(layer: nn.Module) -> tuple:
    attributes = layer.__dict__
    own = None
    if layer.__class__ in _WITH_SETTINGS:
        own = attributes.get("approximate"), attributes.get("start_dim"), attributes.get("end_dim")
    return layer.training, own, "forward" in attributes, [*layer._modules.items()]


_WITH_SETTINGS = {nn.Flatten, nn.GELU}


def _hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def hooked_layer(model: nn.Module) -> str | None:
    """The name of a layer that has hooks, `"model"` for the model itself."""
    return next((name or "model" for name, layer in model.named_modules() if _hooks(layer)), None)


class _Refused(Exception):
    """The module is not a chain that explicit formulas can serve; the message says why."""


_PLAIN = {nn.Sequential, nn.Linear, nn.Flatten, *ACTIVATION_MODULES}


def _is_plain(model: nn.Module) -> bool:
    """Whether the chain can be read off the layers: no `forward` but torch's own ones takes part."""
    return all(type(layer) in _PLAIN and "forward" not in layer.__dict__ for layer in model.modules())


class _Seen:
    """A model in which the chain could be read off the layers, and all that this depends on."""

    def __init__(self, model: nn.Module):
        self.top = _traits(model)  # without the model itself, which would then live for ever
        self.layers = [(f"{name}.", layer, _traits(layer)) for name, layer in model.named_modules() if name]
        self.spec = _chain_of(_plain_steps(model))

    def still_holds(self, model: nn.Module) -> bool:
        return self.top == _traits(model) and all(traits == _traits(layer) for _, layer, traits in self.layers)


def _traits(layer: nn.Module) -> tuple:
    shapes = [None if p is None else p.shape for p in layer._parameters.values()]
    return layer.__class__, shapes, _state(layer)


_seen: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()


def _look(model: nn.Module) -> tuple[MLPSpec | str, dict[str, nn.Parameter]]:
    """What the module is, and `dict(model.named_parameters())`; for few small tasks as long as the kernel takes. Plain
    layers that have been walked through once are only compared with what they were."""
    known = _seen.get(model)
    if known is None or not known.still_holds(model):
        known = None
        _seen.pop(model, None)
        if _is_plain(model):
            known = _seen[model] = _Seen(model)
    layers = known.layers if known is not None else [(f"{n}.", layer, None) for n, layer in model.named_modules() if n]
    named: dict[str, nn.Parameter] = {}
    hooked, seen = None, set()
    for prefix, layer, _ in (("", model, None), *layers):
        if _hooks(layer):
            hooked = hooked or prefix[:-1] or "model"
        for key, parameter in layer._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                named[prefix + key] = parameter
    if hooked is not None:
        return f"layer {hooked!r} has hooks, which explicit formulas would skip", named
    spec = _chain_of(_traced_steps(model, named)) if known is None else known.spec
    if not isinstance(spec, str):  # ties come and go without a new layer
        tied = next((p for p in (*spec.weights, *spec.biases) if p is not None and p not in named), None)
        spec = spec if tied is None else f"parameter {tied!r} is shared with another layer"
    return spec, named


def _chain_of(steps: Iterator[_Step]) -> MLPSpec | str:
    try:
        return _chain(steps)
    except _Refused as refused:
        return str(refused)


class _Step(NamedTuple):
    """What happens to all rows: a linear layer by its parameters' names, an activation, or flattening examples."""

    where: str  # for messages
    weight: str | None = None
    bias: str | None = None
    width_in: int = 0
    width_out: int = 0
    activation: str | None = None
    rows_of: int | None = None  # flattened to rows of so many numbers, 0: whatever the size


def _plain_steps(model: nn.Module) -> Iterator[_Step]:
    """Those of a plain layer, or an `nn.Sequential` of such."""
    for name, layer in model.named_modules(remove_duplicate=False):
        where = f"layer {name!r}"
        if type(layer) is nn.Linear:
            prefix = f"{name}." if name else ""
            bias = None if layer.bias is None else f"{prefix}bias"
            yield _Step(where, f"{prefix}weight", bias, layer.weight.shape[1], layer.weight.shape[0])
        elif type(layer) is nn.Flatten:
            if (layer.start_dim, layer.end_dim) != (1, -1):
                raise _Refused(f"{where} has no explicit formula")
            yield _Step(where, rows_of=0)
        elif type(layer) in ACTIVATION_MODULES:
            if getattr(layer, "approximate", "none") != "none":
                raise _Refused(f"{where} has no explicit formula")
            yield _Step(where, activation=ACTIVATION_MODULES[type(layer)])


def _chain(steps: Iterator[_Step]) -> MLPSpec:
    weights: list[str] = []
    biases: list[str | None] = []
    activations: list[str] = []
    first, in_features, width, flatten = 0, 0, 0, False
    for step in steps:
        if step.weight is not None:
            if step.weight in weights:
                raise _Refused(f"{step.where} is used twice")
            if step.bias is not None and step.bias in biases:
                raise _Refused(f"parameter {step.bias!r} is shared with another layer")
            if weights and step.width_in != width:
                raise _Refused(f"{step.where} takes {step.width_in} features but is given {width}")
            weights.append(step.weight)
            biases.append(step.bias)
            activations.append("identity")
            first, in_features = first or step.width_in, in_features or step.width_in
            width = step.width_out
        elif step.rows_of is not None:
            if weights or activations or flatten:
                raise _Refused(f"{step.where} reshapes between layers")
            flatten, in_features = True, step.rows_of
        elif step.activation != "identity":
            if not weights or activations[-1] != "identity":
                raise _Refused(f"{step.where} does not directly follow a linear layer")
            activations[-1] = step.activation
    if not weights:
        raise _Refused("it has no nn.Linear layer")
    if in_features != first:
        raise _Refused(f"it reshapes to rows of {in_features}, but its first layer takes {first}")
    return MLPSpec(tuple(weights), tuple(biases), tuple(activations), first, flatten)


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Writes down what is done with a symbol; parameters stand for themselves. In which mode it is done leaves no trace
    in the graph: `mode_changes` tells whether a part ran without gradients, or under autocast of its own."""

    def __init__(self, graph: fx.Graph):
        super().__init__(graph)
        self.mode, self.mode_changes = _mode(), False

    def create_node(self, *args, **kwargs):
        self.mode_changes |= _mode() != self.mode
        return super().create_node(*args, **kwargs)

    def create_arg(self, a):
        return a if isinstance(a, Tensor) else super().create_arg(a)


def _mode() -> tuple:
    kinds = ("cpu", "cuda")
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    return torch.is_grad_enabled(), *autocast


def _traced_steps(model: nn.Module, named: dict[str, nn.Parameter]) -> Iterator[_Step]:
    """Those of a hand-written `forward`, which is run on a symbol."""
    arguments = list(_python_inspect.signature(model.forward).parameters.values())
    if not arguments or any(argument.default is argument.empty for argument in arguments[1:]):
        raise _Refused(f"{type(model).__name__}.forward takes {len(arguments)} arguments, not one")
    buffer = next((name for name, _ in model.named_buffers()), None)
    for name, layer in model.named_modules():
        # Named before tracing: "has dropout" helps more than "a branch could not be traced".
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            raise _Refused(f"layer {name!r} is {type(layer).__name__}: random layers need the module itself")
        if isinstance(layer, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)):
            raise _Refused(f"layer {name!r} is {type(layer).__name__}: norms have no explicit formula")
    if buffer is not None:
        raise _Refused(f"it has buffers ({buffer!r}), which running it may change")
    graph = fx.Graph()
    with torch.enable_grad():  # whatever the mode around it, the same chain
        tracer = _Tracer(graph)
    before = [(name, layer, layer.__dict__.copy()) for name, layer in model.named_modules()]
    try:
        with torch.enable_grad():
            found = model(fx.Proxy(graph.placeholder("x"), tracer))
    except Exception as error:  # anything can happen in a user's forward; an engine that runs it then says it as it is
        text = str(error).strip().splitlines()
        raise _Refused(f"its forward could not be traced: {text[0] if text else type(error).__name__}") from None
    finally:
        written = _written_back(before)
    if written is not None:
        raise _Refused(f"its forward writes into {written!r}")
    if tracer.mode_changes:
        raise _Refused("its forward runs a part without gradients, or under autocast of its own")
    names = {id(p): name for name, p in named.items()}
    last = yield from _steps_of(graph, names)
    if not isinstance(found, fx.Proxy) or found.node is not last:
        raise _Refused("it returns something else than its last layer's output")


def _written_back(before: list[tuple[str, nn.Module, dict]]) -> str | None:
    """The first attribute that `forward` has set, which would keep symbols; all of them are what they were again."""
    written = None
    for name, layer, attributes in before:
        changed = [key for key, value in layer.__dict__.items() if attributes.get(key, layer) is not value]
        if changed:
            written = written or f"{name}.{changed[0]}".lstrip(".")
            layer.__dict__.clear()
            layer.__dict__.update(attributes)
    return written


def _steps_of(graph: fx.Graph, names: dict[int, str]):
    current: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            current = node
            continue
        if _is_batch_size(node):
            continue
        where = f"operation {node.target if isinstance(node.target, str) else node.target.__name__!r}"
        if [other for other in node.all_input_nodes if not _is_batch_size(other)] != [current]:
            raise _Refused(f"{where} does not continue a single chain of layers (a branch or a residual)")
        current = node
        if node.target is F.linear:
            yield _linear_step(node, names)
        elif (rows_of := _flatten_to(node)) is not None:
            yield _Step(where, rows_of=rows_of)
        elif (activation := _activation(node)) is not None:
            yield _Step(where, activation=activation)
        else:
            raise _Refused(f"{where} has no explicit formula")
    return current


def _linear_step(node: fx.Node, names: dict[int, str]) -> _Step:
    arguments = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    weight, bias = arguments["weight"], arguments.get("bias")
    known = [names.get(id(t)) for t in (weight, bias) if t is not None]
    if not isinstance(arguments["input"], fx.Node) or None in known or weight.dim() != 2:
        raise _Refused("operation 'linear' takes something else than its layer's own weight and bias")
    layer = known[0].rpartition(".")[0]
    return _Step(f"layer {layer!r}", known[0], None if bias is None else known[1], weight.shape[1], weight.shape[0])


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


def _flatten_to(node: fx.Node) -> int | None:
    """None: does not flatten each example to one row. 0: flattens whatever the size. n: makes rows of n."""
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


def _activation(node: fx.Node) -> str | None:
    if node.op == "call_method":
        return ACTIVATION_METHODS.get(node.target) if len(node.args) == 1 and not node.kwargs else None
    exact = len(node.args) == 1 and node.kwargs.get("approximate", "none") == "none"
    exact = exact and set(node.kwargs) <= {"inplace", "approximate"}
    return ACTIVATION_FUNCTIONS.get(node.target) if exact else None
