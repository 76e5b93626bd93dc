"""Reading the folders of runs, evaluations and sweeps."""

import json
import re
import statistics

import pytest

from tests.configs import tiny
from tests.report.workdirs import (
    make_config,
    write_evaluation,
    write_fine_tuning,
    write_json,
    write_run,
    write_sweep,
    write_vtab,
)
from tests.test_train import quick_runs
from vit_jax.costs.flops import forward_flops, train_step_flops
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.models import create_model
from vit_jax.report import lineage
from vit_jax.report.collect import find
from vit_jax.report.listings import common_folder, results_table, runs_table
from vit_jax.report.measured import ACCURACY, REAL
from vit_jax.report.names import data_set_name, model_label, pre_training_name
from vit_jax.report.pretrained import pre_trained_models
from vit_jax.report.seeds import group
from vit_jax.sweep import Sweep
from vit_jax.sweep import __main__ as sweep_command
from vit_jax.sweep.trials import make_tasks
from vit_jax.train import train


def config_of(**fields):
    config = tiny.get_config("steps=2")
    config.eval_batch_size = 96
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.fixture(scope="module")
def real(tmp_path_factory, compilation_cache):
    """A sweep that repeats a run, a run that began with one of its runs, and an evaluation of that."""
    folder = tmp_path_factory.mktemp("real")
    with quick_runs(compilation_cache):
        cadence = "--config.evals.eval_split.every_steps=4"
        arguments = ("--config.eval_batch_size=96", cadence, "--config.checkpoint.keep_best=False")
        tasks = make_tasks(Sweep(seeds=2), "tests/configs/tiny.py:steps=2", arguments, folder / "sweep")
        sweep_command.run_sweep(tasks, folder / "sweep", lambda run: train(run.config, run.path))
        pre = folder / "sweep" / "final" / "seed_0"
        train(config_of(weights=str(pre), seed=5, model__name=None), folder / "fine")
        few_shot = {"evals__fewshot__datasets": ("digits",), "evals__fewshot__shots": (2,), "evals__fewshot__seeds": 2}
        few_shot |= {"evals__fewshot__crop_from": 8, "evals__fewshot__image_size": 8, "data__eval_split": None}
        config = config_of(weights=str(folder / "fine"), model__name=None, **few_shot)
        evaluate(config, folder / "few_shot")
    return folder


def by_path(found, root):
    return {str(record.path.relative_to(root)): record for record in found.models}


def test_real_run_is_read_with_what_it_began_with(real):
    fine = by_path(find([str(real)]), real)["fine"]
    lines = [json.loads(line) for line in (real / "fine/metrics.jsonl").read_text().splitlines()]
    assert fine.values[ACCURACY].value == next(
        row["test/accuracy"] for row in reversed(lines) if "test/accuracy" in row
    )
    assert (fine.steps, fine.seed, fine.training["batch_size"], fine.image_size) == (2, 5, 16, 8)
    assert fine.values[ACCURACY].images[0] == 360
    assert (fine.before.data, fine.before.num_images, fine.trained_on) == ("digits", 1437, "digits")
    assert fine.train_images[0] == 1437
    assert isinstance(fine.train_images[1], str) and isinstance(fine.values[ACCURACY].images[1], str)  # fingerprints
    assert fine.model == "ViT-Ti/4 (hidden_dim=16, mlp_dim=32, num_heads=2, num_layers=1)"
    headless = create_model("ViT-Ti/4", num_classes=0, hidden_dim=16, mlp_dim=32, num_heads=2, num_layers=1)
    assert fine.before.exaflops == pytest.approx(2 * 16 * train_step_flops(headless, 8) / 1e18)


@pytest.mark.parametrize(("patterns", "passes"), [((), 3), (["^head/"], 1), (["(["], None), ([1], None)])
def test_exaflops_cover_the_whole_training(patterns, passes):
    model = {"name": "ViT-Ti/4", "num_classes": 10}
    flops = None if passes is None else passes * forward_flops(create_model("ViT-Ti/4", num_classes=0), 8) * 16 / 1e18
    assert lineage._exaflops(model, 8, 16, patterns) == (flops and pytest.approx(flops))


