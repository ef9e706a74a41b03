"""Examples of a training loop run, a few steps each."""

import importlib.util
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("few_glyphs", "one_thread")
EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {  # one of them
    "plain_pytorch_loop": (), "sklearn_pipeline": ("sklearn",), "lightning_module": ("lightning", "pytorch_lightning"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDS)
def test_it_runs(name):
    if NEEDS[name] and not any(importlib.util.find_spec(package) for package in NEEDS[name]):
        pytest.skip(f"needs {NEEDS[name][0]}")
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 60
    runpy.run_path(str(path))["main"](steps=2, ways=3)


def test_personalised_regression(data_root):
    main = runpy.run_path(str(EXAMPLES / "personalised_regression.py"))["main"]
    data = data_root / "parkinsons_telemonitoring" / "parkinsons_updrs.data"
    found = main(["--data", str(data), "--steps", "60"])
    assert found["ridge on learned features"] < found["ridge on the patient's rows"] < found["pooled ridge"]


def test_intents(data_root):
    main = runpy.run_path(str(EXAMPLES / "intents.py"))["main"]
    found = main(["--data", str(data_root / "clinc150"), "--steps", "40", "--words", "600", "--episodes", "100"])
    assert found["ProtoNet"] > 0.5 and found["nearest words"] > 0.5


def test_siren():
    before, after = runpy.run_path(str(EXAMPLES / "siren.py"))["main"](["--steps", "25", "--tasks", "8"])
    assert after > before + 3


def test_emoji_styles(data_root):
    main = runpy.run_path(str(EXAMPLES / "emoji_styles.py"))["main"]
    found = main(["--data", str(data_root / "emoji"), "--minutes", "0.02", "--episodes", "20"])
    assert len(found) == 4 and all(accuracy > 0.1 for accuracy in found.values())  # chance is 0.05
