"""`train` and other functions inside another program: threads, signals, strings for paths."""

import asyncio
import contextlib
import json
import pathlib
import signal
import threading
import time
import types

import pytest
from absl import flags

from tests.test_train import quick_runs
from vit_jax.analysis.mistakes import write_mistakes
from vit_jax.checkpoints import Checkpoints, read_parameters
from vit_jax.config import base_config
from vit_jax.data import pipeline
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.experiment import build as experiments
from vit_jax.experiment.data import open_eval_source
from vit_jax.multihost.signals import Stopped, StopSignal, restore_handlers, set_handlers
from vit_jax.multihost.watchdog import Watchdog
from vit_jax.run import curves, workdir
from vit_jax.run.accounting import read_costs
from vit_jax.run.facts import read_facts
from vit_jax.run.metrics import read_jsonl
from vit_jax.train import train
from vit_jax.train_step import TrainStep
from vit_jax.weights import load


@pytest.fixture(scope="module", autouse=True)
def quick(compilation_cache):
    with quick_runs(compilation_cache):
        yield


@pytest.fixture
def config():
    config = base_config()
    config.data.eval_split = "test"
    config.data.image_size = 8
    config.model.name = "ViT-Ti/4"
    config.model.num_layers, config.model.hidden_dim, config.model.mlp_dim, config.model.num_heads = 1, 16, 16, 2
    config.batch_size, config.eval_batch_size, config.steps = 16, 360, 4
    config.log_every_steps = 1
    config.checkpoint.keep_best = False
    config.checkpoint.every_steps = 2
    return config


def losses(path):
    return [row["train/loss"] for row in read_jsonl(path / "metrics.jsonl") if "train/loss" in row]


def in_threads(*calls):
    """Makes concurrent calls in threads; returns what each returned or raised."""
    results = [None] * len(calls)

    def make(index, call):
        try:
            results[index] = call()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=make, args=each) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_concurrent_threads_train_the_same_as_each_alone(config, tmp_path, caplog):
    caplog.set_level("INFO")
    alone = train(config, tmp_path / "alone")
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    caplog.clear()
    both = in_threads(*(lambda name=name: train(config, f"{tmp_path}/{name}") for name in ("a", "b")))
    for name, result in zip(("a", "b"), both, strict=True):
        assert result["test/accuracy"] == alone["test/accuracy"]
        assert losses(tmp_path / name) == losses(tmp_path / "alone")
    assert "not in the main thread: SIGTERM, SIGUSR1, SIGINT are left to the program" in caplog.text
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_two_threads_do_not_train_in_one_workdir(config, tmp_path):
    with workdir.locked(str(tmp_path)):
        (refused,) = in_threads(lambda: train(config, tmp_path))
    assert isinstance(refused, UserError)
    assert "another process is training" in str(refused)


def test_functions_accept_strings_as_paths_and_train_inside_an_event_loop(config, tmp_path):
    path = f"{tmp_path}/run"

    async def notebook():
        return train(config, path)

    assert asyncio.run(notebook())["steps"] == 4
    assert evaluate(config, path)["metrics"]["test/examples"] == 360
    weights = load(path)
    assert write_mistakes(path, weights, open_eval_source(config.data), num_images=1)["examples"] == 360
    curves.plot_curves([path], f"{tmp_path}/curves.png")
    assert read_facts(path).num_classes == 10
    assert read_parameters(f"{path}/checkpoints")[0] == 4
    assert len(read_costs(path)) == len(workdir.read_starts(path)) == 1
    assert read_jsonl(f"{path}/metrics.jsonl")
    with Checkpoints(f"{path}/checkpoints", keep=2) as kept:
        assert kept.latest_step() == 4


def test_an_address_that_became_a_path_is_not_mistaken_for_a_folder(config):
    with pytest.raises(UserError, match="give it as a string"):
        train(config, pathlib.Path("gs://bucket/run"))
    with pytest.raises(UserError, match="cannot use '~nobody-of-this-name/run' as a folder"):
        train(config, "~nobody-of-this-name/run")


