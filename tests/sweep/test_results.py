"""Sweeps: examples for choosing and reporting, failed runs, alternatives, places."""

import json
import math

import pytest

from tests.conftest import ROOT
from tests.data.test_sources import write_image
from tests.experiment.test_leakage import write_run
from tests.sweep.test_sweep import RATE, VALIDATION, leave_results
from vit_jax.errors import UserError
from vit_jax.sweep import Sweep, results
from vit_jax.sweep import __main__ as command
from vit_jax.sweep.trials import load_config, make_tasks, with_arguments

TINY = "tests/configs/tiny.py:steps=3"
RATES = f"--grid={RATE}=0.001,0.01"
TRAIN, HELD_OUT = "train[:90%]", "train[90%:]"
CHOOSE = (f"--config.data.train_split={TRAIN}", f"--config.data.eval_split={HELD_OUT}")
TEST = "--final=data.eval_split=test"
FINAL = "--final=data.train_split=train,data.eval_split=test"


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def refusal(path, capsys, *arguments):
    """The error of a refused sweep; "" if it is accepted."""
    path = path / str(len(list(path.iterdir())))
    status = command.main([f"--config={TINY}", f"--workdir={path}", "--print_commands", *arguments])
    told = capsys.readouterr().err
    assert (status, bool(told)) in ((0, False), (1, True)), told
    assert status == 0 or not path.exists()
    return told


def write_images(root, splits):
    """A folder with so many images of two classes in each split, all the same file."""
    for split, count in splits.items():
        for name in ("cat", "dog"):
            write_image(root / split / name / "0.png", 7)
            for number in range(1, count):
                (root / split / name / f"{number}.png").hardlink_to(root / split / name / "0.png")


# Examples.


@pytest.mark.parametrize("splits", [f"train,{TRAIN}", f"{TRAIN},train"])
def test_each_candidate_is_looked_at_not_only_the_first(splits, tmp_path, capsys):
    told = refusal(tmp_path, capsys, f"--config.data.eval_split={HELD_OUT}", f"--grid=data.train_split={splits}", TEST)
    assert "shares 144 of its 144 examples with 'train' of digits, what is trained on" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*CHOOSE, RATES, FINAL), ""),
        ((*CHOOSE, RATES, "--seeds=0"), ""),
        (("--seeds=2",), ""),
        (("--seeds=2", "--config.data.train_split=all"), "evaluated on, shares 360 of its 360 examples with 'all' of"),
        ((*CHOOSE, RATES, "--final=data.train_split=train+test[:3],data.eval_split=test"), "shares 3 of its 360"),
        ((*CHOOSE, RATES, "--final=data.eval_split=test+train[99%:]"), "shares 14 of its 374 examples with 'train[90%"),
        ((*CHOOSE, "--grid=data.mixture=(),(('digits',1.0),('digits',2.0))", FINAL), ""),
        (("--config.data.eval_split=train[:5]", "--grid=data.train_split=train[5:],train[6:]", TEST), ""),
        (("--config.data.eval_split=train[:5]", "--grid=data.train_split=train[5:],train[4:]", TEST), "shares 1 of"),
        (("--grid=data.eval_split=train[90%:],train[80%:90%]", "--config.data.train_split=train[:80%]", "--seeds=0"),
         "compared on different examples, 'train[90%:]' of digits and 'train[80%:90%]' of digits"),
        ((*CHOOSE, "--grid=seed=0,1", FINAL), ""),
    ],
)  # fmt: skip
def test_training_choosing_and_reporting_take_different_examples(arguments, message, tmp_path, capsys):
    told = refusal(tmp_path, capsys, *arguments)
    assert message in told and bool(message) == bool(told)


def test_few_shot_metrics_are_measured_on_their_own_test_split(tmp_path, capsys):
    shots = ("--config.evals.fewshot.datasets=('digits',)", "--config.evals.fewshot.train_split=train[:50%]",
             "--metric=fewshot/digits/pre_logits/5shot", *CHOOSE, RATES)  # fmt: skip
    assert "'test' of digits, what the final runs are evaluated on, shares 360" in refusal(tmp_path, capsys, *shots)
    held_out = "--config.evals.fewshot.test_split=train[90%:]"
    assert "shares 144 of its 144" in refusal(tmp_path, capsys, *shots, held_out)  # of the final runs, with themselves
    assert not refusal(tmp_path, capsys, *shots, held_out, "--final=evals.fewshot.test_split=test")
    trained = "--config.evals.fewshot.test_split=train[80%:]"
    assert "what is trained on" in refusal(tmp_path, capsys, *shots, trained, "--final=evals.fewshot.test_split=test")


