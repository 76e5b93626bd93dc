"""Sweeps: runs, choice, resuming, messages."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import XLA_FLAGS
from tests.conftest import ROOT, main_environment
from vit_jax.config import LENGTHS
from vit_jax.errors import UserError
from vit_jax.run.journal import NonFiniteError
from vit_jax.sweep import Sweep, results
from vit_jax.sweep import __main__ as command
from vit_jax.sweep.subprocesses import Children, FailedRunError
from vit_jax.sweep.trials import field_of, load_config, make_tasks, slug

TINY = "tests/configs/tiny.py:steps=3"
TASKS = "tests/configs/tiny_sweep.py"
VALIDATION = "train[90%:]"
ON_VALIDATION = ("--config.data.train_split=train[:90%]", f"--config.data.eval_split={VALIDATION}")
FIELDS = (*ON_VALIDATION, "--config.eval_batch_size=96")
RATE = "optimizer.learning_rate"
AREA = "data.crop_min_area"
FINAL = {"data.train_split": "train", "data.eval_split": "test"}
RATES = Sweep(choose={RATE: (0.001, 0.01, 0.1)}, final=FINAL, seeds=2)
SWEEP = Sweep(choose=[{AREA: 0.05}, {AREA: 0.9}, {RATE: 1e38}], final=FINAL, seeds=2)


def leave_results(run, **metrics):
    """Leaves the files that a finished run leaves, with metrics of our choice."""
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "config.json").write_text(run.config.to_json())
    (run.path / "metrics.jsonl").write_text(json.dumps({"step": 3, "time/seconds": 1.0, **metrics}) + "\n")
    (run.path / "summary.json").write_text("{}")


def pretend(run):
    """Writes a trained run's files without training: numbers depend on field and seed; one learning rate diverges.

    Files of real runs are read in tests/report/test_collect.py, and one is started and stopped below.
    """
    if run.config.optimizer.learning_rate > 1e30:
        run.path.mkdir(parents=True)
        (run.path / "config.json").write_text(run.config.to_json())
        raise FailedRunError(str(NonFiniteError(3, "loss", float("nan"))))
    reached = run.config.data.crop_min_area / 2 + 0.1 * run.config.seed
    split = run.config.data.eval_split
    leave_results(run, **{f"{split}/accuracy": reached, f"{split}/loss": 1 - reached, "train/loss": 2 - reached})


def train_nothing(run):
    raise AssertionError(f"{run.path} should not be trained")


def sweep_in(path, sweep=SWEEP, *, train=train_nothing):
    return command.run_sweep(make_tasks(sweep, TINY, FIELDS, path), path, train)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished sweep in which one learning rate diverged."""
    path = tmp_path_factory.mktemp("sweep") / "sweep"
    with contextlib.chdir(ROOT):
        sweep_in(path, train=pretend)
    return path


@pytest.fixture
def copied(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def read(path):
    (task,) = json.loads((path / "sweep.json").read_text())["tasks"].values()
    return task


def last_value(workdir, name):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row][-1]


def leave_trials(task, metric, values):
    for run, value in zip(task.trials, values, strict=True):
        leave_results(run, **{metric: value})


def choose(path, values, **changes):
    """The result of a sweep over three learning rates that reached these accuracies."""
    (task,) = make_tasks(dataclasses.replace(RATES, **changes), TINY, FIELDS, path)
    leave_trials(task, f"{VALIDATION}/{task.sweep.metric}", values)
    return results.collect(task)


# What is chosen, and what is reported.


def test_chosen_is_the_value_with_the_best_validation_accuracy(finished):
    name = f"{VALIDATION}/accuracy"
    accuracies = {area: last_value(finished / "trials" / f"{AREA}={area}", name) for area in (0.05, 0.9)}
    assert accuracies[0.05] != accuracies[0.9]
    assert read(finished)["chosen"] == {AREA: max(accuracies, key=accuracies.get)}


def test_final_runs_have_the_chosen_value_all_of_train_and_their_own_seeds(finished):
    task = read(finished)
    configs = [json.loads((finished / run["workdir"] / "config.json").read_text()) for run in task["final"]]
    assert [config["seed"] for config in configs] == [0, 1]
    for config in configs:
        assert config["data"]["crop_min_area"] == task["chosen"][AREA]
        assert (config["data"]["train_split"], config["data"]["eval_split"]) == ("train", "test")


