"""The C++ kernels of every instruction set that this processor has: the other tests run the one that is chosen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmeta.dispatch import native

pytestmark = pytest.mark.skipif(native.why_missing is not None, reason=str(native.why_missing))

_CHECK = """
import torch
import fastmeta.functional
from fastmeta import _C, testing, use_backend
from fastmeta.dispatch.spec import REGISTRY, Make

assert _C.cpu_features()["isa"] == "{isa}"
count = 0
with use_backend("cpp"):
    for spec in REGISTRY.values():
        for dtype in (torch.float32, torch.float64) if "cpp" in spec.backends else ():
            for sample in spec.samples(Make(dtype)):
                try:
                    testing.check_op(spec, sample.args)
                except AssertionError as error:
                    raise AssertionError(sample.label) from error
                count += 1
print(count)
"""


def instruction_sets() -> list[str]:
    from fastmeta import _C

    features = _C.cpu_features()
    avx2 = features.get("avx2") and features.get("fma")
    avx512 = avx2 and all(features.get(f"avx512{part}") for part in ("f", "vl", "dq", "bw"))
    return ["baseline", *(["avx2"] if avx2 else []), *(["avx512"] if avx512 else [])]


@pytest.mark.parametrize("isa", instruction_sets() if native.why_missing is None else [])
def test_every_op_agrees_with_its_reference(isa):
    done = subprocess.run(
        [sys.executable, "-c", _CHECK.format(isa=isa)],
        env={**os.environ, "FASTMETA_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 100


@pytest.mark.parametrize("isa", instruction_sets()[:-1] if native.why_missing is None else [])
@pytest.mark.parametrize("file, chosen", [("test_lanes.py", ""), ("test_boundaries.py", "float32")])
def test_packs_of_tasks_and_second_blocks_agree_with_the_reference(file, chosen, isa):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen, str(Path(__file__).with_name(file))],
        env={**os.environ, "FASTMETA_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_one_that_is_not_there_is_refused_by_name():
    code = "import torch, fastmeta.functional as f; f.pairwise_distance(torch.ones(1, 1, 1), torch.ones(1, 1, 1))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTMETA_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "FASTMETA_CPU_ISA is 'sse9'; this processor and build support: " in done.stderr
