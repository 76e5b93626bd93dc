"""Files of an earlier version can be used like this version's own; tests/golden/workdirs, and its script.

A failure here means that users' runs are lost. Change the code, not the files.
"""

import csv
import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from tests.test_train import compiled_once
from vit_jax import predict
from vit_jax.analysis import mistakes
from vit_jax.checkpoints import Checkpoints, fingerprints
from vit_jax.evaluate import evaluate
from vit_jax.experiment import build as experiments
from vit_jax.report import __main__ as report
from vit_jax.run.metrics import read_jsonl
from vit_jax.sweep import __main__ as sweep
from vit_jax.train import train
from vit_jax.weights import load

GOLDEN = pathlib.Path(__file__).parent / "golden" / "workdirs"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
LAYOUTS = json.loads((GOLDEN / "layouts.json").read_text())
STOPPED_AT, STEPS = 37, 60


@pytest.fixture(autouse=True)
def workdirs(tmp_path, monkeypatch, compilation_cache):
    """A copy of an earlier version's files, as the working folder."""
    shutil.copytree(GOLDEN, tmp_path / "workdirs")
    monkeypatch.chdir(tmp_path / "workdirs")
    with compiled_once(compilation_cache):
        yield


def make_config(fields=()):
    spec = importlib.util.spec_from_file_location("golden_config", GOLDEN / "config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(dict(fields))
    return config


def read_state(config, folder):
    """The newest state in a folder of checkpoints."""
    with Checkpoints(folder, keep=1) as checkpoints:
        step, state, _ = checkpoints.restore_latest(experiments.build(config).step.abstract_state)
    return step, state


def by_name(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def read_rows(path):
    return [{name: v for name, v in row.items() if not name.startswith("time/")} for row in read_jsonl(path)]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def flatten(predictions):
    return {row["name"]: row["probability"] for row in predictions["predictions"]}


def close(metrics):
    return pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_state_is_restored_bit_exactly():
    saved = json.loads(pathlib.Path(f"run/checkpoints/{STOPPED_AT}/extra/metadata").read_text())["arrays"]
    step, state = read_state(make_config(), "run/checkpoints")
    assert (step, int(state.step)) == (STOPPED_AT, STOPPED_AT)
    assert fingerprints(state) == {name: array["fingerprint"] for name, array in saved.items()}


def test_interrupted_run_resumes_and_ends_as_if_nothing_had_happened():
    config = make_config()
    summary = train(config, "run")
    assert {name: summary[name] for name in EXPECTED["summary"]} == close(EXPECTED["summary"])
    before, rows = read_rows(GOLDEN / "run/metrics.jsonl"), read_rows(pathlib.Path("run/metrics.jsonl"))
    assert rows[: len(before)] == before
    assert [row.keys() for row in rows] == [row.keys() for row in EXPECTED["rows"]]
    for row, expected in zip(rows, EXPECTED["rows"], strict=True):
        assert row == close(expected)
    step, state = read_state(config, "run/checkpoints")
    assert step == STEPS
    with np.load("end.npz") as end:
        found = {f"params{name}": leaf for name, leaf in by_name(state.params).items()}
        assert found.keys() == set(end)
        for name, array in found.items():
            np.testing.assert_allclose(array, end[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("option", LAYOUTS["layouts"])
def test_state_has_the_arrays_that_checkpoints_have(option):
    layout = LAYOUTS["layouts"][option]
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in layout["fields"].items()}
    trees = {part: LAYOUTS["trees"][tree] for part, tree in layout["state"].items()}
    expected = {f"{part}{name}": array for part, tree in trees.items() for name, array in tree.items()}
    state = by_name(experiments.build(make_config(fields)).step.abstract_state)
    assert {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in state.items()} == expected


@pytest.mark.parametrize("weights", ["run", "weights.npz"])
def test_run_and_exported_weights_are_evaluated_as_before(weights):
    result = evaluate(make_config({"weights": weights}), "new")
    assert result["metrics"] == close(EXPECTED["evaluation"]["metrics"])
    assert result["parameters"] == EXPECTED["evaluation"]["parameters"]
    assert result["overlap"] == EXPECTED["evaluation"]["overlap"]
    before, now = (
        json.loads(pathlib.Path(f"{folder}/evaluation.json").read_text()) for folder in ("evaluation", "new")
    )
    assert now["fingerprints"] == before["fingerprints"]


def test_exported_weights_equal_the_runs():
    run, exported = load("run"), load("weights.npz")
    assert exported.describe() == run.describe()
    assert run.arrays.keys() == exported.arrays.keys()
    for name, array in run.arrays.items():
        np.testing.assert_array_equal(array, exported.arrays[name], strict=True)


@pytest.mark.parametrize("weights", ["run", "weights.npz"])
def test_run_and_exported_weights_predict_as_before(weights, capsys):
    assert predict.main([f"--weights={weights}", "--json", "--top=10", "images"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, expected in zip(lines, EXPECTED["predictions"], strict=True):
        found = json.loads(line)
        assert found["image"] == expected["image"]
        assert flatten(found) == close(flatten(expected))


def test_mistakes_of_a_run_are_found_as_before():
    assert mistakes.main(["run"]) == 0
    matrix = np.zeros((10, 10), int)
    for row in read_csv("run/predictions.csv"):
        matrix[int(row["true"]), int(row["predicted"])] += 1
    assert matrix.tolist() == EXPECTED["confusion"]


def test_finished_sweep_is_collected_as_before():
    before = json.loads(pathlib.Path("sweep/sweep.json").read_text())
    assert sweep.main(["--config=config.py", "--workdir=sweep", *EXPECTED["sweep"], "--collect"]) == 0
    now = json.loads(pathlib.Path("sweep/sweep.json").read_text())
    for result in (before, now):
        for task in result["tasks"].values():
            assert task.pop("notes")  # in words
    assert now == before


def test_report_has_the_rows_it_had():
    assert report.main(["run", "sweep", "evaluation", "--out=report"]) == 0
    assert read_csv("report/results.csv") == EXPECTED["results"]
    assert read_csv("report/runs.csv") == EXPECTED["runs"]
