"""How time grows with tasks, inner steps and rows: the points of the suite's curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fastmeta.dispatch.spec import REGISTRY, Make

from . import contenders as peers
from . import counts
from .case import Case
from .measure import Contender
from .problems import maml_batch, rows_and_gradients

SINUSOID, IMAGES = ((1, 40, 40, 1), 10, 10), ((784, 64, 64, 5), 5, 75)  # widths, support rows, query rows
MOST_VMAP = 10_000  # tasks: `torch.func` keeps hundreds of kilobytes for each
MOST_LOOP = 100  # tasks: milliseconds each
MOST_KEOPS = 1024  # rows on a CPU
MOST_MATRIX = 8192  # rows: a matrix of scores of a quarter of a gigabyte, several times over


def _point(curve: str, what: str, size: int, problem, tasks: int, steps: int, make: Make) -> Case:
    widths, shots, queries = problem
    model, loss, batch, maml = maml_batch(widths, tasks, shots, queries, steps, make)
    rows: dict[str, Contender] = {"fastmeta": lambda: list(maml.gradients(batch)[1].values())}
    absent = {}

    def peer(name: str, run: Callable, most: int) -> None:
        if tasks <= most:
            rows[name] = lambda: run(model, loss, batch, 0.01, steps)
        else:
            absent[name] = f"left out of curves above {most:,} tasks"

    peer("torch.func", peers.maml_by_vmap, MOST_VMAP)
    peer("task loop", peers.maml_by_loop, MOST_LOOP)
    return Case(
        f"{curve}, {size:,} {what}",
        rows,
        counts.maml(widths, tasks, shots, queries, steps),
        rows_and_gradients(model, batch),
        yardsticks={"supervised on the same rows": lambda: peers.supervised(model, loss, batch)},
        absent=absent,
        quick=tasks <= 1000 and steps <= 10,
        point=(curve, what, size),
    )


def curves(make: Make) -> Iterator[Case]:
    for tasks in (1, 10, 100, 1000, 10_000, 100_000):
        yield _point("MAML sinusoid 1-40-40-1 K1", "tasks", tasks, SINUSOID, tasks, 1, make)
    for tasks in (1, 8, 64, 512):
        yield _point("MAML images 784-64-64-5 K5", "tasks", tasks, IMAGES, tasks, 5, make)
    for steps in (1, 3, 10, 30, 100):
        yield _point("MAML sinusoid 1-40-40-1 T100", "inner steps", steps, SINUSOID, 100, steps, make)
    for rows in (256, 1024, 4096, 16_384):
        embeddings = torch.nn.functional.normalize(make.normal(1, rows, 128), dim=-1).requires_grad_()

        def with_gradient(loss, embeddings=embeddings):
            def run():
                total = loss(embeddings, 0.5).sum()
                return total, torch.autograd.grad(total, embeddings)

            return run

        contenders, absent = {"fastmeta": with_gradient(REGISTRY["contrastive_loss"])}, {}
        if rows <= MOST_KEOPS or make.device.type != "cpu":
            contenders["KeOps"] = with_gradient(peers.nt_xent_by_keops)
        else:
            absent["KeOps"] = f"left out above {MOST_KEOPS:,} rows on a CPU: seconds a call at this width"
        if rows <= MOST_MATRIX:
            contenders["matrix"] = with_gradient(peers.nt_xent)
        else:
            absent["matrix"] = f"left out above {MOST_MATRIX:,} rows: its matrix of scores takes gigabytes"
        # two views: rows are twice the examples; scores are symmetric, their gradient by the rows a whole product
        work = {"flops": 3 * rows * (rows - 1) * 128, "bytes": 2 * counts.nbytes([embeddings])}
        point = "NT-Xent fwd+bwd D128", "rows", rows
        name = f"NT-Xent fwd+bwd D128, {rows:,} rows"
        yield Case(name, contenders, **work, absent=absent, quick=rows <= 4096, point=point)
