"""Peak memory of a meta-gradient of Conv4-64 with four tasks, ours and that of the loop's graph, each in a process of
its own: `python -m benchmarks.conv.memory CONTENDER STEPS`."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from fastmeta.dispatch.spec import Make

from ..memory import resident
from . import peers, problem, rows

# our peak over the loop's graph, and over our own of fewer steps
THIRD, FLAT = 1 / 3, 1.3
LOOP, LEAST = "task loop, losses summed", "fastmeta, memory='sweep'"
OURS = {"fastmeta": {}, LEAST: {"memory": "sweep"}}
RUNS = (("fastmeta", 5), ("fastmeta", 20), (LEAST, 5), (LOOP, 5), ("task loop, a gradient each", 5))


def measure(contender: str, steps: int, small: bool) -> float:
    """Megabytes of resident memory beyond what this process had before its first two calls.

    A net of tiny size goes first, which loads libraries and starts threads. The same net must not: memory that the
    package keeps for results of the next call would then count as having been there before.
    """

    def contender_of(small: bool):
        whole = problem.conv4(Make(torch.float32), small, shots=1, steps=steps, tasks=4)
        if contender in OURS:
            return rows.backward_of(rows.maml(whole, **OURS[contender]), whole.batch)
        return peers.loop(whole, torch.channels_last, summed=contender == LOOP)

    contender_of(True)()
    run = contender_of(small)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would not count again
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    run()
    run()
    return resident("VmHWM") - before


def report(small: bool) -> dict:
    """Every run, and whether the bars are met."""
    found = {}
    for contender, steps in RUNS:
        command = [sys.executable, "-m", f"{__package__}.memory", contender, str(steps), *["small"] * small]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[contender, steps] = json.loads(told.splitlines()[-1])
    graph = found[LEAST, 5] / max(found[LOOP, 5], 1e-9)
    longer = found["fastmeta", 20] / max(found["fastmeta", 5], 1e-9)
    return {
        "title": "Conv4-64 28x28x1 1-shot T4",
        "runs": [{"contender": name, "steps": k, "megabytes": mb} for (name, k), mb in found.items()],
        "of_the_loops_graph": {"ratio": graph, "bar": THIRD, "met": graph <= THIRD},
        "k20_of_k5": {"ratio": longer, "bar": FLAT, "met": longer <= FLAT},
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["small"])))