def test_training_examples_of_the_weights_may_choose_but_not_report(tmp_path, capsys):
    seen_test = write_run(tmp_path / "a", train_split="test[:7]")
    seen_train = write_run(tmp_path / "b", train_split="train")
    (tmp_path / "b" / "x.npz").touch()
    for weights in (f"{seen_test},{seen_train}", f"{seen_train},{seen_test}"):
        told = refusal(tmp_path, capsys, *CHOOSE, f"--grid=weights={weights}", FINAL)
        assert "shares 7 of its 360 examples with 'test[:7]' of digits, what the weights were trained on" in told
    assert not refusal(tmp_path, capsys, *CHOOSE, f"--grid=weights={seen_train}/x.npz,{seen_train}", FINAL)


def test_folders_are_compared_whatever_they_are_called(tmp_path, capsys):
    write_images(tmp_path / "mine", {"train": 10, "test": 4})
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    base = (f"--config.data.dataset={tmp_path / 'mine'}", "--config.data.train_split=train[:50%]", RATES)
    final = f"--final=data.dataset={tmp_path / 'link'},data.train_split=train,data.eval_split="
    assert not refusal(tmp_path, capsys, *base, "--config.data.eval_split=train[50%:]", f"{final}test")
    told = refusal(tmp_path, capsys, *base, "--config.data.eval_split=test[:4]", f"{final}test")
    assert "shares 4 of its 8 examples with 'test[:4]'" in told


def test_data_that_are_not_here_are_compared_by_name(tmp_path, capsys, caplog):
    gone = "--config.data.dataset=/not/here"
    assert "shares examples with 'train'" in refusal(
        tmp_path, capsys, gone, RATES, f"--config.data.eval_split={HELD_OUT}"
    )
    assert "shares examples with 'test'" in refusal(
        tmp_path, capsys, gone, "--seeds=1", "--config.data.train_split=test"
    )
    assert not refusal(tmp_path, capsys, gone, *CHOOSE, RATES, FINAL)
    assert "/not/here is missing" in caplog.text


def test_number_of_a_part_of_a_test_set_is_reported(tmp_path):
    (task,) = make_tasks(Sweep(final={"data.eval_split": "test[:100]"}, seeds=2), TINY, (), tmp_path)
    for run in task.final_runs({}):
        leave_results(run, **{"test[:100]/accuracy": 0.5, "test[:100]/examples": 100})
    assert "test[:100] has 100 of the 360 examples of test" in results.to_markdown([results.collect(task)])


# Runs that went wrong.


def finals(path, *metrics):
    """A sweep whose final runs have these metrics; None: the run diverged."""
    (task,) = make_tasks(Sweep(seeds=len(metrics)), TINY, (), path)
    for run, values in zip(task.final_runs({}), metrics, strict=True):
        if values is None:
            run.record_failure("loss is nan at step 3.")
        else:
            leave_results(run, **{f"test/{name}": value for name, value in values.items()})
            (run.path / "summary.json").write_text(json.dumps({"overlap": {}, "test/loss": values.get("loss")}))
    results.write([results.collect(task)], path)
    return (path / "sweep.md").read_text(), next(iter(json.loads((path / "sweep.json").read_text())["tasks"].values()))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_metric_that_is_not_finite_in_a_final_run_has_no_mean_and_a_line(seed, tmp_path):
    losses = [math.nan if each == seed else 1.0 for each in range(3)]
    table, task = finals(tmp_path, *({"accuracy": 0.5, "loss": loss} for loss in losses))
    assert f"test/loss is nan with seed {seed}, so it has no mean" in table
    assert "| mean of 3   | 50.00 % ± 0.00 % |" in table
    assert (task["seeds"], task["mean"]) == (3, {"test/accuracy": 0.5})


def test_metric_that_a_final_run_lacks_or_that_is_infinite_has_no_mean_and_a_line(tmp_path):
    table, _ = finals(tmp_path, {"accuracy": 0.5, "loss": math.inf}, {"accuracy": 0.25, "extra": 1.0, "loss": 1.0})
    assert "test/extra is missing with seed 0, so it has no mean" in table
    assert "test/loss is inf with seed 0, so it has no mean" in table


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "diverged loss is nan at step 3"),
        ({"accuracy": math.nan}, "diverged test/accuracy is nan"),
        ({"loss": 1.0}, "unusable has no metric 'test/accuracy' to choose by; there are test/loss"),
    ],
)
def test_failed_final_run_is_in_the_table_and_there_is_no_mean(bad, reason, tmp_path):
    table, task = finals(tmp_path, bad, {"accuracy": 0.5}, {"accuracy": 0.7})
    assert reason in table and "There is no mean: 2 of 3 final runs are finished." in table
    assert "mean of" not in table
    assert (task["seeds"], task["mean"]) == (0, {})


