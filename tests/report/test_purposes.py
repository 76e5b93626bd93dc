"""Which numbers count as results: by a sweep's record, a run's command, and the protocol."""

import json

import pytest

from tests.report.workdirs import (
    write_evaluation,
    write_fine_tuning,
    write_json,
    write_run,
    write_starts,
    write_sweep,
)
from vit_jax.report.collect import find
from vit_jax.report.listings import results_table
from vit_jax.report.measured import ACCURACY
from vit_jax.report.purposes import purpose_by_split, stage_of


def uses(*places, below):
    found = find([str(place) for place in places])
    return {str(record.path.relative_to(below)): record.purpose.what for record in found.models}


def write_own(path, train, test, *, seed=0, dataset="/data/mine", **fields):
    """A fine-tuning on images of one's own."""
    return write_run(
        *(path, "ViT-B/16", {f"{test}/accuracy": 0.9, f"{test}/examples": 40}),
        **{"steps": 500, "data__dataset": dataset, "data__train_split": train, "data__eval_split": test},
        **{"weights": "vit_b16_i21k", "seed": seed, "data__image_size": 384, **fields},
    )


@pytest.mark.parametrize(
    ("train", "test"),
    [("train[:90%]", "train[90%:]"), ("photos[:90%]", "photos[90%:]"), ("train", "validation"), ("a+b", "c")],
)
def test_final_runs_of_a_sweep_are_results_for_any_name_of_their_split(tmp_path, train, test):
    for seed in range(2):
        write_own(tmp_path / f"final/{seed}", train, test, seed=seed)
    write_sweep(tmp_path, [], ["final/0", "final/1"])
    found = find([str(tmp_path)])
    assert not found.left_out
    assert [row[8] for row in results_table(found.models).rows] == ["90.00 ± 0.00"]


def test_trials_are_not_results_for_any_name_of_their_split(tmp_path):
    write_own(tmp_path / "trials/a", "train", "test")
    write_sweep(tmp_path, ["trials/a"], [])
    assert uses(tmp_path, below=tmp_path) == {"trials/a": "chooses"}


def test_innermost_sweep_counts(tmp_path):
    """Its final runs are results, its trials choose, abandoned runs are not chosen; the same for the outer sweep."""
    inner = tmp_path / "outer/pets"
    for folder in (tmp_path / "outer", inner, tmp_path / "outer/pets/more"):
        for run in ("trials/x", "final/x/0", "final/given_up/0"):
            write_fine_tuning(folder / run, "pets", 0.9)
    for folder in (tmp_path / "outer", inner):
        write_sweep(folder, ["trials/x"], ["final/x/0"])
    found = uses(tmp_path, below=tmp_path)
    for folder in ("outer", "outer/pets"):
        assert found[f"{folder}/trials/x"] == "chooses"
        assert found[f"{folder}/final/given_up/0"] == "not chosen"
    assert found["outer/final/x/0"] == "final"
    assert found["outer/pets/final/x/0"] == f"repeats {tmp_path}/outer/final/x/0"
    assert found["outer/pets/more/final/x/0"] == "not chosen"  # of the innermost sweep around it, which gave it up


def test_outer_sweep_counts_if_the_inner_one_does_not_list_the_run(tmp_path):
    write_fine_tuning(tmp_path / "pets/final/0", "pets", 0.9)
    write_fine_tuning(tmp_path / "pets/trials/0", "pets", 0.9)
    write_sweep(tmp_path, [], ["pets/final/0"])
    write_sweep(tmp_path / "pets", ["trials/0"], [])
    assert uses(tmp_path, below=tmp_path) == {"pets/final/0": "final", "pets/trials/0": "chooses"}


@pytest.mark.parametrize("inner", [True, False])
def test_inner_sweep_wins_if_two_list_a_run(tmp_path, inner):
    write_fine_tuning(tmp_path / "pets/x/0", "pets", 0.9)
    lists = [(["x/0"], []), ([], ["x/0"])]
    write_sweep(tmp_path / "pets", *lists[inner])
    write_sweep(tmp_path, *([f"pets/{run}" for run in runs] for runs in lists[not inner]))
    assert uses(tmp_path, below=tmp_path) == {"pets/x/0": "final" if inner else "chooses"}


def test_run_that_is_only_in_a_sweeps_folder_counts_by_itself(tmp_path):
    write_fine_tuning(tmp_path / "final/0", "pets", 0.9)
    write_fine_tuning(tmp_path / "by_hand", "cifar10", 0.9)
    write_fine_tuning(tmp_path / "others/by_hand", "cifar100", 0.9)
    write_sweep(tmp_path, [], ["final/0"])
    assert set(uses(tmp_path, below=tmp_path).values()) == {"final"}


