"""The demo's picture: what a few gradient steps do to a meta-learned function."""

from __future__ import annotations

from pathlib import Path

import torch

from ..algorithms import MAML

_STEPS = {0: ("before", "#999999", ":"), 1: ("after 1 step", "#0072b2", "--"), 5: ("after 5 steps", "#d55e00", "-")}


def draw_curves(maml: MAML, tasks, path: Path, *, num_tasks: int = 4, seed: int = 3) -> None:
    """Truth, support points, and the prediction before and after 1 and 5 inner steps, for `num_tasks`
    regression tasks."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is not installed: pip install matplotlib") from error

    device = next(maml.parameters()).device
    batch = tasks.sample(16 * num_tasks, generator=torch.Generator(device).manual_seed(seed))
    # From the flattest to the highest function in even steps, so that the picture shows the range and not the
    # luck of a draw.
    by_height = batch.query_y.std(1).flatten().argsort()
    batch = type(batch)(*(tensor[by_height[8::16]] for tensor in batch))
    order = batch.query_x.argsort(1)
    predictions = {steps: _predict(maml, batch, steps).gather(1, order).cpu() for steps in _STEPS}
    x, truth = batch.query_x.gather(1, order).cpu(), batch.query_y.gather(1, order).cpu()
    support_x, support_y = batch.support_x.cpu(), batch.support_y.cpu()

    # Figure and canvas by hand: pyplot would look for a display and keep state.
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, (num_tasks + 1) // 2, sharex=True, sharey=True, squeeze=False).flatten()
    for task, axis in zip(range(num_tasks), axes, strict=False):
        axis.plot(x[task], truth[task], color="black", linewidth=1, label="truth")
        for steps, (label, colour, style) in _STEPS.items():
            axis.plot(x[task], predictions[steps][task], style, color=colour, linewidth=1.8, label=label)
        axis.plot(support_x[task], support_y[task], "o", color="black", markersize=5, label="support points")
        errors = [float((predictions[steps][task] - truth[task]).square().mean()) for steps in _STEPS]
        axis.set_title("MSE " + " → ".join(f"{error:.2g}" for error in errors), fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"MAML on sinusoids it has not seen: {support_x.shape[1]} points, then 1 and 5 gradient steps")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)


def _predict(maml: MAML, batch, steps: int) -> torch.Tensor:
    own = maml.inner_steps
    try:
        maml.inner_steps = steps
        with torch.no_grad():
            return maml.predict(maml.adapt(batch.support_x, batch.support_y), batch.query_x)
    finally:
        maml.inner_steps = own
