"""Learners as scikit-learn estimators: the library's own checks, and every learner by hand."""

import importlib
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastmeta
from fastmeta.algorithms import MAML, FastWeights, ProtoNet, RidgeHead
from fastmeta.nn import mlp
from fastmeta.tasks import Inputs
from fastmeta.tasks.read import DataWarning, Features
from fastmeta.training import run_config
from fastmeta.training.registry import ALGORITHMS
from fastmeta.training.run import build_algorithm

sklearn = pytest.importorskip("sklearn")
from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402

from fastmeta.estimators import Adapted, _base  # noqa: E402
from fastmeta.estimators.calibrate import temperature  # noqa: E402

Classifier, Regressor = fastmeta.FewShotClassifier, fastmeta.FewShotRegressor
COUNTS = (2, 4, 3)  # rows of each class
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def problem(seed=0, queries=5):
    """Three classes of unequal size in six dimensions, rows shuffled."""
    generator = torch.Generator().manual_seed(seed)
    middles = 2 * torch.randn(3, 6, generator=generator)
    labels = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    rows = middles[labels] + torch.randn(len(labels), 6, generator=generator)
    query = middles[torch.arange(queries) % 3] + torch.randn(queries, 6, generator=generator)
    return rows.numpy(), labels.numpy(), query.numpy()


def built(name, kind="classification", **options):
    data = "glyphs" if kind == "classification" else "sinusoid"
    sizes = {"ways": 3, "train_ways": 3} if kind == "classification" else {}
    config = run_config(name, data, model="mlp", hidden=(8, 8), iterations=1, **{**sizes, **options})
    return build_algorithm(config, Inputs(kind, (6,), 3 if kind == "classification" else 2), CPU)


@pytest.mark.parametrize(
    "estimator",
    [Classifier(), Classifier("nearest"), Classifier("ridge", calibrate=True), Classifier("in-context"), Regressor()],
    ids=str,
)
def test_scikit_learns_own_checks(estimator):
    check_estimator(estimator, on_skip=None)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_classifier_is_adapt_and_predict(name):
    x, y, query = problem()
    learner = built(name).eval()
    texts = np.array(["ü", "b", "ab"])[y]
    found = Classifier(learner).fit(x, texts)
    assert list(found.classes_) == ["ab", "b", "ü"] and found.n_features_in_ == 6
    with torch.no_grad():
        numbers = torch.tensor([["ab", "b", "ü"].index(text) for text in texts])
        state = learner.adapt(torch.from_numpy(x)[None], numbers[None])
        logits = learner.predict(state, torch.from_numpy(query)[None])[0].double()
    np.testing.assert_allclose(found.predict_proba(query), logits.softmax(1), atol=1e-12)
    assert (found.predict(query) == np.array(["ab", "b", "ü"])[logits.argmax(1)]).all()
    again = pickle.loads(pickle.dumps(found))
    assert (again.predict_proba(query) == found.predict_proba(query)).all()


@pytest.mark.parametrize("name", [name for name, entry in ALGORITHMS.items() if "regression" in entry.kinds])
def test_every_regressor_is_adapt_and_predict(name):
    x, _, query = problem()
    y = np.stack([np.sin(x[:, 0]), x[:, 1]], 1)
    learner = built(name, "regression").eval()
    found = Regressor(learner).fit(x, y)
    with torch.no_grad():
        state = learner.adapt(torch.from_numpy(x)[None], torch.from_numpy(y).float()[None])
        expected = learner.predict(state, torch.from_numpy(query)[None])[0]
    np.testing.assert_allclose(found.predict(query), expected.double(), rtol=1e-6, atol=1e-6)
    assert (pickle.loads(pickle.dumps(found)).predict(query) == found.predict(query)).all()
    assert np.isfinite(found.score(x, y))