@pytest.mark.parametrize("place", ["trials", "trials/a", "final", "final/given_up"])
def test_part_of_a_sweep_given_alone_counts_as_in_its_sweep(tmp_path, place):
    """The trials use a test set here, so that only the sweep identifies them."""
    for run in ("trials/a", "final/a", "final/given_up"):
        write_fine_tuning(tmp_path / "sweep" / run, "pets", 0.9)
    write_sweep(tmp_path / "sweep", ["trials/a"], ["final/a"])
    expected = {"trials/a": "chooses", "final/a": "final", "final/given_up": "not chosen"}
    assert uses(tmp_path / "sweep" / place, below=tmp_path / "sweep") == {
        run: use for run, use in expected.items() if run.startswith(place)
    }


def test_sweep_that_was_copied_elsewhere_counts_as_before(tmp_path):
    for run in ("trials/a", "final/a"):
        write_fine_tuning(tmp_path / "there/copy" / run, "pets", 0.9)
    write_sweep(tmp_path / "there/copy", ["trials/a"], ["final/a"])
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert uses(tmp_path / "link", below=tmp_path / "link") == {"copy/trials/a": "chooses", "copy/final/a": "final"}


def test_trials_of_a_sweep_without_results_choose(tmp_path):
    write_own(tmp_path / "trials/a", "train", "test")
    write_own(tmp_path / "final/a", "train", "test")
    write_json(tmp_path / "sweep_config.json", {"tried": {"trials/a": {"optimizer.learning_rate": 0.1}}})
    found = find([str(tmp_path)])
    assert {record.path.parent.name: record.purpose.what for record in found.models} == {
        "trials": "chooses",
        "final": "final",
    }
    assert found.left_out == [f"{tmp_path}: a sweep without results yet; its finished final runs count one by one"]


MAIN = "python -m vit_jax.main --workdir=x --config="


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        (f"{MAIN}configs/transfer.py:dataset=a,stage=choose", "chooses"),
        (f"{MAIN}configs/transfer.py:dataset=a,stage=final", "final"),
        (f"{MAIN}/home/me/configs/transfer.py:dataset=a", "final"),  # the default
        (f"{MAIN}configs/transfer.py", "final"),
        (f"{MAIN}configs/vtab.py:task=pets,stage=choose", "chooses"),
        ("python main.py --config configs/transfer.py:stage=choose --workdir x", "chooses"),
        (f"{MAIN}configs/transfer.py:dataset=a --config.data.eval_split='train[90%:]'", None),
        (f"{MAIN}configs/transfer.py:stage=choose --config.data.eval_split=test", None),
        (f"{MAIN}configs/transfer.py:stage=what", None),
        (f"{MAIN}configs/quickstart.py:stage=choose", None),  # a stage of its own, of which nothing is known
        ("python notebook.py", None),
        ("unbalanced 'quote", None),
        ("", None),
    ],
)
def test_stage_of_a_command(command, stage):
    assert stage_of(command) == stage


@pytest.mark.parametrize(("stage", "use"), [("choose", "chooses"), ("final", "final")])
def test_command_sets_the_purpose_of_a_run_outside_a_sweep(tmp_path, stage, use):
    for name, train, test in (("a", "train[:90%]", "train[90%:]"), ("b", "train", "validation"), ("c", "p", "test")):
        run = write_own(tmp_path / name, train, test, dataset=f"/data/{name}")
        write_starts(run, [(0, {})], f"{MAIN}configs/transfer.py:dataset=/data/{name},stage={stage}")
    found = find([str(tmp_path)])
    assert [record.purpose.what for record in found.models] == [use] * 3 and not found.left_out


def test_sweeps_record_is_stronger_than_the_command(tmp_path):
    """Final runs of a sweep are started with stage=choose and other splits."""
    run = write_own(tmp_path / "final/0", "train", "test")
    write_starts(run, [(0, {})], f"{MAIN}configs/transfer.py:dataset=a,stage=choose")
    write_sweep(tmp_path, [], ["final/0"])
    assert uses(tmp_path, below=tmp_path) == {"final/0": "final"}


@pytest.mark.parametrize(
    ("dataset", "split", "is_final", "is_sure"),
    [
        ("tfds:cifar10", "test", True, True),
        ("tfds:cifar10", "test[:50%]", False, True),
        ("/prepared/cifar10/3.0.2", "train[98%:]", False, True),
        ("tfds:imagenet2012", "validation", True, True),
        ("tfds:imagenet2012", "train[99%:]", False, True),
        ("tfds:oxford_flowers102", "validation", False, True),
        ("vtab:pets", "test", True, True),
        ("vtab:pets", "val200", False, True),
        ("/data/mine", "test", True, True),
        ("/data/mine", "Test", True, True),
        ("/data/mine", "testing", True, True),
        ("/data/mine", "test[:10%]", False, True),
        ("/data/mine", "all[90%:]", True, True),
        ("/data/mine", "all[80%:90%]", False, True),
        ("/data/mine", "all", False, True),
        ("/data/mine", "train[90%:]", False, False),
        ("/data/mine", "photos[80%:90%]", False, False),
        ("/data/mine", "validation", False, False),
        ("/data/mine", "test+validation", False, False),
    ],
)
def test_protocol_decides_where_nothing_is_recorded(dataset, split, is_final, is_sure):
    what, sure = purpose_by_split(dataset, split)
    assert (what == "final", sure) == (is_final, is_sure)


