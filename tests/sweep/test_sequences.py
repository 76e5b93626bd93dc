"""Sweeps that follow each other, and early stopping."""

import dataclasses
import json

import pytest

from tests.conftest import ROOT
from tests.sweep.test_sweep import VALIDATION, leave_results, pretend, train_nothing
from vit_jax.data.sources import MissingDataError
from vit_jax.errors import UserError
from vit_jax.run.run_result import RunResult
from vit_jax.sweep import Sweep, results
from vit_jax.sweep import __main__ as command
from vit_jax.sweep.subprocesses import FailedRunError
from vit_jax.sweep.trials import load_config, make_tasks

PAGE = "tests/configs/tiny_sequence.py"
TINY = "tests/configs/tiny.py:steps=3"
DECAY = "optimizer.weight_decay"
ONE = {"tasks": {"one": "stage=pretrain"}, "seeds": 1}
TWO = {"tasks": {"two": "stage=finetune"}, "weights": {"two": "one"}}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def sweeps_of(path, *flags):
    return command.make_sweep(command.make_parser().parse_args([f"--config={PAGE}", f"--workdir={path}", *flags]))


def sweep_in(path, train, *flags):
    return command.run_sweep(make_tasks(sweeps_of(path, *flags), PAGE, (), path), path, train)