def test_mean_and_sample_standard_deviation_are_numpys(finished):
    task = read(finished)
    for name in ("test/accuracy", "test/loss", "train/loss"):
        values = [last_value(finished / run["workdir"], name) for run in task["final"]]
        assert len(set(values)) == 2
        np.testing.assert_allclose(task["mean"][name], np.mean(values), rtol=1e-12)
        np.testing.assert_allclose(task["std"][name], np.std(values, ddof=1), rtol=1e-12)


@pytest.mark.parametrize(
    ("fields", "choose", "final", "tried", "last"),
    [
        ((), {"epochs": (1, 2)}, {}, [{"epochs": 1.0}, {"epochs": 2.0}], {"epochs": 1.0}),
        ((), {"epochs": (1, 2)}, {"steps": 9}, [{"epochs": 1.0}, {"epochs": 2.0}], {"steps": 9}),
        (("--config.images=80",), {}, {"epochs": 3}, [], {"epochs": 3.0}),
        (("--config.images=80",), {}, {}, [], {"images": 80}),
        (("--config.images=80",), {}, {"epochs": "None"}, [], {"images": 80}),
    ],
)
def test_last_given_length_is_the_length_of_the_run(fields, choose, final, tried, last, tmp_path):
    def lengths(run):
        return {name: run.config[name] for name in LENGTHS if run.config[name] is not None}

    (task,) = make_tasks(Sweep(choose=choose, final=FINAL | final), TINY, (*ON_VALIDATION, *fields), tmp_path)
    assert [lengths(run) for run in task.trials] == tried
    assert {tuple(lengths(run).items()) for run in task.final_runs(task.candidates[0])} == {tuple(last.items())}


def test_seeds_of_final_runs_start_with_the_configs(tmp_path):
    (task,) = make_tasks(RATES, TINY, (*FIELDS, "--config.seed=5"), tmp_path)
    assert [run.config.seed for run in task.trials] == [5, 5, 5]
    assert [run.config.seed for run in task.final_runs(task.candidates[0])] == [5, 6]


def test_single_final_run_has_no_deviation(tmp_path):
    sweep_in(tmp_path, Sweep(final=FINAL, seeds=1), train=pretend)
    assert read(tmp_path)["std"]["test/accuracy"] is None
    assert "±" not in (tmp_path / "sweep.md").read_text()


def test_metric_of_training_chooses_whatever_is_evaluated(tmp_path):
    on_test = ("--config.data.eval_split=test",)
    (task,) = make_tasks(Sweep(choose={RATE: (0.1, 0.2)}, metric="train/loss"), TINY, on_test, tmp_path)
    leave_trials(task, "train/loss", (2.0, 1.0))
    assert results.collect(task).chosen == {RATE: 0.2}
    assert "chosen by train/loss, which is measured on the training data" in results.to_markdown(
        [results.collect(task)]
    )


def test_mixture_without_the_data_set_to_choose_by_shares_no_examples(tmp_path):
    mixture = ("--config.data.mixture=(('/x',1.0),('/y',2.0))", f"--config.data.eval_split={VALIDATION}")
    assert len(make_tasks(dataclasses.replace(RATES, seeds=0), TINY, mixture, tmp_path)[0].trials) == 3


def test_run_that_diverges_is_listed_with_its_reason_and_the_others_continue(finished):
    assert [trial["status"] for trial in read(finished)["trials"]] == ["finished", "finished", "diverged"]
    assert "loss is nan at step 3" in (finished / "sweep.md").read_text()


def test_trials_keep_one_checkpoint_and_final_runs_what_the_config_says(finished):
    task = read(finished)
    kept = {run["workdir"]: json.loads((finished / run["workdir"] / "config.json").read_text())["checkpoint"]
            for run in (task["trials"][0], task["final"][0])}  # fmt: skip
    assert [(each["keep"], each["keep_best"]) for each in kept.values()] == [(1, False), (2, True)]