def test_real_evaluation_adds_to_the_run_it_is_of(real):
    records = by_path(find([str(real)]), real)
    metrics = json.loads((real / "few_shot/evaluation.json").read_text())["metrics"]
    value = records["fine"].values["2-shot digits"]
    assert value.value == metrics["fewshot/digits/pre_logits/2shot"]
    assert value.std == metrics["fewshot/digits/pre_logits/2shot_std"]
    assert value.notes == (
        "few-shot images at 8 pixels, usually 224",
        "evals.fewshot.crop_from=8, usually 9",
        "evals.fewshot.seeds=2, usually 3",
    )
    assert "few_shot" not in records and records["fine"].besides == (str(real / "few_shot"),)


def test_real_sweep_gives_the_mean_that_the_sweep_gives(real):
    found = find([str(real / "sweep")])
    assert [record.purpose.what for record in found.models] == ["final", "final"]
    (result,) = group(found.models)
    assert result.first.before is None
    ours = result.mean(ACCURACY)
    task = json.loads((real / "sweep" / "sweep.json").read_text())["tasks"]["digits"]
    assert ours.mean == pytest.approx(100 * task["mean"]["test/accuracy"])
    assert ours.std == pytest.approx(100 * task["std"]["test/accuracy"])


def test_evaluation_at_another_resolution_is_another_result(tmp_path):
    run = write_fine_tuning(tmp_path / "run", "cifar10", 0.9)
    fields = {"data__dataset": "tfds:cifar10", "data__eval_split": "test"}
    metrics = {"test/accuracy": 0.8, "test/top5_accuracy": 0.9, "test/examples": 10_000}
    write_evaluation(tmp_path / "same", run, metrics, data__image_size=384, **fields)
    write_evaluation(tmp_path / "smaller", run, metrics, data__image_size=224, **fields)
    found = find([str(tmp_path)])
    records = by_path(found, tmp_path)
    assert {name: record.image_size for name, record in records.items()} == {"run": 384, "smaller": 224}
    assert [len(result.models) for result in group(found.models)] == [1, 1]
    assert records["smaller"].before == records["run"].before and records["run"].values[ACCURACY].value == 0.9


def test_written_workdirs_look_like_real_ones(real, tmp_path):
    """Otherwise the other tests would be of an invention."""
    written = write_run(tmp_path, "ViT-Ti/4", {"test/accuracy": 0.5}, steps=2, data__dataset="digits")
    for file in ("config.json", "model.json", "summary.json"):
        theirs, ours = (json.loads((folder / file).read_text()) for folder in (real / "fine", written))
        assert ours.keys() <= theirs.keys(), file
    assert theirs["epochs"] == pytest.approx(theirs["steps"] * 16 / 1437)
    evaluation = write_evaluation(tmp_path, "x", {})
    theirs, ours = (json.loads((folder / "evaluation.json").read_text()) for folder in (real / "few_shot", evaluation))
    assert ours.keys() <= theirs.keys()
    write_sweep(tmp_path, ["a"], ["b"])
    theirs, ours = (json.loads((folder / "sweep.json").read_text()) for folder in (real / "sweep", tmp_path))
    task = next(iter(theirs["tasks"].values()))
    assert ours.keys() == theirs.keys() and ours["tasks"]["task"].keys() <= task.keys()
    assert ours["tasks"]["task"]["final"][0].keys() == task["final"][0].keys()


def test_final_runs_of_a_choice_that_was_given_up_are_not_results(tmp_path):
    for name in ("trials/a", "final/a/seed_0", "final/b/seed_0"):
        write_fine_tuning(tmp_path / name, "cifar10", 0.9)
    write_sweep(tmp_path, ["trials/a"], ["final/b/seed_0"])
    uses = {name: record.purpose.what for name, record in by_path(find([str(tmp_path)]), tmp_path).items()}
    assert uses == {"trials/a": "chooses", "final/a/seed_0": "not chosen", "final/b/seed_0": "final"}


def test_run_that_is_measured_on_training_images_only_chooses(tmp_path):
    write_fine_tuning(tmp_path / "choose", "cifar10", 0.9, data__eval_split="train[98%:]")
    write_vtab(tmp_path / "vtab", "pets", 0.9, data__eval_split="val200")
    found = find([str(tmp_path)])
    assert not any(record.is_result for record in found.models)
    assert pre_trained_models(found.models) == []


