"""Memory of large results of the C++ kernels, which is used again."""

import os
import subprocess
import sys

import pytest
import torch

from fastmeta import functional
from fastmeta.dispatch import backends

pytestmark = pytest.mark.skipif(backends.why_missing("cpp", "cpu") is not None, reason="needs the C++ kernels")


def large(size: int = 1 << 19):
    return functional.pairwise_distance(torch.ones(1, size, 1), torch.zeros(1, 1, 1))


def test_results_of_one_size_follow_each_other_in_one_place():
    first = large()
    place, other = first.data_ptr(), large().data_ptr()
    assert place != other
    del first
    assert large().data_ptr() == place
    assert large((1 << 19) - 100).data_ptr() in (place, other)  # nearly the same size


def test_what_is_in_use_stays():
    kept = [large() for _ in range(4)]
    numbers = [t.clone() for t in kept]
    view = kept[0][:, 5:9]
    del kept[0]
    for _ in range(3):
        large().fill_(7)
    assert (view == 1).all() and all(torch.equal(t, n) for t, n in zip(kept, numbers[1:], strict=True))


def test_it_is_an_ordinary_tensor():
    value = large()
    assert value.device == torch.device("cpu") and value.is_contiguous() and value.storage_offset() == 0
    assert torch.equal(torch.tensor(value.tolist()), value)


def test_what_is_needed_now_stays_whatever_was_needed_before():
    """Blocks of other sizes go first, also where those in use are the largest."""
    code = """
import resource, torch
from fastmeta import functional
queries, classes = {size: torch.ones(1, size << 14, 1) for size in (45, 60, 100)}, torch.zeros(1, 16, 1)
def result(megabytes): return functional.pairwise_distance(queries[megabytes], classes)
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = [result(45) for _ in range(4)]
del before
for step in range(4):
    start = faults()
    large = result(100); del large
    small = result(60); del small
    print(faults() - start)
"""
    found = subprocess.run([sys.executable, "-c", code], env={**os.environ, "FASTMETA_KEEP_MB": "200"},
                           capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    first, *_, last = map(int, found)
    assert last < 0.5 * first and last < 30, found  # no block of a step is fresh


def test_what_is_kept_has_a_bound():
    code = """
import resource, torch
from fastmeta import functional
def large(rows): return functional.pairwise_distance(torch.ones(1, rows, 1), torch.zeros(1, 16, 1))
def now(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() >> 20
large(1000)
before = now()
for step in range(1, 8):
    kept = [large(400_000 * step) for _ in range(2)]
    del kept
print(now() - before)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    used = {
        limit: int(subprocess.run([sys.executable, "-c", code], env={**os.environ, "FASTMETA_KEEP_MB": limit},
                                  capture_output=True, text=True, check=True).stdout)
        for limit in ("0", "200", "2000")
    }  # fmt: skip
    assert used["0"] < 60 and used["200"] < 260 and used["2000"] > 400, used
