"""A wheel, where it is installed and there are no sources: `make test-wheel` runs this with that environment's Python.

The C++ kernels of every op against the reference, the exact meta-gradient, the command line, and what `fastmeta info`
says of the build. Needs nothing but what the wheel asks for.
"""

import itertools
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

import fastmeta
import fastmeta.functional  # noqa: F401  (fills the registry)
from fastmeta import testing, use_backend
from fastmeta.dispatch import native
from fastmeta.dispatch.spec import REGISTRY, Make


def main() -> None:
    assert Path(fastmeta.__file__).is_relative_to(sysconfig.get_paths()["platlib"]), fastmeta.__file__
    assert native.why_missing is None, native.why_missing
    ops = [spec for spec in REGISTRY.values() if "cpp" in spec.backends]
    with use_backend("cpp"):
        for spec in ops:
            for sample in itertools.islice(spec.samples(Make(torch.float32)), 2):
                testing.check_op(spec, sample.args)
    assert len(ops) > 15, "the kernels are no longer seen"
    check_meta_gradient()

    shown = command("info")
    for word in ("cpp", "compiler", "torch_target", "cpu isa"):
        assert word in shown, f"`fastmeta info` does not say {word}:\n{shown}"
    assert "the native extension" not in shown, shown
    assert "--out" in command("demo", "--help")
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {len(ops)} ops and the command line agree")


def check_meta_gradient() -> None:
    """Two inner steps of MAML on three tasks, against plain autograd, in float64."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    batch = [torch.randn(3, rows, width, dtype=torch.float64) for rows in (5, 7) for width in (2, 1)]
    fastmeta.MAML(net, inner_lr=0.1, inner_steps=2, loss="mse")(fastmeta.TaskBatch(*batch)).loss.backward()
    slow = dict(net.named_parameters())

    def loss(fast, x, y):
        return torch.nn.functional.mse_loss(torch.func.functional_call(net, fast, (x,)), y)

    total = 0
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        fast = slow
        for _ in range(2):
            grads = torch.autograd.grad(loss(fast, support_x, support_y), list(fast.values()), create_graph=True)
            fast = {name: w - 0.1 * g for (name, w), g in zip(fast.items(), grads, strict=True)}
        total = total + loss(fast, query_x, query_y) / len(batch[0])
    for parameter, truth in zip(slow.values(), torch.autograd.grad(total, list(slow.values())), strict=True):
        torch.testing.assert_close(parameter.grad, truth)


def command(*words: str) -> str:
    script = Path(sysconfig.get_paths()["scripts"]) / "fastmeta"
    done = subprocess.run([str(script), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


if __name__ == "__main__":
    main()