@pytest.mark.parametrize(
    ("weights", "data"),
    [
        ("vit_b16_i21k", "ImageNet-21k"),
        ("augreg_b16_i21k", "ImageNet-21k"),
        ("sam_b16_in1k", "ImageNet"),
        ("gs://vit_models/imagenet21k/ViT-B_16.npz", "ImageNet-21k"),
        ("https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz", "ImageNet-21k"),
        ("vit_b16_i21k_in1k_384", "ImageNet-21k, ImageNet"),
        ("/downloads/some.npz", "unknown"),
    ],
)
def test_pre_training_data_of_weights(tmp_path, weights, data):
    write_fine_tuning(tmp_path, "cifar10", 0.9, weights=weights)
    (record,) = find([str(tmp_path)]).models
    assert record.before.data == data


def test_weights_inside_a_workdir_belong_to_the_run(tmp_path):
    pre = write_run(tmp_path / "pre", "ViT-B/16", {}, steps=10, images=300_000_000, data__dataset="tfds:jft")
    (pre / "best").mkdir()
    write_fine_tuning(tmp_path / "fine", "cifar10", 0.9, weights=pre / "best")
    assert by_path(find([str(tmp_path)]), tmp_path)["fine"].before.data == "JFT-300M"


def test_weights_by_a_path_relative_to_the_start_of_the_run_are_found(tmp_path):
    write_run(tmp_path / "here/runs/pre", "ViT-B/16", {}, steps=10, images=1_281_167, data__dataset="tfds:imagenet2012")
    write_fine_tuning(tmp_path / "here/runs/fine", "cifar10", 0.9, weights="runs/pre")
    records = by_path(find([str(tmp_path)]), tmp_path)
    assert records["here/runs/fine"].before.data == "ImageNet"


def test_weights_of_a_run_that_cannot_be_read_are_reported(tmp_path):
    pre = write_run(tmp_path / "elsewhere", "ViT-B/16", {}, steps=10, data__dataset="tfds:jft")
    (pre / "config.json").write_text("{")
    write_fine_tuning(tmp_path / "here/fine", "cifar10", 0.9, weights=pre)
    found = find([str(tmp_path / "here")])
    assert found.models[0].before.data == "unknown"
    assert found.left_out[0].startswith(f"{pre}: what these weights were trained on cannot be read: {pre}/config.json")


def test_cycle_of_runs_ends(tmp_path):
    for one, other in (("a", "b"), ("b", "a")):
        write_fine_tuning(tmp_path / one, "cifar10", 0.9, weights=tmp_path / other)
    assert len(find([str(tmp_path)]).models) == 2
    for run in ("a", "b"):  # of versions that did not write it
        (tmp_path / run / "model.json").unlink()
    assert [record.model for record in find([str(tmp_path)]).models] == ["ViT-B/16", "ViT-B/16"]


def test_same_run_twice_counts_once_and_says_so(tmp_path):
    for name, seed, accuracy in (("a", 0, 0.90), ("b", 1, 0.94), ("c_other", 1, 0.50), ("d_copy", 0, 0.90)):
        write_fine_tuning(tmp_path / name, "cifar10", accuracy, seed=seed)
    found = find([str(tmp_path)])
    (result,) = group(record for record in found.models if record.is_result)
    ours = result.mean(ACCURACY)
    assert ours.mean == pytest.approx(92.0) and ours.std == pytest.approx(100 * statistics.stdev((0.90, 0.94)))
    assert ours.seeds == 2 and len(found.models) == 4
    other, copy = found.left_out
    assert other.startswith(f"{tmp_path}/c_other: repeats {tmp_path}/b, its setting and its seed 1")
    assert other.endswith("accuracy is 50.00 here, 94.00 there.") and copy.endswith("the numbers are the same.")
    assert [row[8] for row in runs_table(found.models).rows if "/c_other" in row[-1]] == [f"repeats {tmp_path}/b"]


def test_runs_of_pre_trainings_with_several_seeds_are_averaged(tmp_path):
    for seed, accuracy in ((0, 0.90), (1, 0.92), (2, 0.97)):
        pre = write_run(tmp_path / f"pre_{seed}", "ViT-B/16", {}, steps=10, data__dataset="tfds:jft", seed=seed)
        write_fine_tuning(tmp_path / f"fine_{seed}", "cifar10", accuracy, weights=pre)
    (result,) = group(record for record in find([str(tmp_path)]).models if record.before)
    assert result.mean(ACCURACY).mean == pytest.approx(93.0) and len(result.models) == 3