def test_ridge_has_an_intercept_that_is_not_penalised():
    from sklearn.linear_model import Ridge

    x, _, query = problem()
    x, query = x.astype(np.float64), query.astype(np.float64)
    y = 7 + 3 * x[:, 0] - x[:, 2]
    expected = Ridge(alpha=1.0).fit(x, y).predict(query)
    np.testing.assert_allclose(Regressor().fit(x, y).predict(query), expected, rtol=1e-9)


@pytest.mark.parametrize("labels", [[3, -5, 70_000], [0.0, 2.0, 1.0], ["b", "é", ""]], ids=str)
def test_labels_of_any_type(labels):
    x, y, query = problem()
    given = [labels[i] for i in y]
    for form in (given, np.array(given), *([torch.tensor(given)] if not isinstance(labels[0], str) else [])):
        found = Classifier(ProtoNet(nn.Flatten())).fit(x, form)
        plain = Classifier(ProtoNet(nn.Flatten())).fit(x, y)
        assert [labels.index(one) for one in found.predict(query).tolist()] == plain.predict(query).tolist()
    two = Classifier().fit(x, y > 0)
    assert two.predict(query).dtype == bool and two.classes_.tolist() == [False, True]


def test_rows_in_any_form_and_in_pieces():
    images = torch.randint(256, (9, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    _, y, _ = problem()
    learner = ProtoNet(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    expected = Classifier(learner).fit(images.numpy(), y).predict_proba(images.numpy())
    last = images.permute(0, 2, 3, 1)
    for form in (images, list(images), images.float() / 255, last, last.numpy(), [one.numpy() for one in last]):
        found = Classifier(learner, chunk_size=2).fit(form, y)
        np.testing.assert_allclose(found.predict_proba(form), expected, atol=1e-6)
    assert found.n_features_in_ == 60
    with pytest.raises(ValueError, match=r"X must be \[n, 4, 5, 3\] as in fit, got \[9, 4, 4, 3\]"):
        found.predict(last[:, :, :4])
    with pytest.raises(ValueError, match="examples of one shape"):
        found.predict([last[0], last[0][:2]])


@pytest.mark.parametrize("name", ["maml", "cavia", "a state that cannot be repeated"])
def test_norms_by_the_rows_at_hand_see_one_query_beside_the_support_set(monkeypatch, name):
    x, y, query = problem()
    if name not in ALGORITHMS:
        name = monkeypatch.delattr(FastWeights, "of_tasks") or "maml"
    learner = built(name, norm="batch").eval()
    found = Classifier(learner, calibrate=True).fit(x, y)
    with torch.no_grad():
        rows = torch.from_numpy(x)[None]
        state = learner.adapt(rows, torch.from_numpy(y)[None])
        each = [torch.cat([rows, torch.from_numpy(row)[None, None]], 1) for row in query]
        logits = torch.stack([learner.predict(state, beside)[0, -1] for beside in each]).double()
        together = learner.predict(state, torch.from_numpy(query)[None])[0].double()
    np.testing.assert_allclose(found.adapted_.predict(torch.from_numpy(query)), logits, atol=1e-6)
    assert not torch.allclose(together, logits, atol=1e-3)
    pieces = Classifier(learner, chunk_size=23).fit(x, y)  # two queries and their support sets
    np.testing.assert_allclose(pieces.adapted_.predict(torch.from_numpy(query)), logits, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_runs_inputs_take_pictures_in_every_layout(channels):
    inputs = Inputs("classification", (channels, 6, 5), 3)
    x = torch.randint(256, (4, channels, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    forms = [x, x.float() / 255, x.permute(0, 2, 3, 1), x.flatten(1)] + ([x[:, 0]] if channels == 1 else [])
    for form in forms:
        torch.testing.assert_close(inputs.prepare(form), x.float() / 255, rtol=0, atol=0)
    with pytest.raises(ValueError, match=rf"\[n, {channels}, 6, 5\] or \[n, 6, 5, {channels}\].* got \[4, 2, 6, 5\]"):
        inputs.prepare(torch.zeros(4, 2, 6, 5))
    assert Inputs.from_json(inputs.as_json()) == inputs


def test_pictures_of_another_range_than_a_runs_are_told():
    learner = ProtoNet(nn.Flatten())
    learner.inputs = Inputs("classification", (3, 6, 5), 3)
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 6, 5))
    for pixels in (x, x.reshape(4, -1).astype(float)):
        with pytest.warns(DataWarning, match="support rows are float.* pictures .* with values up to 25"):
            Classifier(learner).fit(pixels, [0, 0, 1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Classifier(learner).fit(x.astype(np.uint8), [0, 0, 1, 1])


def test_a_tables_scale_is_that_of_training():
    scale = {"mean": [1.0, -2.0], "scale": [2.0, 4.0], "shift": True}
    aims = {"mean": [10.0], "scale": [5.0], "shift": True}
    inputs = Inputs("regression", (3,), 1, table={"features": scale, "targets": aims})
    x = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)  # two numbers, and a column of zeros and ones
    assert inputs.prepare(x).tolist() == [[1.0, 1.0, 1.0]] and inputs.prepare(x).dtype == torch.float64
    assert inputs.prepare_targets(torch.tensor([[15.0]])).tolist() == [[1.0]]
    assert inputs.restore_targets(torch.ones(1, 1)).tolist() == [[15.0]]


def test_a_data_frames_columns_are_those_of_the_runs_table(monkeypatch):
    x, y, query = problem()
    features = Features(("a", "b", "c", "d", "e"), (("f", ("yes",)),), mean=(0.0,) * 5, scale=(1.0,) * 5)
    learner = ProtoNet(nn.Flatten())
    learner.inputs = Inputs("classification", (6,), 3, table={"label": "kind", "features": features.as_json()})
    validate = _base.validate_data

    def of_a_frame(estimator, *given, **options):  # what scikit-learn leaves of a data frame's columns
        found = validate(estimator, *given, **options)
        estimator.feature_names_in_ = np.array(columns, object)
        return found

    monkeypatch.setattr(_base, "validate_data", of_a_frame)
    columns = [*"abcde", "f=yes"]
    assert Classifier(learner).fit(x, y).classes_.tolist() == [0, 1, 2]
    columns = [*"bacde", "f=yes"]
    Classifier().fit(x, y)  # without a run any columns will do
    with pytest.raises(ValueError, match="those of the run's table, a, b, c, d, e, f=yes, in this order; got b, a, c"):
        Classifier(learner).fit(x, y)
    learner.inputs = Inputs("regression", (6,), 1, table={**learner.inputs.table, "targets": None})
    with pytest.raises(ValueError, match="those of the run's table"):
        Regressor(learner).fit(x, query[0, 0] * x[:, 0])


def test_calibration_is_the_best_temperature_for_left_out_rows():
    x, y, query = problem(3)
    learner = ProtoNet(nn.Flatten())
    plain, found = Classifier(learner).fit(x, y), Classifier(learner, calibrate=True, chunk_size=10).fit(x, y)
    logits = []
    for i in range(len(x)):  # by hand: each row from the others
        rest = np.arange(len(x)) != i
        logits.append(Classifier(learner).fit(x[rest], y[rest]).adapted_.predict(torch.from_numpy(x[i : i + 1]))[0])
    logits = torch.stack(logits)
    right = (len(x) + 1) / (len(x) + 3)
    targets = torch.full((len(x), 3), 1 / (len(x) + 3), dtype=torch.float64)
    targets[torch.arange(len(x)), torch.from_numpy(y)] = right
    grid = torch.logspace(-3, 3, 4001, dtype=torch.float64)
    losses = [-(targets * (logits / t).log_softmax(1)).sum() for t in grid]
    assert found.adapted_.temperature == pytest.approx(grid[int(torch.stack(losses).argmin())].item(), rel=4e-3)
    assert found.adapted_.temperature == pytest.approx(temperature(logits, torch.from_numpy(y)), rel=1e-6)
    assert found.adapted_.temperature != 1 and (found.predict(query) == plain.predict(query)).all()
    assert Classifier(learner, calibrate=True).fit(x[1:], [0, *[1] * 7]).adapted_.temperature == 1  # a class of one row
    assert Classifier(calibrate=True).fit(x, ["a"] * len(x)).adapted_.temperature == 1  # of one class nothing is learnt


def test_whole_numbers_that_a_float32_does_not_hold():
    x = 1_600_000_000 + 10 * np.arange(30).reshape(-1, 1)  # times in seconds
    assert Classifier().fit(x, np.arange(30) // 10).predict(x).tolist() == (np.arange(30) // 10).tolist()
    table = {"features": {"mean": [1.6e9], "scale": [10.0], "shift": True}, "targets": None}
    learner = ProtoNet(nn.Flatten())
    learner.inputs = Inputs("classification", (1,), 2, table=table)
    logits = Adapted(learner, torch.tensor(x[:2]), torch.arange(2)).predict(torch.tensor(x[:2]))
    torch.testing.assert_close(logits, torch.tensor([[0.0, -1.0], [-1.0, 0.0]], dtype=torch.float64))


def test_rows_of_which_nothing_can_be_said():
    x, y, query = problem()
    query = query.astype(float)
    query[2] = 1e200
    with pytest.raises(ValueError, match="predictions of 1 rows are not finite, first of row 2, counted from 0: its"):
        Classifier().fit(x.astype(float), y).predict_proba(query)


def test_what_is_refused():
    x, y, query = problem()
    with pytest.raises(ValueError, match="ways must be 3, got 2: this maml was trained with one output per class"):
        learner = built("maml")
        learner.config, learner.inputs = run_config("maml", "glyphs", ways=3), Inputs("classification", (6,), 3)
        Classifier(learner).fit(x, y > 0)
    with pytest.raises(ValueError, match="learner has 4 outputs, and y has 3 classes"):
        Classifier(MAML(mlp([6, 4]))).fit(x, y)
    with pytest.raises(ValueError, match="nearest-mean, nearest, ridge, in-context, a run's folder.*got 'nowhere'"):
        Classifier("nowhere").fit(x, y)
    with pytest.raises(TypeError, match="Linear has no adapt"):
        Classifier(nn.Linear(6, 3)).fit(x, y)
    with pytest.raises(NotFittedError):
        Classifier().predict(query)
    with pytest.raises(TypeError, match="calibrate must be True or False, got 'yes'"):
        Classifier(calibrate="yes").fit(x, y)


def test_the_learner_is_copied_and_left_as_it_was():
    x, y, query = problem()
    learner = ProtoNet(mlp([6, 4]))
    found = Classifier(learner).fit(x, y)
    before = found.predict_proba(query)
    with torch.no_grad():
        learner.encoder[1].weight.zero_()
    assert learner.training and (found.predict_proba(query) == before).all()
    assert clone(found).get_params()["learner"] is not learner and found.get_params()["learner"] is learner


def test_in_a_pipeline():
    x, y, query = problem()
    scaled = make_pipeline(StandardScaler(), Classifier("ridge")).fit(x, y)
    scaler = StandardScaler().fit(x)
    by_hand = Classifier("ridge").fit(scaler.transform(x), y)
    assert (scaled.predict_proba(query) == by_hand.predict_proba(scaler.transform(query))).all()
    scaled.set_params(fewshotclassifier__learner=RidgeHead(nn.Flatten())).fit(x, y)
    assert scaled.score(x, y) > 0.8


def test_without_scikit_learn_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(fastmeta.__dict__, "FewShotClassifier", raising=False)
    with pytest.raises(ImportError, match="FewShotClassifier needs scikit-learn .* pip install scikit-learn"):
        _ = fastmeta.FewShotClassifier
    assert callable(importlib.import_module("fastmeta.estimators").Adapted)
