"""Few-shot learners as scikit-learn classifiers: in a pipeline, in a grid search, and a trained run by its folder.

    pip install scikit-learn
    python examples/sklearn_pipeline.py
"""

import tempfile

import numpy as np
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import fastmeta
from fastmeta.tasks import glyphs
from fastmeta.training import run_config
from fastmeta.training.run import build_trainer


def main(steps: int = 200, ways: int = 5) -> dict[str, float]:
    # what you would have: pictures uint8 [n, 28, 28], and labels of any type; 20 of each of five new classes
    pictures = glyphs("test")[:ways, :, 0].numpy()
    labels = np.repeat([f"glyph {i}" for i in range(ways)], pictures.shape[1])
    pictures = pictures.reshape(-1, 28, 28)
    few = StratifiedShuffleSplit(n_splits=20, train_size=2 * ways, random_state=0)  # two examples of a class

    # without training: rules on the pixels, scaled as scikit-learn's users do
    pipeline = make_pipeline(StandardScaler(), fastmeta.FewShotClassifier("nearest-mean"))
    grid = {"fewshotclassifier__learner": ["nearest-mean", "nearest", "ridge", "in-context"]}
    search = GridSearchCV(pipeline, grid, cv=few).fit(pictures.reshape(len(pictures), -1), labels)
    scores = dict(zip(grid["fewshotclassifier__learner"], search.cv_results_["mean_test_score"], strict=True))

    # with training on other classes: a run's folder is all that is needed (fastmeta train protonet --data glyphs ...)
    with tempfile.TemporaryDirectory() as run:
        sizes = {"ways": ways, "train_ways": ways, "hidden": (32,), "task_batch": 4, "outer_lr": 2e-3}
        build_trainer(run_config("protonet", "glyphs", iterations=steps, eval_every=0, **sizes), run).run()
        learner = fastmeta.load(run)
    trained = fastmeta.FewShotClassifier(learner, calibrate=True)
    scores["protonet, trained on other glyphs"] = cross_val_score(trained, pictures, labels, cv=few).mean()
    for name, score in scores.items():
        print(f"{100 * score:5.1f} %  {name}")

    trained.fit(pictures[::10], labels[::10])  # two of each
    probabilities = trained.predict_proba(pictures[5:6])[0]
    print("one picture:", dict(zip(trained.classes_.tolist(), probabilities.round(2).tolist(), strict=True)))
    return scores


if __name__ == "__main__":
    main()