@pytest.mark.parametrize("field", [{"optimizer__learning_rate": 0.5}, {"data__image_size": 224}, {"steps": 77}])
def test_runs_of_other_settings_are_not_averaged(tmp_path, field):
    write_fine_tuning(tmp_path / "a", "cifar10", 0.9)
    write_fine_tuning(tmp_path / "b", "cifar10", 0.8, seed=1, **field)
    assert [len(result.models) for result in group(find([str(tmp_path)]).models)] == [1, 1]


def test_runs_on_different_hardware_are_averaged(tmp_path):
    write_fine_tuning(tmp_path / "a", "cifar10", 0.9)
    write_fine_tuning(tmp_path / "b", "cifar10", 0.8, seed=1, mesh__model=2, eval_batch_size=100, data__num_threads=3)
    assert [len(result.models) for result in group(find([str(tmp_path)]).models)] == [2]


def test_numbers_of_a_run_are_taken_at_its_end(tmp_path):
    path = write_fine_tuning(tmp_path, "cifar10", 0.9)
    earlier = '{"step": 10, "test/accuracy": 1.0, "objectnet/accuracy": 1.0}\n'
    (path / "metrics.jsonl").write_text(earlier + (path / "metrics.jsonl").read_text())
    (record,) = find([str(tmp_path)]).models
    assert record.values[ACCURACY].value == 0.9 and "ObjectNet" not in record.values


def test_real_labels_in_place_of_the_usual_ones_are_not_imagenet_accuracy(tmp_path):
    run = write_fine_tuning(tmp_path / "run", "imagenet2012", 0.8)
    fields = {"data__dataset": "tfds:imagenet2012", "data__eval_split": "validation", "data__image_size": 384}
    metrics = {"validation/accuracy": 0.9, "validation/examples": 46_837}
    write_evaluation(tmp_path / "real", run, metrics, data__eval_labels="real.json", **fields)
    (record,) = find([str(tmp_path)]).models
    assert record.values[ACCURACY].value == 0.8 and record.values[REAL].value == 0.9


def test_evaluation_of_best_parameters_is_separate_with_a_note(tmp_path):
    run = write_fine_tuning(tmp_path / "run", "imagenet2012", 0.8)
    summary = json.loads((run / "summary.json").read_text())
    write_json(run / "summary.json", summary | {"best_step": 5})
    fields = {"data__dataset": "tfds:imagenet2012", "data__eval_split": "validation", "data__image_size": 384}
    write_evaluation(tmp_path / "more", run, {"validation/accuracy": 0.81, "real/accuracy": 0.9}, **fields)
    found = find([str(tmp_path)])
    last, best = found.models[1], found.models[0]
    assert last.values[ACCURACY].value == 0.8 and last.values.keys() == {ACCURACY, "top-5"}
    assert best.values[ACCURACY].value == 0.81
    assert best.values[REAL].notes == ("of the best parameters on validation, not of the last",)
    assert len(group(found.models)) == 2


def test_few_shot_data_sets_have_their_names(tmp_path):
    places = ("tfds:imagenet2012", "tfds:cifar100", "/data/birds")
    metrics = {f"fewshot/{name}/pre_logits/5shot": 0.1 for name in ("imagenet2012", "cifar100", "birds")}
    metrics |= {"fewshot/birds/encoded/10shot": 0.2, "fewshot/birds/encoded/10shot/l2=3": 0.3}
    write_evaluation(
        tmp_path, "vit_b16_i21k", metrics, evals__fewshot__datasets=places, evals__fewshot__test_split="validation"
    )
    (record,) = find([str(tmp_path)]).models
    assert set(record.values) == {
        "5-shot ImageNet",  # whose test images are those of validation
        "5-shot CIFAR-100 validation",
        "5-shot birds validation",
        "10-shot birds validation (encoded)",
    }


