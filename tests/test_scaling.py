"""The model of a step on many GPUs: its parts by hand, the page's tables, and processes of this machine."""

import math
from dataclasses import replace

import pytest

from benchmarks import scaling
from benchmarks.scaling import Cluster, Work

WORK = Work(
    "work", flops=1e9, bytes=1e3, rows=100.0, drawn=50.0, parameters=1000, ops=10, reached=0.5, weak=8, strong=64
)


def test_a_ring_and_a_tree_by_hand():
    assert scaling.ring(800.0, 4, 1.0, 100.0) == 2 * 3 * (1.0 + 2.0)
    assert scaling.tree(800.0, 5, 1.0, 100.0) == 2 * (3 * 1.0 + 8.0)
    assert scaling.ring(800.0, 1, 1.0, 100.0) == scaling.tree(800.0, 1, 1.0, 100.0) == 0


def test_nodes_share_what_goes_between_them():
    cluster = Cluster(per_node=2, inside=(0.0, 100.0), between=(1.0, 100.0))
    assert scaling.all_reduce(800.0, 2, cluster) == 8.0
    # four nodes, 400 bytes of each rank: a ring of six messages is slower than a tree of depth two
    assert scaling.all_reduce(800.0, 8, cluster) == 8.0 + min(6 * (1.0 + 1.0), 2 * (2.0 + 4.0))
    assert scaling.all_reduce(1.0, 1, cluster) == 0


def test_parts_of_a_step_by_hand():
    cluster = Cluster(flops=1e12, memory=1e12, reached_memory=0.5, launch=1e-3, jitter=0.1, disk=1e6)
    parts = scaling.step(WORK, 8, 4, cluster)
    assert parts["gradient"] == pytest.approx(8 * 1e9 / 0.5e12)
    assert parts["sampling"] == pytest.approx((8 * 4 * 50 + 2 * 8 * 100) / 0.5e12)  # all are drawn, the own gathered
    assert parts["slowest"] == pytest.approx(0.1 * math.sqrt(2 * math.log(4)) * (parts["gradient"] + parts["sampling"]))
    assert parts["optimiser"] == pytest.approx(7 * 4000 / 0.5e12)
    assert parts["checkpoint"] == pytest.approx(12_000 / 1e6 / 1000)
    assert parts["all-reduce"] == scaling.all_reduce(4000 + 8 * 32, 4, cluster)  # two numbers of each task
    assert parts["host"] == 0
    few = scaling.step(WORK, 1, 1, cluster)
    assert few["host"] + few["gradient"] + few["sampling"] == pytest.approx(10e-3)  # calls take longer than the device
    assert few["slowest"] == few["all-reduce"] == 0
    assert scaling.step(replace(WORK, bytes=1e12), 1, 1, cluster)["gradient"] == 2.0


def test_it_bends_where_half_is_lost():
    ranks = scaling.bend(WORK, True, Cluster())
    alone = sum(scaling.step(WORK, WORK.strong, 1, Cluster()).values())

    def efficiency(n):
        return alone / n / sum(scaling.step(WORK, math.ceil(WORK.strong / n), n, Cluster()).values())

    assert efficiency(ranks) < 0.5 <= efficiency(ranks - 1)
    assert scaling.bend(WORK, False, Cluster(), up_to=8) is None
    drawing = replace(WORK, drawn=1e9)  # which every rank does for all
    assert scaling.bend(drawing, False, Cluster(), up_to=8) == 3


def test_the_page_has_the_models_tables():
    text = scaling.PAGE.read_text()
    wanted = scaling.written(text, scaling.MODEL, scaling.of_model(Cluster()))
    assert text == wanted, "python -m benchmarks.scaling --page writes it"


def test_what_one_process_foretells_of_four():
    # two all-reduces between two: 2 (a + b / 2 w), so a = 1 s and w = 4e6 bytes a second
    small, large = 4 * 1761, 4 * 4_000_000
    one = {"gradient": 2.0, "sampling": 0.5, "small": 0.0, "large": 0.0, "step": 4.0}
    two = {**one, "small": 2 + small / 4e6, "large": 2 + large / 4e6, "step": 5.0}
    rows = scaling.foretold({1: one, 2: two, 4: {**two, "step": 20.0}}, cores=2)
    assert [row["measured"] for row in rows] == [4.0, 5.0, 20.0]
    ring = [scaling.ring(small + 8 * 4000 * n, n, 1.0, 4e6) for n in (2, 4)]
    assert [row["model"] for row in rows] == pytest.approx([4.0, 4.5 + ring[0], 2 * (5.5 + ring[1])])
    lines = scaling.of_measured(rows)
    assert len(lines) == 5 and "| 2 | 8,000 |" in lines[3]


@pytest.mark.slow
def test_processes_run(monkeypatch):
    monkeypatch.setattr(scaling, "HERE", (1, 2))
    rows = scaling.measure()
    assert [row["processes"] for row in rows] == [1, 2] and all(row["measured"] > 0 for row in rows)
