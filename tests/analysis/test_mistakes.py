import csv
import json
import pathlib
import shutil

import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from tests.data.test_sources import write_image
from tests.test_golden_workdirs import GOLDEN
from vit_jax.analysis import mistakes


def test_confusion_matrix_is_scikit_learns_and_leaves_out_what_has_no_label():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    expected = sklearn.metrics.confusion_matrix(labels, predicted)
    with_unlabelled = mistakes.confusion_matrix(np.append(labels, -1), np.append(predicted, 3), 5)
    np.testing.assert_array_equal(with_unlabelled, expected)


def test_worst_mistakes_are_the_wrong_ones_of_the_highest_probability():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3], [0.95, 0.05]])
    labels = np.array([1, 1, 1, 1, -1])
    assert mistakes.worst_mistakes(probabilities, labels, 10).tolist() == [0, 3, 1]
    assert mistakes.worst_mistakes(probabilities, labels, 2).tolist() == [0, 3]


@pytest.fixture
def run(tmp_path):
    """A run on digits, and the accuracy that its evaluation found."""
    path = pathlib.Path(shutil.copytree(GOLDEN / "run", tmp_path / "run"))
    return path, json.loads((GOLDEN / "evaluation" / "evaluation.json").read_text())["metrics"]["test/accuracy"]


def test_a_run_gets_its_pictures_and_a_table_of_all_images(run, capsys):
    path, accuracy = run
    assert mistakes.main([str(path), "--images=7"]) == 0
    rows = list(csv.DictReader((path / "predictions.csv").open()))
    assert len(rows) == 360
    chances = np.array([[float(row[f"probability of {what}"]) for what in ("true", "predicted")] for row in rows])
    assert np.all(chances[:, 0] <= chances[:, 1])
    right = np.mean([row["true"] == row["predicted"] for row in rows])
    assert right == pytest.approx(accuracy)
    assert f"{100 * right:.2f} % of 360 images of test are right" in capsys.readouterr().out
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(path / name) as picture:
            assert np.ptp(np.asarray(picture.convert("L"))) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--split=tets"], "Did you mean 'test'"), (["--images=0"], "at least 1")],
)
def test_wrong_arguments_are_reported(run, capsys, arguments, message):
    assert mistakes.main([str(run[0]), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_image_that_cannot_be_read_is_named(run, tmp_path, capsys):
    for name in range(10):
        write_image(tmp_path / "test" / str(name) / "1.jpg", 1)
    (tmp_path / "test" / "7" / "1.jpg").write_bytes(b"nonsense")
    assert mistakes.main([str(run[0]), f"--dataset={tmp_path}", "--allow_data_change"]) == 1
    assert f"cannot read {tmp_path}/test/7/1.jpg: not an image" in capsys.readouterr().err


def test_a_folder_that_is_not_a_run_is_reported(tmp_path, capsys):
    assert mistakes.main([str(tmp_path)]) == 1
    assert "is not the workdir of a run" in capsys.readouterr().err