def test_equal_values_are_decided_by_the_order_of_the_grid(tmp_path):
    result = choose(tmp_path, (0.5, 0.7, 0.7))
    assert result.chosen == {RATE: 0.01}
    assert any("is no better than optimizer.learning_rate=0.1" in note for note in result.notes)


@pytest.mark.parametrize(
    ("values", "note"), [((0.5, 0.7, 0.9), "0.1 is the largest"), ((0.9, 0.7, 0.5), "0.001 is the smallest")]
)
def test_best_value_at_the_edge_of_the_grid_is_noted(values, note, tmp_path):
    assert any(note in each for each in choose(tmp_path, values).notes)


def test_best_value_in_the_middle_of_the_grid_needs_no_note(tmp_path):
    assert choose(tmp_path, (0.5, 0.9, 0.7)).notes == []


def test_smallest_loss_is_chosen(tmp_path):
    assert choose(tmp_path, (3.0, 1.0, 2.0), metric="loss").chosen == {RATE: 0.01}


def test_metric_that_is_not_finite_is_never_chosen(tmp_path):
    assert choose(tmp_path, (float("nan"), 0.1, 0.2)).chosen == {RATE: 0.1}


def test_mean_over_seeds_in_the_grid_counts(tmp_path):
    sweep = Sweep(choose={RATE: (0.001, 0.01), "seed": (0, 1)}, final=FINAL)
    (task,) = make_tasks(sweep, TINY, FIELDS, tmp_path)
    leave_trials(task, f"{VALIDATION}/accuracy", (0.1, 0.9, 0.6, 0.6))
    assert results.collect(task).chosen == {RATE: 0.01}


def test_value_with_a_seed_that_diverged_is_not_chosen(tmp_path):
    (task,) = make_tasks(Sweep(choose={RATE: (0.001, 0.01), "seed": (0, 1)}, final=FINAL), TINY, FIELDS, tmp_path)
    leave_trials(task, f"{VALIDATION}/accuracy", (0.1, 0.1, 0.9, float("nan")))
    assert results.collect(task).chosen == {RATE: 0.001}


def test_nothing_is_chosen_while_trials_are_missing(tmp_path):
    (task,) = make_tasks(dataclasses.replace(RATES, choose={RATE: (0.1, 0.2)}), TINY, FIELDS, tmp_path)
    leave_results(task.trials[0], **{f"{VALIDATION}/accuracy": 0.5})
    result = results.collect(task)
    assert result.chosen is None
    assert result.due == [task.trials[1]]


def test_means_over_tasks_and_groups_and_their_deviation_over_seeds(tmp_path, capsys):
    arguments = [f"--config={TASKS}", f"--workdir={tmp_path}", "--grid=seed=0", "--collect"]
    sweep = command.make_sweep(command.make_parser().parse_args(arguments))
    tasks = make_tasks(sweep, TASKS, (), tmp_path)
    reached = np.array([[0.2, 0.3, 0.7], [0.5, 0.4, 0.9]])  # [tasks, seeds]
    for task, values in zip(tasks, reached, strict=True):
        for run, value in zip(task.final_runs({}), values, strict=True):
            leave_results(run, **{"test/accuracy": value})
    assert command.main(arguments) == 0
    means = json.loads((tmp_path / "sweep.json").read_text())["means"]
    over_tasks = reached.mean(axis=0)
    np.testing.assert_allclose(means["all"]["mean"], reached.mean())
    np.testing.assert_allclose(means["all"]["std"], over_tasks.std(ddof=1))
    np.testing.assert_allclose(means["only"]["mean"], reached[1].mean())
    np.testing.assert_allclose(means["only"]["std"], reached[1].std(ddof=1))
    assert re.search(r"mean of all +\| 2 tasks, 3 seeds \| 50.00 % ± 25.98 %", capsys.readouterr().out)


def test_tasks_are_chosen_for_each_by_itself(tmp_path):
    tasks = make_tasks(command.make_sweep(command.make_parser().parse_args(
        [f"--config={TASKS}", f"--workdir={tmp_path}"])), TASKS, (), tmp_path)  # fmt: skip
    leave_trials(tasks[0], f"{VALIDATION}/accuracy", (0.1, 0.1, 0.9, 0.9, 0.2, 0.2))
    leave_trials(tasks[1], f"{VALIDATION}/accuracy", (0.9, 0.9, 0.1, 0.1, 0.2, 0.2))
    assert [results.collect(task).chosen[RATE] for task in tasks] == [0.01, 0.001]
    assert {run.config.data.train_split for run in tasks[1].trials} == {"train[50%:90%]"}