@pytest.fixture
def at_step(monkeypatch):
    """Calls a function when a step is taken."""

    def arrange(step, call):
        take, count = TrainStep.__call__, iter(range(1, 100))

        def noted(*args):
            if next(count) == step:
                call()
            return take(*args)

        monkeypatch.setattr(TrainStep, "__call__", noted)

    return arrange


def test_a_signal_in_a_program_saves_and_stops_the_run_and_leaves_the_program_its_handlers(
    config, tmp_path, at_step, monkeypatch
):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("program"))
    programs = signal.getsignal(signal.SIGINT)
    try:
        at_step(1, lambda: signal.raise_signal(signal.SIGINT))  # while the run starts up, it is the program's
        at_step(3, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Stopped):
            train(config, tmp_path)
        assert seen == ["program"]
        assert signal.getsignal(signal.SIGINT) is programs
    finally:
        signal.signal(signal.SIGINT, before)
    assert read_parameters(tmp_path / "checkpoints")[0] == 3
    monkeypatch.undo()
    assert train(config, tmp_path)["steps"] == 4


def test_a_second_signal_is_for_the_programs_own_handler(monkeypatch):
    monkeypatch.setattr("vit_jax.multihost.signals._SAME_NOTICE_SECONDS", 0.2)
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("program"))
    try:
        with StopSignal() as stop:
            stop.arm()
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)  # the same notice, to the process and to its group
            assert (stop.signum, seen) == (signal.SIGTERM, [])
            time.sleep(0.3)
            signal.raise_signal(signal.SIGUSR1)
            assert seen == ["program"]
            with pytest.raises(Stopped):
                stop.check()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_handlers_are_set_only_in_the_main_thread():
    assert in_threads(lambda: set_handlers([signal.SIGUSR2], signal.SIG_IGN)) == [{}]
    before = set_handlers([signal.SIGUSR2], signal.SIG_IGN)
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    restore_handlers({signal.SIGUSR2: None})  # set by C code, which Python cannot set again
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    restore_handlers(before)


def test_a_step_that_hangs_in_a_program_is_reported_once_and_ends_nothing(tmp_path, caplog):
    with Watchdog(0.1, tmp_path, owns_process=False) as watchdog:
        watchdog.beat(6)
        time.sleep(0.5)
        watchdog.beat(7)
        time.sleep(0.3)
    told = [record.getMessage() for record in caplog.records if "has not ended" in record.getMessage()]
    assert [message.partition(" has")[0] for message in told] == ["step 7", "step 8"]
    assert "MainThread" in (tmp_path / "stacks-0.txt").read_text()


def test_nothing_is_saved_after_the_lock_is_lost(config, tmp_path, at_step, monkeypatch):
    lost = []
    opened = workdir.opened
    monkeypatch.setattr(
        workdir, "opened", lambda *args, on_lost, **options: lost.append(on_lost) or opened(*args, **options)
    )
    at_step(3, lambda: lost[0](workdir.LockLostError("lost")))
    with pytest.raises(workdir.LockLostError):
        train(config, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["2"]
    assert not (tmp_path / "emergency").exists()


def test_flags_that_a_program_requires_do_not_stop_the_input(config, monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_string("needed", None, "", flag_values=values, required=True)
    monkeypatch.setattr(pipeline, "flags", types.SimpleNamespace(FLAGS=values))
    with contextlib.closing(experiments.build(config).make_train_batches()) as batches:
        next(batches)
    assert values.is_parsed()


def test_starts_of_a_run_are_merged_by_step(tmp_path):
    config = json.loads(base_config().to_json())

    def start(step, **changes):
        return json.dumps({"step": step, "config": config | changes})

    lines = [start(0), start(4), start(6, seed=1), "damaged", start(2, seed=2), start(5, seed=2, watchdog_seconds=9)]
    (tmp_path / "starts.jsonl").write_text("\n".join(lines) + "\n")
    starts = workdir.read_starts(tmp_path)
    assert [(each.step, each.fields["seed"]) for each in starts] == [(0, 0), (4, 0), (6, 1), (2, 2), (5, 2)]
    assert workdir.describe_changes(starts) == ["seed 0 -> 2 from step 3 on"]