def train(run):
    """Pretends to train: weight decay 0.1 is better, and so is a smaller learning rate."""
    reached = 0.5 + run.config.optimizer.weight_decay - run.config.optimizer.learning_rate
    leave_results(run, **{f"{run.config.data.eval_split}/accuracy": reached})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path, order = tmp_path_factory.mktemp("sequence") / "sweep", []

    def train_in_order(run):
        order.append(run)
        train(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        sweep_in(path, train_in_order)
    return path, order


def read(path):
    return json.loads((path / "sweep.json").read_text())


def test_run_begins_with_the_earlier_run_of_its_seed_and_of_the_chosen_value(finished):
    path, order = finished
    chosen = path / "first" / "final" / f"{DECAY}=0.1"
    final = [run for run in order if run.is_final and run.config.weights and "first" in run.config.weights]
    assert [(run.config.seed, run.config.weights) for run in final] == [
        (seed, str(chosen / f"seed_{seed}")) for seed in (0, 1)
    ]
    trials = [run for run in order if not run.is_final and run.config.weights and "first" in run.config.weights]
    assert {run.config.weights for run in trials} == {str(chosen / "seed_0")} and len(trials) == 2
    assert f"--config.weights={chosen / 'seed_0'}" in trials[0].command()


def test_run_comes_after_the_run_whose_weights_it_begins_with(finished):
    _, order = finished
    done = [str(run.path) for run in order]
    for position, run in enumerate(order):
        assert run.config.weights is None or run.config.weights in done[:position]


def test_task_without_weights_begins_from_scratch(finished):
    assert {run.config.weights for run in finished[1] if "scratch" in str(run.path)} == {None}


def test_results_say_what_a_task_begins_with_and_have_no_mean_over_alternatives(finished):
    content = read(finished[0])
    assert content["tasks"]["first-tuned"]["begins_with"] == "first"
    assert content["means"] == {}
    table = (finished[0] / "sweep.md").read_text().partition("## Over the tasks")[2]
    assert "scratch" in table and "mean of" not in table and "| first  " not in table


def test_finished_sequence_started_again_trains_nothing(finished):
    before = read(finished[0])
    sweep_in(finished[0], train_nothing)
    assert read(finished[0]) == before


def test_other_choice_makes_other_runs_and_keeps_the_old_ones(tmp_path):
    path = tmp_path / "sweep"
    sweep_in(path, train)
    for seed in (0, 1):
        assert (path / "first-tuned" / f"{DECAY}=0.1" / "final" / f"optimizer.learning_rate=0.01/seed_{seed}").exists()
    first = sweeps_of(path)[0]
    grown = [dataclasses.replace(first, choose={DECAY: (0.0, 0.1, 0.2)}), *sweeps_of(path)[1:]]
    again = []

    def train_again(run):
        again.append(str(run.path.relative_to(path)))
        train(run)

    command.run_sweep(make_tasks(grown, PAGE, (), path), path, train_again)
    assert f"first-tuned/{DECAY}=0.2/trials/optimizer.learning_rate=0.1" in again
    assert not any("scratch" in run or f"{DECAY}=0.1/" in run for run in again)


def test_task_after_a_failed_run_waits_and_the_others_go_on(tmp_path):
    def fail(run):
        if run.is_final and run.path.name == "seed_1" and run.path.relative_to(tmp_path).parts[0] == "first":
            raise FailedRunError("no space left")
        train(run)

    collected = {result.task.name: result for result in sweep_in(tmp_path, fail)}
    assert [each.status for each in collected["first-tuned"].final] == ["finished", "missing"]
    assert collected["second-tuned"].is_complete and collected["scratch"].is_complete
    due = [str(run.path.relative_to(tmp_path)) for result in collected.values() for run in result.due]
    assert due == [f"first/final/{DECAY}=0.1/seed_1"]  # not the run that needs its weights


def test_commands_are_printed_only_for_runs_whose_weights_are_there(tmp_path, capsys):
    assert command.main([f"--config={PAGE}", f"--workdir={tmp_path}", "--print_commands"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("stage=pretrain") == 4 and "stage=finetune" not in printed
    assert "scratch" in printed
    for task in make_tasks(sweeps_of(tmp_path), PAGE, (), tmp_path)[:2]:
        for run in (*task.trials, *task.final_runs({DECAY: 0.1})):
            train(run)
    assert command.main([f"--config={PAGE}", f"--workdir={tmp_path}", "--print_commands"]) == 0
    assert capsys.readouterr().out.count("--config.weights=") == 4


def test_seeds_of_all_sweeps_are_set_by_the_flag(tmp_path):
    assert [sweep.seeds for sweep in sweeps_of(tmp_path, "--seeds=5")] == [5, 5]
    assert [sweep.seeds for sweep in sweeps_of(tmp_path, "--seeds=0")] == [1, 0]


def test_all_seeds_begin_with_the_only_run_of_an_earlier_sweep_with_one_seed(tmp_path):
    tasks = make_tasks([Sweep(**ONE), Sweep(**TWO)], PAGE, (), tmp_path)
    runs = tasks[1].final_runs({})
    assert [run.config.seed for run in runs] == [0, 1, 2]
    assert {run.config.weights for run in runs} == {str(tmp_path / "one" / "final" / "seed_0")}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (ONE, {**TWO, "weights": {"two": "won"}}, "'two' begins with the weights of 'won', which is not a task of an"),
        ({**ONE, "seeds": 2}, TWO, "'two' has 3 seeds, but 'one', whose weights it begins with, has 2"),
        (ONE, ONE, "two sweeps of the config have a task 'one'"),
        (ONE, {}, "needs tasks"),
    ],
)
def test_sweeps_that_do_not_fit_together_are_refused(first, second, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make_tasks([Sweep(**first), Sweep(**second)], PAGE, (), tmp_path)


def test_weights_for_what_is_no_task_are_refused():
    with pytest.raises(UserError, match="weights are given for 'three', which is not a task"):
        Sweep(tasks={"two": ""}, weights={"three": "one"})


def test_weights_are_set_by_the_sweep_alone(tmp_path):
    with pytest.raises(UserError, match=r"leave --config\.weights out"):
        make_tasks([Sweep(**ONE), Sweep(**TWO)], PAGE, ("--config.weights=vit_b16_i21k",), tmp_path)


def test_sweep_whose_data_are_missing_is_one_message_before_any_run(tmp_path, capsys, caplog):
    flags = [f"--config={PAGE}", f"--workdir={tmp_path / 'sweep'}", "--config.data.dataset=nowhere.zip"]
    assert command.main(flags) == 1
    assert "nowhere.zip" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
    assert sum("nowhere.zip is missing, so test of it" in each.message for each in caplog.records) == 1


def test_data_of_some_tasks_are_enough(tmp_path):
    (sweep, _) = sweeps_of(tmp_path)
    tasks = make_tasks(sweep, PAGE, (), tmp_path)
    with tasks[0].base.ignore_type():
        tasks[0].base.data.dataset = "nowhere.zip"
    command.check_data(tasks)
    tasks[1].base.data.dataset = "nowhere.zip"
    with pytest.raises(MissingDataError):
        command.check_data(tasks)


# Early stopping.

STOPPED = Sweep(early_stopping="accuracy", metric="fewshot/digits/pre_logits/5shot", seeds=1)
ROWS = (
    {"step": 1, f"{VALIDATION}/accuracy": 0.2, "test/accuracy": 0.1, "fewshot/digits/pre_logits/5shot": 0.3},
    {"step": 2, f"{VALIDATION}/accuracy": 0.6, "test/accuracy": 0.5, "fewshot/digits/pre_logits/5shot": 0.4},
    {"step": 3, f"{VALIDATION}/accuracy": 0.6, "test/accuracy": 0.9, "fewshot/digits/pre_logits/5shot": 0.8},
    {"step": 4, f"{VALIDATION}/accuracy": float("nan"), "test/accuracy": 0.9, "fewshot/digits/pre_logits/5shot": 0.9},
)
ON_VALIDATION = ("--config.data.train_split=train[:90%]", f"--config.data.eval_split={VALIDATION}")


def stopped_run(path, **changes):
    (task,) = make_tasks(dataclasses.replace(STOPPED, **changes), TINY, ON_VALIDATION, path)
    (run,) = task.final_runs({})
    pretend(run)
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return task, run


def test_all_metrics_are_those_of_the_step_with_the_best_validation_accuracy(tmp_path):
    task, run = stopped_run(tmp_path)
    result = run.read()
    assert (result.status, result.step) == ("finished", 2)  # the first of two equal ones
    assert result.metrics == {name: value for name, value in ROWS[1].items() if name != "step"}
    results.write([results.collect(task)], tmp_path)
    (told,) = read(tmp_path)["tasks"]["digits"]["final"]
    assert (told["step"], told["metrics"]["test/accuracy"]) == (2, 0.5)


def test_smallest_loss_stops(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "x/loss": loss}) + "\n" for step, loss in ((1, 3), (2, 1), (3, 2)))
    )
    assert RunResult(tmp_path).best_step("x/loss") == 2


def test_run_without_the_metric_to_stop_by_is_of_no_use(tmp_path):
    _, run = stopped_run(tmp_path, early_stopping="recall")
    assert run.read().status == "unusable" and "recall" in run.read().reason


def test_number_that_is_measured_where_the_run_is_stopped_gets_a_note(tmp_path):
    (task,) = make_tasks(dataclasses.replace(STOPPED, metric="accuracy"), TINY, ON_VALIDATION, tmp_path)
    assert any("pick the step of each run, so it is too high" in note for note in task.notes)


def test_stopping_on_some_of_the_examples_that_are_reported_is_refused(tmp_path):
    fields = (*ON_VALIDATION, "--config.evals.fewshot.datasets=('digits',)", "--config.evals.fewshot.shots=(1,)")
    overlapping = (*fields, "--config.evals.fewshot.test_split=train[95%:]", "--config.evals.fewshot.train_split=test")
    with pytest.raises(UserError, match=r"what early stopping uses"):
        make_tasks(STOPPED, TINY, overlapping, tmp_path)
    assert load_config(TINY, fields).data.eval_split == VALIDATION