# How one goes on.


def test_finished_sweep_started_again_trains_nothing_not_even_what_diverged(copied):
    before = (copied / "sweep.json").read_text()
    sweep_in(copied)
    assert (copied / "sweep.json").read_text() == before


def test_only_the_unfinished_run_is_trained_again_and_the_result_is_the_same(copied):
    before = (copied / "sweep.json").read_text()
    unfinished = copied / read(copied)["final"][1]["workdir"]
    (unfinished / "summary.json").unlink()
    trained = []

    def train(run):
        trained.append(run.path)
        pretend(run)

    sweep_in(copied, train=train)
    assert trained == [unfinished]
    assert (copied / "sweep.json").read_text() == before


def fail(run):
    raise FailedRunError(f"{run.path.name}: No space left on device")


def test_grown_grid_trains_the_added_values_only(copied):
    chosen = read(copied)["chosen"]
    sweep_in(copied, dataclasses.replace(SWEEP, choose=[{AREA: 0.5}, *SWEEP.choose]), train=fail)
    statuses = [(trial["overrides"].get(AREA), trial["status"]) for trial in read(copied)["trials"]]
    assert statuses == [(0.5, "failed"), (0.05, "finished"), (0.9, "finished"), (None, "diverged")]
    assert read(copied)["chosen"] == chosen


def test_grid_that_lost_values_is_refused(copied):
    with pytest.raises(UserError, match=rf"trials/{AREA}=0\.05"):
        sweep_in(copied, dataclasses.replace(SWEEP, choose=SWEEP.choose[1:]))


def test_value_that_was_never_tried_may_leave_the_grid(tmp_path, capsys):
    printed_configs(tmp_path, capsys)
    smaller = [each.replace("0.001,0.01,0.1", "0.001,0.01") for each in command_line(tmp_path, "--print_commands")]
    assert command.main(smaller) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_other_config_is_refused_with_the_fields_that_differ(copied):
    with pytest.raises(UserError, match="batch_size: 16 -> 32"):
        make_tasks(SWEEP, TINY, (*FIELDS, "--config.batch_size=32"), copied)


def test_failed_run_is_listed_and_tried_again_by_the_next_start(copied):
    shutil.rmtree(copied / "trials" / f"{AREA}=0.9")
    sweep = dataclasses.replace(SWEEP, seeds=0)
    sweep_in(copied, sweep, train=fail)
    assert read(copied)["chosen"] == {AREA: 0.05}
    assert "No space left on device" in (copied / "sweep.md").read_text()
    again = []
    sweep_in(copied, sweep, train=lambda run: again.append(run.path.name))
    assert again == [f"{AREA}=0.9"]


def test_error_on_another_machine_counts_as_failed_until_the_run_resumes(tmp_path):
    (task,) = make_tasks(SWEEP, TINY, FIELDS, tmp_path)
    run = task.trials[0]
    (run.path / "emergency" / "3").mkdir(parents=True)
    (run.path / "config.json").write_text(run.config.to_json())
    assert run.read().status == "failed"
    (run.path / "checkpoints" / "4").mkdir(parents=True)
    assert run.read().status == "unfinished"