def test_folders_without_results_have_a_line_each_and_the_rest_is_read(tmp_path):
    write_fine_tuning(tmp_path / "good", "cifar10", 0.9)
    write_run(tmp_path / "half", "ViT-B/16", {}, steps=10, unfinished=True, data__dataset="digits")
    longer = write_fine_tuning(tmp_path / "longer", "cifar10", 0.9)
    with (longer / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12000, "train/loss": 1}\n')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"data": ')
    write_json(tmp_path / "foreign" / "config.json", {"model_type": "vit"})
    write_json(tmp_path / "evaluation" / "evaluation.json", {"accuracy": 0.5})
    write_json(tmp_path / "sweep" / "sweep.json", ["x"])
    write_json(tmp_path / "damaged" / "config.json", make_config({"steps": 1}))
    write_json(tmp_path / "damaged" / "summary.json", {"steps": 1})
    (tmp_path / "damaged" / "metrics.jsonl").write_text('{"a": 1}\nnot json\n{"step": 1}\n')
    cut = write_fine_tuning(tmp_path / "cut", "cifar10", 0.9)
    (cut / "metrics.jsonl").write_text((cut / "metrics.jsonl").read_text()[:-10])
    diverged = write_run(tmp_path / "nan", "ViT-B/16", {}, steps=10, unfinished=True, data__dataset="digits")
    write_json(diverged / "failure.json", {"reason": "loss is nan at step 3. Try a lower optimizer.learning_rate."})
    found = find([str(tmp_path)])
    assert list(by_path(found, tmp_path)) == ["good"]
    told = {re.split("[: ]", line.removeprefix(f"{tmp_path}/"))[0]: line for line in found.left_out}
    assert len(found.left_out) == len(told) == 9
    assert "not finished (step 10)" in told["half"]
    assert "went on after its summary, and is at step 12000" in told["longer"]
    assert "is damaged or not JSON" in told["broken/config.json"]
    assert "not a config of vit_jax" in told["foreign/config.json"]
    assert "is not a config of vit_jax" in told["evaluation/evaluation.json"]
    assert "not what a sweep writes" in told["sweep/sweep.json"]
    assert "is damaged: a row has no step" in told["damaged/metrics.jsonl"]
    assert "metrics.jsonl lacks the evaluation of step 10000" in told["cut"]
    assert told["nan"].endswith("nan: failed: loss is nan at step 3")


def test_empty_folder_is_an_error_that_says_what_was_searched(tmp_path):
    with pytest.raises(UserError, match=r"(?s)no result in .*summary\.json.*evaluation\.json.*sweep\.json"):
        find([str(tmp_path)])
    with pytest.raises(UserError, match="there is no folder"):
        find([str(tmp_path / "missing")])


def test_folder_that_is_given_twice_is_read_once(tmp_path):
    write_fine_tuning(tmp_path / "run", "cifar10", 0.9)
    assert len(find([str(tmp_path), str(tmp_path / "run")]).models) == 1


def test_results_of_a_users_own_folder_have_a_line_each(tmp_path):
    for seed, accuracy in ((0, 0.5), (1, 0.7)):
        place = {"data__dataset": "/home/me/birds", "data__eval_split": "test", "data__image_size": 224, "seed": seed}
        write_run(
            tmp_path / f"s{seed}",
            "ViT-Ti/16",
            {"test/accuracy": accuracy},
            steps=9,
            weights="augreg_ti16_i21k",
            **place,
        )
    listing = results_table(find([str(tmp_path)]).models)
    (row,) = listing.rows
    assert row[:9] == ["ViT-Ti/16", "ImageNet-21k", "birds", "test", "224", "9", "0", "0, 1", "60.00 ± 14.14"]


def test_results_that_look_the_same_say_how_they_differ(tmp_path):
    sizes = {"hidden_dim": 128}
    for name in ("a", "b"):
        write_run(
            *(tmp_path / "pre" / name, "ViT-Ti/16", {"test/accuracy": 0.4}),
            **{"steps": 3, "data__dataset": "/x/animals", "data__eval_split": "test", "model_fields": sizes},
            optimizer__learning_rate=0.1 if name == "a" else 0.2,
        )
    fields = {"model_fields": sizes, "data__dataset": "/x/birds"}
    tuned = {
        "plain": {"weights": str(tmp_path / "pre/a")},
        "averaged": {"weights": str(tmp_path / "pre/a"), "polyak_decay": 0.9, "optimizer__clip_norm": 2.0},
        "other": {"weights": str(tmp_path / "pre/b")},
        "longer": {"weights": str(tmp_path / "pre/b"), "steps": 1000},
    }
    for name, changes in tuned.items():
        write_fine_tuning(tmp_path / "tuned" / name, "cifar10", 0.5, model="ViT-Ti/16", **{**fields, **changes})
    listing = results_table(find([str(tmp_path)]).models)
    meanings = dict(remark.split("] ") for remark in listing.remarks if remark.startswith("["))
    besides = {}
    for row in listing.rows:
        _, first, *rest = row[0].split(" [")
        assert meanings[f"[{first.removesuffix(']')}"] == "hidden_dim=128"
        besides[row[-1].rpartition("/")[2]] = [meanings[f"[{mark.removesuffix(']')}"] for mark in rest]
    assert besides == {
        "a": ["optimizer.learning_rate=0.1"],
        "b": ["optimizer.learning_rate=0.2"],
        "plain": [f"optimizer.clip_norm=1.0, polyak_decay=None, from {tmp_path}/pre/a"],
        "averaged": [f"optimizer.clip_norm=2.0, polyak_decay=0.9, from {tmp_path}/pre/a"],
        "other": [f"optimizer.clip_norm=1.0, polyak_decay=None, from {tmp_path}/pre/b"],
        "longer": [],
    }
    column = listing.value_headings.index("differs in")
    assert {row[column] for row in listing.values} == {" ".join(told) for told in besides.values()}