def test_final_runs_measured_on_different_numbers_of_examples_are_reported(tmp_path):
    table, _ = finals(tmp_path, {"accuracy": 0.5, "examples": 360}, {"accuracy": 0.5, "examples": 359})
    assert "test/examples differs: 360 with seed 0, 359 with seed 1" in table


def test_final_run_that_says_it_was_evaluated_on_what_it_trained_on_does_not_count(tmp_path):
    """Such as of another machine, which has the data."""
    (task,) = make_tasks(Sweep(seeds=1), TINY, (), tmp_path)
    (run,) = task.final_runs({})
    leave_results(run, **{"test/accuracy": 0.5})
    (run.path / "summary.json").write_text(json.dumps({"overlap": {"test": 36, "other": "x"}}))
    result, *_ = results.collect(task).final
    assert (result.status, result.is_due) == ("unusable", False)
    assert result.reason == "36 of the examples that test/accuracy is measured on were trained on"


def test_examples_of_the_choice_that_the_weights_were_trained_on_are_reported(tmp_path):
    (task,) = make_tasks(Sweep(choose={RATE: (0.1, 0.2)}, seeds=0), TINY, CHOOSE, tmp_path)
    for run in task.trials:
        leave_results(run, **{f"{VALIDATION}/accuracy": 0.5})
        (run.path / "summary.json").write_text(json.dumps({"overlap": {HELD_OUT: 144}}))
    assert any(note.startswith("144 of the examples that the values") for note in results.collect(task).notes)


