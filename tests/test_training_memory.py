"""The memory of training, in processes of its own: very many tasks a step, and very many steps."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory as Linux tells it")

BEGIN = """
    import resource, torch
    torch.set_num_threads(1)
    from fastmeta.training import run_config
    from fastmeta.training.run import build_trainer

    def status(name):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))

    def trainer(**given):
        small = {"iterations": 1, "eval_every": 0, "save_every": 0, "device": "cpu"}
        return build_trainer(run_config("maml", "sinusoid", **{**small, **given}), None)
"""


def figures(script):
    """What a script prints, numbers one a line."""
    text = textwrap.dedent(BEGIN) + textwrap.dedent(script)
    found = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=600)
    assert not found.returncode, found.stderr
    return [float(line) for line in found.stdout.split()]


def test_a_hundred_thousand_tasks_a_step_and_a_thousand_steps():
    peak, growth = figures("""
        trainer(task_batch=100_000).train_step()
        print(status("VmHWM"))
        few = trainer(task_batch=4, hidden=(8,))
        for step in range(1000):
            few.train_step()
            if step == 199:
                before = status("VmRSS")
        print(status("VmRSS") - before)
    """)
    assert peak < 1000  # MB, of the whole process
    assert growth < 2


def test_auto_keeps_to_the_memory_that_there_is():
    """Mapped tasks, which would take more than twice as much at once; the limit is of addresses."""
    (chunk,) = figures("""
        small = trainer(task_batch=2, engine="vmap", hidden=(40, 40))
        small.train_step()
        limit = int((status("VmSize") + 256) * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        many = trainer(task_batch=8192, engine="vmap", hidden=(40, 40), task_chunk="auto")
        many.train_step()
        (chunk,) = many.algorithm.auto_chunk.known.values()
        print(chunk.tasks)
    """)
    assert 16 <= chunk < 4096