def hold(folder):
    """A process that works in a folder, until half a second after its input ends."""
    code = """if True:
        import fcntl, sys, time
        lock = open(sys.argv[1], "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("locked", flush=True)
        sys.stdin.read()
        time.sleep(0.5)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    return holder


def processes_below(pid):
    children = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in children for child in path.read_text().split()]


@pytest.fixture
def start_sweep(compilation_cache):
    """Starts `python -m vit_jax.sweep` in the background; ends it with the test."""
    processes = []

    environment = main_environment(compilation_cache, XLA_FLAGS=XLA_FLAGS)

    def start(*arguments):
        processes.append(subprocess.Popen(
            [sys.executable, "-m", "vit_jax.sweep", *arguments], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        ))  # fmt: skip
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            for pid in (process.pid, *processes_below(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_sigterm_in_the_middle_of_a_run_saves_it_and_ends_the_sweep(tmp_path, start_sweep):
    path = tmp_path / "sweep"
    place = "tests/configs/tiny.py:steps=4000,checkpoint=2000"
    process = start_sweep(f"--config={place}", f"--workdir={path}", "--grid=seed=7", "--seeds=0")
    workdir = path / "trials" / "seed=7"
    deadline = time.time() + 120
    while not ((workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").read_text()):
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "SIGTERM: run the same command to resume" in output
    (saved,) = (int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(3, saved + 1, 3))
    assert read(path)["trials"][0]["status"] == "unfinished"
    config = json.loads((workdir / "config.json").read_text())
    (task,) = make_tasks(Sweep(choose={"seed": (7,)}, seeds=0), place, (), path)
    assert config == json.loads(task.trials[0].config.to_json())


def test_run_that_another_process_trains_is_waited_for(tmp_path):
    (task,) = make_tasks(SWEEP, TINY, FIELDS, tmp_path)
    task.trials[0].path.mkdir(parents=True)
    holder, begin = hold(task.trials[0].path), time.time()
    holder.stdin.close()  # in half a second it lets go
    Children().wait_for_others(task.trials[0])
    assert time.time() - begin > 0.5
    holder.wait()


# Several machines.


def command_line(path, *more):
    return ["--config=" + TINY, f"--workdir={path}", *FIELDS, f"--grid={RATE}=0.001,0.01,0.1", "--seeds=2",
            "--final=data.train_split=train,data.eval_split=test", *more]  # fmt: skip


def printed_configs(path, capsys):
    """The configs and workdirs of the commands that are printed."""
    assert command.main(command_line(path, "--print_commands")) == 0
    found = {}
    for line in capsys.readouterr().out.splitlines():
        python, flag, module, config, *fields, workdir = shlex.split(line)
        assert (python, flag, module) == ("python", "-m", "vit_jax.main")
        assert len(set(map(field_of, fields))) == len(fields)  # none says two things
        loaded = load_config(config.removeprefix("--config="), fields)
        found[workdir.removeprefix(f"--workdir={path}/")] = loaded
    return found


def test_printed_commands_run_the_trials_then_the_final_runs(tmp_path, capsys):
    trials = printed_configs(tmp_path, capsys)
    assert list(trials) == [f"trials/{RATE}={rate}" for rate in (0.001, 0.01, 0.1)]
    assert [config.optimizer.learning_rate for config in trials.values()] == [0.001, 0.01, 0.1]
    (task,) = make_tasks(RATES, TINY, FIELDS, tmp_path)
    leave_trials(task, f"{VALIDATION}/accuracy", (0.1, 0.3, 0.2))
    final = printed_configs(tmp_path, capsys)
    assert list(final) == [f"final/{RATE}=0.01/seed_{seed}" for seed in (0, 1)]
    assert [(config.seed, config.data.eval_split) for config in final.values()] == [(0, "test"), (1, "test")]


def test_collect_prints_the_commands_of_missing_runs(tmp_path, capsys):
    (task,) = make_tasks(RATES, TINY, FIELDS, tmp_path)
    for run in task.trials[:2]:
        leave_results(run, **{f"{VALIDATION}/accuracy": 0.5})
    assert command.main(command_line(tmp_path, "--collect")) == 1
    output = capsys.readouterr().out
    assert task.trials[2].command_line() in output
    assert task.trials[1].command_line() not in output
    assert [trial["status"] for trial in read(tmp_path)["trials"]] == ["finished", "finished", "missing"]


def test_sweep_in_which_all_diverged_is_an_error_that_says_so(tmp_path, capsys):
    (task,) = make_tasks(RATES, TINY, FIELDS, tmp_path)
    for run in task.trials:
        run.record_failure("loss is nan at step 3. No checkpoint was saved before it.")
    assert command.main(command_line(tmp_path, "--collect")) == 1
    output = capsys.readouterr().out
    assert "Nothing can be chosen" in output and "vit_jax.main" not in output
    assert "loss is nan at step 3" in output


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid=optimizer.learning_rat=1"], "Did you mean 'optimizer.learning_rate'?"),
        (["--grid=optimizer=1"], "optimizer is a group of fields"),
        (["--grid=batch_size=16,many"], "--config.batch_size=many"),
        (["--grid=batch_size=16,1.5"], "--config.batch_size=1.5"),
        (["--grid=optimizer.learning_rate=-1"], "must be at least 0"),
        (["--grid=optimizer.learning_rate="], "has no value for optimizer.learning_rate"),
        (["--grid=optimizer.learning_rate"], "--grid takes field=value"),
        (["--grid=seed=1", "--grid=seed=2"], "gives seed twice"),
        (["--grid=seed=1", "--config.seed=2"], "seed is in the grid, and set with --config.seed too"),
        (["--grid=steps=3,4", "--config.epochs=2"], "steps is in the grid, and --config.epochs sets the length"),
        (["--grid=steps=3,4", "--grid=epochs=1"], "--config.epochs=1.0 and --config.steps=3 both set the length"),
        (["--seeds=2", "--config.steps=4", "--config.images=20"], "both set the length of the run"),
        (["--grid=batch_size=8,16", "--final=batch_size=16"], "batch_size is chosen by the grid"),
        (["--seeds=2", "--final=seed=3"], "leave seed out of final"),
        (["--seeds=2", "--final=test"], "--final takes field=value"),
        (["--seeds=-1"], "seeds must be 0"),
        (["--seeds=2", "--config.data.eval_split=None"], "data.eval_split is None"),
        (["--seeds=2", "--final=data.eval_split=None"], "data.eval_split is None"),
        (["--grid=batch_size=8,16"],
         "'test' of digits, what the final runs are evaluated on, shares 360 of its 360 examples with 'test' of"),
        (["--grid=batch_size=8,16", "--config.data.eval_split=test[:10%]", "--final=data.eval_split=test"],
         "shares 36 of its 360 examples with 'test[:10%]' of digits, what the values are chosen by"),
        (["--grid=batch_size=8,16", "--seeds=0", "--config.data.eval_split=train[90%:]"],
         "'train[90%:]' of digits, what the values are chosen by, shares 144 of its 144 examples with 'train' of"),
        (["--grid=batch_size=8,16", "--seeds=0", "--config.data.eval_split=train[90%:]",
          "--config.data.mixture=(('digits',1.0),('/x',2.0))"],
         "shares 144 of its 144 examples with 'train' of digits, what is trained on"),
        ([], "there is nothing to sweep over"),
        (["--seeds=2", "--config.sed=3"], "unknown config field 'sed'. Did you mean 'seed'?"),
        (["--seeds=2", "steps=3"], "unexpected argument 'steps=3'"),
        (["--seeds=2", "--config=tests/configs/tyni.py"], "there is no config file tests/configs/tyni.py"),
    ],
)  # fmt: skip
def test_mistake_is_one_message_and_makes_nothing(arguments, message, tmp_path, capsys):
    path = tmp_path / "sweep"
    assert command.main([f"--config={TINY}", f"--workdir={path}", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_unknown_metric_ends_the_sweep_after_the_first_run_and_lists_the_metrics(finished, tmp_path):
    sweep = dataclasses.replace(SWEEP, metric="acuracy", seeds=0)
    with pytest.raises(UserError, match=r"has no metric 'train\[90%:\]/acuracy'.*train\[90%:\]/accuracy"):
        sweep_in(tmp_path, sweep, train=lambda run: shutil.copytree(
            finished / "trials" / run.path.name, run.path, dirs_exist_ok=True))  # fmt: skip
    assert [path.name for path in (tmp_path / "trials").iterdir()] == [f"{AREA}=0.05"]


def test_second_sweep_in_the_folder_at_the_same_time_is_refused(copied):
    holder = hold(copied)
    with pytest.raises(UserError, match="another process"):
        sweep_in(copied)
    holder.communicate("")


def test_folders_of_other_values_have_other_names():
    values = ["train[:90%]", "train[:90 ]", "train_90_", "a/b", "a_b", "x" * 300, "x" * 301]
    names = [slug({"data.train_split": value}) for value in values]
    assert len(set(names)) == len(names)
    assert all(len(name) < 150 and "/" not in name for name in names)