@pytest.mark.parametrize(
    ("folders", "common"),
    [
        (("gs://bucket/sweep/seed_0", "gs://bucket/sweep/seed_1"), "gs://bucket/sweep"),
        (("runs/a", "/elsewhere/b"), "..."),
        (("runs/seed_1", "runs/seed_10"), "runs"),
    ],
)
def test_folder_that_runs_have_in_common(folders, common):
    assert common_folder(folders) == common


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("tfds:imagenet2012:5.1.0", "ImageNet"),
        ("tfds:oxford_iiit_pet", "Pets"),
        ("/data/cifar10/3.0.2", "CIFAR-10"),
        ("/data/my_cifar10.zip", "my_cifar10.zip"),
        ("vtab:clevr_count", "VTAB Clevr-Count"),
        ("/data/web/*.array_record*", "web/*.array_record*"),
        ("digits", "digits"),
    ],
)
def test_names_of_data_sets(dataset, name):
    assert data_set_name(dataset) == name


def test_a_part_of_a_pre_training_set_does_not_have_its_name():
    assert pre_training_name("tfds:imagenet21k", "full[51200:]", 12_300_000) == "ImageNet-21k"
    assert pre_training_name("tfds:jft", "train[51200:]", None) == "JFT-300M train[51200:]"
    assert pre_training_name("tfds:imagenet2012", "train[:10%]", 128_117) == "ImageNet (128,117 images)"


def test_changed_model_does_not_have_the_plain_name():
    assert model_label({"name": "ViT-B/16", "num_layers": 12, "dtype": "bfloat16", "pre_logits": True}) == "ViT-B/16"
    assert model_label({"name": "ViT-B/16", "num_layers": 4, "pool": "gap"}) == "ViT-B/16 (num_layers=4, pool=gap)"


def test_best_parameters_are_neither_a_repeat_of_the_last_nor_averaged_with_them(tmp_path):
    runs = [write_fine_tuning(tmp_path / f"run{seed}", "imagenet2012", 0.8, seed=seed) for seed in range(2)]
    config, model, summary = (
        json.loads((runs[0] / f"{name}.json").read_text()) for name in ("config", "model", "summary")
    )
    write_json(runs[0] / "summary.json", summary | {"best_step": 5})
    path = write_evaluation(tmp_path / "best", runs[0], {"validation/accuracy": 0.9, "validation/examples": 50_000})
    evaluation = json.loads((path / "evaluation.json").read_text())
    write_json(path / "evaluation.json", evaluation | {"config": config, "model_fields": model})
    found = find([str(tmp_path)])
    assert not found.left_out
    assert [(len(each.models), each.mean(ACCURACY).mean) for each in group(found.models)] == [(1, 90), (2, 80)]


def test_few_shot_evaluations_at_other_resolutions_are_not_averaged(tmp_path):
    few_shot = {"evals__fewshot__datasets": ("tfds:cifar100",), "evals__fewshot__image_size": 224}
    for seed, size in enumerate((384, 512)):
        pre = write_run(tmp_path / f"pre{seed}", "ViT-B/16", {}, steps=10, seed=seed, data__dataset="tfds:jft")
        fields = {"data__dataset": "tfds:jft", "data__image_size": size, "data__eval_split": None, **few_shot}
        write_evaluation(tmp_path / f"few{seed}", pre, {"fewshot/cifar100/pre_logits/5shot": 0.5}, **fields)
    assert [len(each.models) for each in group(find([str(tmp_path)]).models)] == [1, 1, 2]
