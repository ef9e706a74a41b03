"""`torchopt.visual`: pictures of autograd's graph. They need the package graphviz, when they are made."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any

from torch import Tensor

from . import pytree
from .utils import ModuleState

__all__ = ["make_dot", "resize_graph"]

SAVED = "_saved_"
STYLE = {
    "style": "filled",
    "shape": "box",
    "align": "left",
    "fontsize": "10",
    "ranksep": "0.1",
    "height": "0.2",
    "fontname": "monospace",
}


def make_dot(
    var: Any,
    params: Mapping[str, Tensor] | ModuleState | Generator | Iterable | None = None,
    show_attrs: bool = False,
    show_saved: bool = False,
    max_attr_chars: int = 50,
) -> Any:
    """A `graphviz.Digraph` of how tensors came about: operations grey, leaves blue, outputs green, a view's base dark
    green, saved tensors orange.

    Args:
        var: a tensor or a tree of them.
        params: names of tensors: a dict by name, `named_parameters()`, a state that was extracted with `enable_visual`,
            or several of these.
        show_attrs: whether operations show what they keep that is no tensor, in at most `max_attr_chars` letters each.
        show_saved: whether tensors that torch's own operations keep are shown.

    Raises:
        ImportError: graphviz is missing.
    """
    try:
        from graphviz import Digraph
    except ImportError as error:
        raise ImportError("make_dot needs graphviz: pip install graphviz") from error

    names = _names(params)
    dot = Digraph(node_attr=STYLE, graph_attr={"size": "12,12"})
    seen: set[int] = set()
    kept: list[Any] = []  # what is looked at must live: another object could get its id

    def new(thing: Any) -> bool:
        kept.append(thing)
        known = id(thing) in seen
        seen.add(id(thing))
        return not known

    def tensor_node(tensor: Tensor, name: str, color: str) -> str:
        dot.node(str(id(tensor)), f"{name}\n{_size(tensor)}", fillcolor=color)
        return str(id(tensor))

    def operation(fn: Any) -> None:
        waiting = [fn]  # not by recursion: graphs of inner loops are deep
        while waiting:
            fn = waiting.pop()
            if not new(fn):
                continue
            label = _label(fn, show_attrs, max_attr_chars)
            name, tensor = names.get(fn, ("", None)) if fn in names else ("", None)
            dot.node(
                str(id(fn)),
                label if tensor is None else f"{label}\n{name}\n{_size(tensor)}",
                fillcolor=None if tensor is None else "lightblue",
            )
            if hasattr(fn, "variable"):
                kept.append(fn.variable)
                dot.edge(tensor_node(fn.variable, names.get(fn.variable, ""), "lightblue"), str(id(fn)))
            saved = list(_saved(fn)) if show_saved else []
            saved += [("", t) for t in getattr(fn, "saved_tensors", ()) if isinstance(t, Tensor)]
            for name, tensor in saved:
                kept.append(tensor)
                dot.edge(str(id(fn)), tensor_node(tensor, name, "orange"), dir="none")
            for before, _ in getattr(fn, "next_functions", ()):
                if before is not None:
                    dot.edge(str(id(before)), str(id(fn)))
                    waiting.append(before)

    def output(tensor: Tensor, color: str = "darkolivegreen1") -> None:
        if not new(tensor):
            return
        tensor_node(tensor, names.get(tensor, ""), color)
        if tensor.grad_fn is not None:
            operation(tensor.grad_fn)
            dot.edge(str(id(tensor.grad_fn)), str(id(tensor)))
        if tensor._is_view():
            output(tensor._base, "darkolivegreen3")
            dot.edge(str(id(tensor._base)), str(id(tensor)), style="dotted")

    pytree.tree_map_(output, var)
    resize_graph(dot)
    return dot


def resize_graph(dot: Any, size_per_element: float = 0.5, min_size: float = 12.0) -> None:
    """Gives a graph, in place, a size that goes with its number of nodes and edges."""
    size = max(min_size, len(dot.body) * size_per_element)
    dot.graph_attr.update(size=f"{size},{size}")


def _names(params: Any) -> dict[Any, Any]:
    """By tensor its name; by the operation that made a parameter its name and the parameter."""
    if params is None:
        return {}
    if isinstance(params, ModuleState):
        return dict(params.visual_contents or {})
    if isinstance(params, Generator):
        return {tensor: name for name, tensor in params}
    if isinstance(params, Mapping):
        return {tensor: name for name, tensor in params.items()}
    return {key: name for one in params for key, name in _names(one).items()}


def _size(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _saved(fn: Any) -> Iterable[tuple[str, Tensor]]:
    for attribute in filter(lambda name: name.startswith(SAVED), dir(fn)):
        value, name = getattr(fn, attribute), attribute.removeprefix(SAVED)
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from ((f"{name}[{i}]", t) for i, t in enumerate(value) if isinstance(t, Tensor))


def _label(fn: Any, show_attrs: bool, max_attr_chars: int) -> str:
    lines = [type(fn).__name__]
    for attribute in filter(lambda name: show_attrs and name.startswith(SAVED), dir(fn)):
        value = getattr(fn, attribute)
        several = isinstance(value, tuple) and any(isinstance(t, Tensor) for t in value)
        text = "[saved tensor]" if isinstance(value, Tensor) else "[saved tensors]" if several else str(value)
        text = text if len(text) <= max_attr_chars else text[: max(max_attr_chars, 3) - 3] + "..."
        lines.append(f"{attribute.removeprefix(SAVED)}: {text}")
    return "\n".join(lines)