@pytest.mark.parametrize("file", ["summary.json", "failure.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_run_with_a_damaged_file_has_failed_and_is_tried_again(file, content, tmp_path):
    (task,) = make_tasks(Sweep(seeds=1), TINY, (), tmp_path)
    (run,) = task.final_runs({})
    run.path.mkdir(parents=True)
    (run.path / file).write_text(content)
    result, *_ = results.collect(task).final
    assert (result.status, result.is_due) == ("failed", True)
    assert file in result.reason


def test_means_that_cannot_be_given_are_reported_with_the_tasks_they_lack(tmp_path):
    sweep = Sweep(seeds=1, tasks={"one": "steps=3", "two": "steps=4"}, groups={"second": ["two"]})
    tasks = make_tasks(sweep, TINY, (), tmp_path)
    leave_results(tasks[0].final_runs({})[0], **{"test/accuracy": 0.5})
    table = results.to_markdown([results.collect(task) for task in tasks])
    assert "| mean of all    | 2 tasks | incomplete: two |" in table
    assert "| mean of second | 1 tasks | incomplete: two |" in table


# Alternatives.


@pytest.fixture
def two_rules(tmp_path):
    """A sweep of configs/transfer.py for a ResNet."""
    write_images(tmp_path / "mine", {"train": 30, "test": 10})
    place = f"configs/transfer.py:dataset={tmp_path / 'mine'},weights=none,model=R50x1"
    arguments = [f"--config={place}", f"--workdir={tmp_path / 'sweep'}"]
    sweep = command.make_sweep(command.make_parser().parse_args(arguments))
    (task,) = make_tasks(sweep, place, (), tmp_path / "sweep")
    return arguments, task


@pytest.mark.parametrize("winner", ["vit", "bit"])
def test_better_of_two_rules_is_chosen_and_reported_and_makes_the_final_runs(winner, two_rules, capsys):
    arguments, task = two_rules
    reached = {("vit", 0.001): 0.3, ("vit", 0.003): 0.6, ("vit", 0.01): 0.5, ("vit", 0.03): 0.4, ("bit", 0.003): 0.55}
    reached["bit", 0.003] += 0.1 * (winner == "bit")
    for run in task.trials:
        rule, rate = run.overrides.values()
        is_bit = run.config.optimizer.schedule == "drops"
        assert is_bit == (rule == "bit") == (not run.config.data.inception_crop)
        assert run.config.optimizer.learning_rate == rate
        leave_results(run, **{f"{run.config.data.eval_split}/accuracy": reached[rule, rate]})
    assert command.main([*arguments, "--print_commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(f"rule={winner}" in line for line in lines)
    result = results.collect(task)
    assert result.chosen == {"argument.rule": winner, "optimizer.learning_rate": 0.003}
    for run in task.final_runs(result.chosen):
        assert (run.config.optimizer.schedule == "drops") == (winner == "bit")
        assert (run.config.data.train_split, run.config.data.eval_split) == ("train", "test")
    (note,) = result.notes  # the rates of the other rule say nothing of an edge
    best, other = ("65.00 %", "60.00 % with argument.rule=vit") if winner == "bit" else ("60.00 %", "55.00 % with argu")
    assert note.startswith(f"argument.rule={winner} won: {best}, against {other}")
    assert "| argument.rule | optimizer.learning_rate |" in results.to_markdown([result])


def test_rules_that_are_equal_have_no_winner(two_rules):
    _, task = two_rules
    for run in task.trials:
        leave_results(run, **{f"{run.config.data.eval_split}/accuracy": 0.5})
    result = results.collect(task)
    assert result.chosen == {"argument.rule": "vit", "optimizer.learning_rate": 0.001}
    assert any("is no better than" in note and "argument.rule=bit" in note for note in result.notes)
    assert not any("won" in note for note in result.notes)


def test_rule_that_went_wrong_loses_with_a_line(two_rules):
    _, task = two_rules
    for run in task.trials[:-1]:
        leave_results(run, **{f"{run.config.data.eval_split}/accuracy": 0.5})
    task.trials[-1].record_failure("loss is inf at step 2.")
    result = results.collect(task)
    assert result.chosen["argument.rule"] == "vit"
    assert any("argument.rule=bit" in note and "loss is inf at step 2" in note for note in result.notes)


@pytest.mark.parametrize(("winner", "told"), [(2, True), (3, False)])
def test_edge_is_found_among_the_values_tried_with_the_same_rule(winner, told, tmp_path):
    tried = [("5", 0.001), ("5", 0.003), ("5", 0.01), ("6", 0.03), ("6", 0.003), ("6", 0.1)]
    sweep = Sweep(choose=[{"argument.steps": steps, RATE: rate} for steps, rate in tried], seeds=0)
    (task,) = make_tasks(sweep, TINY, CHOOSE, tmp_path)
    for number, run in enumerate(task.trials):
        leave_results(run, **{f"{VALIDATION}/accuracy": 0.5 + 0.1 * (number == winner)})
    assert any("was tried: a larger one may be better" in note for note in results.collect(task).notes) == told


def test_argument_of_a_config_is_a_field_of_a_grid_like_others(tmp_path, capsys):
    assert not refusal(tmp_path, capsys, *CHOOSE, "--grid=argument.steps=5,6", FINAL)
    (task,) = make_tasks(Sweep(choose={"argument.steps": ("5", "6")}, seeds=0), TINY, CHOOSE, tmp_path)
    assert [(run.path.name, run.config.steps) for run in task.trials] == [
        ("argument.steps=5", 5),
        ("argument.steps=6", 6),
    ]
    for run in task.trials:
        place, *arguments = run.command()[3:-1]
        assert load_config(place.removeprefix("--config="), arguments) == run.config
    assert "unknown config argument 'stepz'" in refusal(tmp_path, capsys, *CHOOSE, "--grid=argument.stepz=5,6")


def test_argument_takes_the_place_of_the_one_that_is_there():
    assert with_arguments("a.py", {}) == "a.py"
    assert with_arguments("a.py", {"rule": "bit"}) == "a.py:rule=bit"
    assert with_arguments("a.py:rule=vit,b=1", {"rule": "bit"}) == "a.py:b=1,rule=bit"
    with pytest.raises(UserError, match="cannot have a comma"):
        with_arguments("a.py", {"rule": "b,c=1"})


# Places.


def test_sweep_may_be_in_the_folder_of_another_one_but_not_among_its_runs(tmp_path):
    sweep = Sweep(choose={RATE: (0.1, 0.2)}, seeds=0)

    def begin(path, sweep=sweep):
        command.remember(make_tasks(sweep, TINY, CHOOSE, path), path)

    begin(tmp_path)
    begin(tmp_path / "pets")
    for folder in ("trials", "final", "trials/x/y"):
        with pytest.raises(UserError, match="has its own runs"):
            begin(tmp_path / folder)
    two_tasks = Sweep(seeds=1, tasks={"pets": "steps=3", "birds": "steps=3"})
    with pytest.raises(UserError, match="where the runs of pets would be, is the folder of another sweep"):
        command.remember(make_tasks(two_tasks, TINY, (), tmp_path), tmp_path)
    with pytest.raises(UserError, match="is the workdir of a run"):
        begin(write_path_of_run(tmp_path / "run"))


def write_path_of_run(path):
    write_run(path)
    return path


def test_damaged_description_of_a_sweep_is_reported(tmp_path):
    (tmp_path / "sweep_config.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep_config.json is damaged"):
        command.remember(make_tasks(Sweep(seeds=1), TINY, (), tmp_path), tmp_path)
