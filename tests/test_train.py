"""The loop, called as from a notebook: its files after a failure."""

import contextlib
import itertools
import json
import logging
import re

import cv2
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as cache

from vit_jax.config import base_config
from vit_jax.data.pipeline import TrainBatches
from vit_jax.errors import UserError
from vit_jax.experiment.evaluations import make_evaluations
from vit_jax.multihost import processes
from vit_jax.run import journal
from vit_jax.train import train
from vit_jax.train_step import TrainStep

STEPS = 12


@contextlib.contextmanager
def compiled_once(folder):
    """Keeps compiled programs in a folder, for runs that compile the same ones."""
    cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    cache.reset_cache()


@contextlib.contextmanager
def quick_runs(folder):
    """Runs that compile a program once and draw no curves, which take half a second each."""
    with compiled_once(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "plot_curves", lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def quick(compilation_cache):
    with quick_runs(compilation_cache):
        yield


@pytest.fixture
def config():
    config = base_config()
    config.data.dataset = "digits"
    config.data.eval_split = "test"
    config.data.image_size = 8
    config.model.name = "ViT-Ti/4"
    config.model.num_layers = 1
    config.model.hidden_dim = 32
    config.model.mlp_dim = 32
    config.model.num_heads = 2
    config.batch_size = 16
    config.eval_batch_size = 360
    config.steps = STEPS
    config.log_every_steps = 1
    config.evals.eval_split.every_steps = 6
    config.checkpoint.every_steps = 4
    config.polyak_decay = 0.75
    return config


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: v for name, v in json.loads(line).items() if not name.startswith("time/")} for line in lines]


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.fixture
def fail_at(monkeypatch):
    """Makes the batch of a step, or the step itself, fail."""

    def arrange(step, where):
        name = "__call__" if where is TrainStep else "__next__"
        works, calls = getattr(where, name), itertools.count(1)

        def broken(*args):
            if next(calls) == step:
                raise ZeroDivisionError
            return works(*args)

        monkeypatch.setattr(where, name, broken)

    return arrange


def test_state_of_a_failed_run_is_kept_beside_the_good_ones_and_can_be_resumed(config, tmp_path, monkeypatch, fail_at):
    train(config, tmp_path / "whole")
    workdir = tmp_path / "failed"
    fail_at(8, TrainBatches)
    with pytest.raises(ZeroDivisionError):
        train(config, workdir)
    assert steps_in(workdir / "checkpoints") == [4]
    assert steps_in(workdir / "emergency") == [7]

    # Of a second failure, earlier, nothing of the first is left.
    monkeypatch.undo()
    fail_at(2, TrainStep)
    with pytest.raises(ZeroDivisionError):
        train(config, workdir)
    assert steps_in(workdir / "emergency") == [5]

    monkeypatch.undo()
    (workdir / "emergency" / "5").rename(workdir / "checkpoints" / "5")
    train(config, workdir)
    starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 4, 5]
    assert rows(workdir) == rows(tmp_path / "whole")


def test_state_that_is_not_finite_is_kept_apart_and_says_so(config, tmp_path):
    config.optimizer.learning_rate = 1e30
    config.evals.eval_split.every_steps = None
    with pytest.raises(UserError, match=r"(?s)at step \d.*checkpoint.*learning_rate.*emergency/\d+ for a closer look"):
        train(config, tmp_path)
    assert re.fullmatch(
        r"\S+ is (nan|inf) at step \d+.*", json.loads((tmp_path / "failure.json").read_text())["reason"]
    )
    (step,) = steps_in(tmp_path / "emergency")
    assert step not in steps_in(tmp_path / "checkpoints")


def test_all_processes_must_have_the_same_data(config, tmp_path, monkeypatch):
    def compare(name, value, **_):
        if name == "data":
            raise UserError(value)

    monkeypatch.setattr(processes, "check_same", compare)
    with pytest.raises(UserError, match="training: 1,437 images, digits/train\ntest: 360 images, digits/test"):
        train(config, tmp_path)


def test_average_of_the_parameters_is_evaluated(config, tmp_path, monkeypatch):
    seen = []

    def make_spy(*args, **kwargs):
        (evaluation,) = make_evaluations(*args, **kwargs)
        evaluator = evaluation.evaluator
        sums = evaluator._sums
        evaluator._sums = lambda params, batch: seen.append(np.asarray(params["head"]["bias"])) or sums(params, batch)
        return [evaluation]

    monkeypatch.setattr("vit_jax.experiment.run_parts.make_evaluations", make_spy)
    states = []
    take = TrainStep.__call__

    def noted(step, state, batch):
        state, metrics = take(step, state, batch)
        states.append(np.asarray(state.params["head"]["bias"]))
        return state, metrics

    monkeypatch.setattr(TrainStep, "__call__", noted)
    config.optimizer.learning_rate = 0.01
    train(config, tmp_path)
    average = np.zeros(10)
    for bias in states:
        average = 0.75 * average + 0.25 * bias
    np.testing.assert_allclose(seen[-1], average, rtol=1e-4, atol=1e-7)
    assert np.abs(seen[-1] - states[-1]).max() > 1e-4  # and not the last parameters


@pytest.mark.parametrize(("seconds", "drawn_at"), [(60.0, [4, 12]), (0.0, [4, 8, 12])])
def test_curves_are_drawn_early_regularly_and_at_the_end(seconds, drawn_at, config, tmp_path, monkeypatch):
    seen = []

    def note(workdirs, _):
        rows = [json.loads(line) for line in (workdirs[0] / "metrics.jsonl").read_text().splitlines()]
        seen.append(max(row["step"] for row in rows if "test/accuracy" in row))

    monkeypatch.setattr(journal, "plot_curves", note)
    monkeypatch.setattr(journal, "_SECONDS_BETWEEN_CURVES", seconds)
    config.evals.eval_split.every_steps = 4
    train(config, tmp_path)
    assert seen == drawn_at


def test_restarted_finished_run_only_reports_and_another_seed_gives_another_run(config, tmp_path, caplog):
    config.evals.eval_split.every_steps = None
    train(config, tmp_path / "0")
    before = rows(tmp_path / "0")
    with caplog.at_level(logging.INFO):
        assert train(config, tmp_path / "0")["steps"] == STEPS
    assert f"resumed from the checkpoint of step {STEPS}" in caplog.text
    assert rows(tmp_path / "0") == before
    config.seed = 1
    train(config, tmp_path / "1")
    first, second = rows(tmp_path / "0"), rows(tmp_path / "1")
    # The losses of the first step are those of a head of zeros.
    assert [row["step"] for row in first] == [row["step"] for row in second]
    assert first[1]["train/loss"] != second[1]["train/loss"]


def test_changed_data_set_is_refused_on_resume(config, tmp_path):
    data = tmp_path / "data"
    for split in ("train", "test"):
        for label in range(10):
            folder = data / split / f"class {label}"
            folder.mkdir(parents=True)
            for number in range(2):
                cv2.imwrite(str(folder / f"{number}.png"), np.full((8, 8, 3), 20 * label + number, np.uint8))
    config.data.dataset = str(data)
    config.checkpoint.every_steps, config.evals.eval_split.every_steps = STEPS, None
    train(config, tmp_path / "run")
    (data / "train" / "class 3" / "1.png").unlink()
    with pytest.raises(UserError, match="the data set has changed since the last start"):
        train(config, tmp_path / "run")
