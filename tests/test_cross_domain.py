"""From some domains to others: what is opened, what is run, and who ranks where."""

import importlib
import json
import sys

import pytest
import torch
from rich.console import Console

from fastmeta.cli._results import once
from fastmeta.cli.reproduce import reproduce
from fastmeta.tasks import Examples, clinc, tf_idf
from fastmeta.tasks.domains import WIDTH, Domains, domains
from fastmeta.tasks.read import DataWarning

suite = sys.modules["fastmeta.cli.cross_domain"]


def examples(name, *shape):
    rows = torch.rand(12 * 20, *shape) + torch.rand(12, *shape).repeat_interleave(20, 0)
    return Examples(rows, torch.arange(12).repeat_interleave(20), name=name)


@pytest.fixture
def small(monkeypatch):
    def made(kind, root):
        shape = (1, 28, 28) if kind == "pictures" else (WIDTH,)
        return Domains(*({one: examples(one, *shape) for one in names} for names in (["a", "b"], ["a"], ["c", "d"])))

    monkeypatch.setattr(suite, "domains", made)


def test_rows_are_trained_judged_and_ranked(small, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_MODELS", {k: v | {"minutes": 0.005} for k, v in suite._MODELS.items()})
    only = ["protonet-vectors", "maml-vectors", "nearest-vectors", "ridge-pictures"]
    options = {"data_root": str(tmp_path), "episodes": 8}
    results = reproduce("cross-domain", tmp_path, only=only, console=Console(quiet=True), **options)
    assert sorted(r["name"] for r in results) == sorted(only)
    for result in results:
        assert list(result["far"]) == ["c", "d"] and list(result["near"]) == ["a"]
        assert (result["steps"] > 0) == (result["learner"] != "nearest") and result["trained_on"] == ["a", "b"]
    vectors = [r for r in results if r["kind"] == "vectors"]
    assert sum(r["mean_rank"] for r in vectors) == pytest.approx(1 + 2 + 3)
    best = min(vectors, key=lambda r: r["mean_rank"])
    assert sum(best["far"][d]["mean"] for d in "cd") == max(sum(r["far"][d]["mean"] for d in "cd") for r in vectors)
    table = (tmp_path / "cross-domain" / "table.md").read_text()
    assert table.index("pictures | mean") < table.index("vectors | mean") < table.index(f"| {best['learner']} |")
    monkeypatch.setattr(suite, "_run", lambda *_, **__: pytest.fail("what is done is not run again"))
    assert reproduce("cross-domain", tmp_path, only=only, console=Console(quiet=True), **options) == results


def test_every_learner_can_be_built(small, tmp_path):
    for kind in suite.KINDS:
        for name in suite.NAMES:
            config = suite._config(name, kind, {})
            source = suite.EpisodeSampler(examples("a", *((1, 28, 28) if kind == "pictures" else (WIDTH,))),
                                          ways=5, shots=1, query_shots=5)  # fmt: skip
            suite.build_algorithm(config, source, torch.device("cpu"))


def test_errors(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTMETA_DATA", raising=False)
    with pytest.raises(ValueError, match="needs real data"):
        reproduce("cross-domain", tmp_path)
    with pytest.raises(ValueError, match="rows are .*got maml-sinusoid"):
        reproduce("cross-domain", tmp_path, data_root=str(tmp_path), only=["maml-sinusoid"])
    with pytest.raises(ValueError, match="nothing to train on"):
        domains("pictures", tmp_path)


def test_a_result_that_is_damaged_or_was_judged_otherwise_is_made_anew(tmp_path):
    path, runs = tmp_path / "row" / "result.json", []

    def run(folder):
        runs.append(folder)
        return {"number": len(runs)}

    assert once(path, None, {"episodes": 5}) is None
    assert once(path, run, {"episodes": 5})["number"] == once(path, run, {"episodes": 5})["number"] == 1
    assert once(path, None, {"episodes": 6}) is None and once(path, run, {"episodes": 6})["number"] == 2
    for text in ('{"number": 2, "judged": {"epi', "[]", '{"number": 1}'):
        path.write_text(text)
        count = len(runs)
        assert once(path, run, {"episodes": 6})["number"] == count + 1
    assert json.loads(path.read_text())["judged"] == {"episodes": 6}
    assert once(tmp_path / "other" / "result.json", lambda _: None, {}) is None


def test_real_domains(data_root):
    pictures, vectors = (domains(kind, data_root) for kind in ("pictures", "vectors"))
    assert set(pictures.train) == {"omniglot", "twemoji"} and set(pictures.near) == set(pictures.train)
    assert {"noto", "openmoji", "Latin", "Greek", "Cyrillic", "Thai"} <= set(pictures.far)
    assert set(vectors.train) == {"omniglot", "clinc150"} and "wisdm" in vectors.far
    for part in pictures:
        for one in part.values():
            assert one.input_shape == (1, 28, 28) and one.counts.min() >= 11
            edge = one.rows[one.order][..., 0, :].float().mean()
            assert edge < 60  # bright on black
    for part in vectors:
        for one in part.values():
            assert one.input_shape == (WIDTH,) and one.rows.square().mean().sqrt() == pytest.approx(1, abs=1e-3)
    assert not set(pictures.train["twemoji"].names) & set(pictures.far["noto"].names)


def test_bags_of_words(data_root):
    texts = ["the cat, THE dog", "a bird 12", ""]
    rows = tf_idf(texts, ["the cat", "the dog", "the 1"])
    assert rows.shape == (3, 4)  # the; then 1, cat, dog
    idf = (torch.tensor([4 / 4, 4 / 2, 4 / 2, 4 / 2]).log() + 1)
    first = torch.tensor([2.0, 0, 1, 1]) * idf
    torch.testing.assert_close(rows[0], first / first.norm())
    torch.testing.assert_close(rows[1], torch.tensor([0.0, 1, 0, 0]))
    assert not rows[2].any()
    test = clinc("test", data_root, words=300)
    assert len(test) == 30 and test.counts.eq(150).all() and test.input_shape == (300,)
    assert not set(test.names) & set(clinc("train", data_root, words=10).names)
    with pytest.raises(ValueError, match="CLINC150"):
        clinc("train", data_root / "omniglot")


def make(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_folder_that_is_added_joins(tmp_path, monkeypatch):
    from PIL import Image

    module = importlib.import_module("fastmeta.tasks.domains")
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "is_local", lambda root: True)
    monkeypatch.setattr(module, "omniglot", lambda *_, **__: torch.zeros(6, 20, 1, 28, 28, dtype=torch.uint8))
    for c in range(6):
        for i in range(11 if c else 3):
            Image.new("RGB", (9, 9), (250, 40 * c, i)).save(make(tmp_path / "data" / "stars" / str(c)) / f"{i}.png")
    Image.new("L", (9, 9)).save(make(tmp_path / "data" / "few" / "one") / "a.png")
    with pytest.warns(DataWarning, match="few is left out: 0 of its classes have 11 rows, 5 would be needed"):
        found = domains("pictures", tmp_path / "data")
    assert set(found.train) == {"omniglot"} and set(found.far) == {"stars"}
    assert found.far["stars"].names == ("1", "2", "3", "4", "5")