def test_run_of_unknown_purpose_has_a_line(tmp_path):
    run = write_own(tmp_path, "train", "validation")
    found = find([str(tmp_path)])
    assert [record.purpose.what for record in found.models] == ["chooses (measured on validation)"]
    (line,) = found.left_out
    assert line.startswith(f"{run}: not a result, because nothing says that validation is a test set. ")


def test_pre_training_shows_its_held_out_accuracy(tmp_path):
    """Nothing is chosen by it, and the split stands beside it."""
    write_own(tmp_path, "full[51200:]", "full[:51200]", weights="", dataset="tfds:imagenet21k")
    ((*_, split, _, _, _, _, accuracy, _),) = results_table(find([str(tmp_path)]).models).rows
    assert (split, accuracy) == ("full[:51200]", "90.00")


@pytest.mark.parametrize(
    ("fields", "use"),
    [
        ({"data__eval_split": "test"}, "final"),
        ({"data__eval_split": "test[:50%]"}, "measured on test[:50%], a part of the test set"),
        ({"data__eval_split": "train[95%:]"}, "chooses (measured on train[95%:])"),
        ({"data__eval_split": "validation", "data__dataset": "/data/others"}, "final"),  # which it was not tuned on
    ],
)
def test_later_evaluation_of_a_run_counts_by_what_it_is_of(tmp_path, fields, use):
    run = write_own(tmp_path / "run", "train", "test")
    fields = {"data__dataset": "/data/mine", "data__image_size": 224, **fields}
    metrics = {f"{fields['data__eval_split']}/accuracy": 0.8, f"{fields['data__eval_split']}/examples": 20}
    write_evaluation(tmp_path / "later", run, metrics, **fields)
    assert uses(tmp_path, below=tmp_path) == {"run": "final", "later": use}


def test_evaluation_of_a_run_that_did_not_finish_is_not_a_result(tmp_path):
    run = write_run(tmp_path / "half", "ViT-B/16", {}, steps=10, unfinished=True, data__dataset="tfds:cifar10")
    fields = {"data__dataset": "tfds:cifar10", "data__eval_split": "test"}
    write_evaluation(tmp_path / "later", run, {"test/accuracy": 0.8, "test/examples": 10_000}, **fields)
    found = find([str(tmp_path)])
    assert [(record.path.name, record.purpose.what) for record in found.models] == [
        ("later", "of a run that did not finish")
    ]
    assert found.left_out == [f"{run}: not finished (step 10)"]


def test_released_checkpoint_that_is_measured_on_training_images_is_not_a_result(tmp_path):
    fields = {"data__dataset": "tfds:imagenet2012", "data__image_size": 384}
    write_evaluation(
        tmp_path, "vit_b16_i21k_in1k_384", {"train[:1%]/accuracy": 0.99}, data__eval_split="train[:1%]", **fields
    )
    assert uses(tmp_path, below=tmp_path) == {".": "measured on train[:1%], not on the test set"}


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"tasks": 3}',
        '{"tasks": {"a": {"trials": [{"workdir": 5}], "final": []}}}',
        '{"tasks": {"a": {"trials": [], "final": ["x"]}}}',
        '{"tasks": {"a": {"final": []}}}',
        "[" * 5000,
        '{"tasks": ',
        '{"tasks": {"a": {"trials": [{"workdir": "t", "overrides": 3}], "final": [], "chosen": {}}}}',
    ],
)
def test_damaged_sweep_is_a_line_and_its_runs_are_read(tmp_path, content):
    write_fine_tuning(tmp_path / "by_hand", "pets", 0.9)
    (tmp_path / "sweep.json").write_text(content)
    found = find([str(tmp_path)])
    assert [record.purpose.what for record in found.models] == ["final"]
    (line,) = found.left_out
    assert line.startswith(f"{tmp_path}/sweep.json is damaged")


def test_sweep_with_numbers_that_are_not_finite_says_so(tmp_path):
    write_fine_tuning(tmp_path / "final/0", "pets", 0.9)
    write_sweep(tmp_path, [], ["final/0"])
    content = json.loads((tmp_path / "sweep.json").read_text())
    content["tasks"]["task"]["mean"] = {"test/accuracy": 0.9, "test/loss": float("nan")}
    content["tasks"]["task"]["final"][0]["metrics"] = {"test/loss": float("-inf")}
    write_json(tmp_path / "sweep.json", content)
    found = find([str(tmp_path)])
    assert found.left_out == [
        f"{tmp_path}/sweep.json: tasks.task.final[0].metrics.test/loss is -inf, which is not used",
        f"{tmp_path}/sweep.json: tasks.task.mean.test/loss is nan, which is not used",
    ]
    assert found.models[0].values[ACCURACY].value == 0.9
