"""Numbers on part of a test set, invalid numbers, and folders that must not be lost silently."""

import functools
import json
import os
import shutil

import pytest

from tests.report.workdirs import FINE_TUNING, write_evaluation, write_fine_tuning, write_json, write_run, write_vtab
from vit_jax.data.imagenet_test_sets import IMAGENET_TEST_SETS
from vit_jax.data.vtab import TASKS as VTAB_TASKS
from vit_jax.errors import UserError
from vit_jax.evaluators import registry
from vit_jax.evaluators.registry import entry
from vit_jax.paper import tables
from vit_jax.report.collect import find
from vit_jax.report.listings import results_table, runs_table
from vit_jax.report.measured import ACCURACY, REAL, TEST_IMAGES, vtab_test_images
from vit_jax.report.paper_tables import paper_tables
from vit_jax.report.pretrained import pre_trained_models


def change_rows(run, **metrics):
    """Other values among the metrics of a run's last step; None: none."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1] = {name: value for name, value in (rows[-1] | metrics).items() if value is not None or name not in metrics}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def in_paper_tables(found):
    models = pre_trained_models(found.models)
    return {
        (table.name, row, column)
        for table in paper_tables(found.models, models)
        for (row, column), cell in table.cells.items()
        if cell.ours
    }


def results(found):
    listing = results_table(found.models)
    return {row[-1].rpartition("/")[2]: row[8:-1] for row in listing.rows}


def test_test_sets_match_the_protocols():
    assert {name: examples for name, (*_, examples) in FINE_TUNING.items()} == TEST_IMAGES
    sizes = {task: vtab_test_images(task) for task in VTAB_TASKS}
    assert (
        sizes["kitti_distance"] == (711,) and sizes["cifar100"] == (10_000,) and sizes["smallnorb_azimuth"] == (12_150,)
    )
    assert sizes["dsprites_location"] == (73_728,) and all(min(each) > 0 for each in sizes.values())


@pytest.mark.parametrize(
    ("labels", "examples", "name", "is_result"),
    [
        (None, 50_000, ACCURACY, True),
        (None, 49_999, ACCURACY, False),
        (None, 46_837, ACCURACY, False),
        ("real.json", 46_837, REAL, True),  # all that have such a label
        ("real.json", 46_836, REAL, False),
        ("real.json", 50_000, REAL, False),
    ],
)
def test_accuracy_on_part_of_imagenet_is_not_a_result(tmp_path, labels, examples, name, is_result):
    run = write_fine_tuning(tmp_path, "imagenet2012", 0.9, data__eval_labels=labels)
    change_rows(run, **{"validation/examples": examples})
    found = find([str(tmp_path)])
    (record,) = found.models
    assert record.values[name].value == 0.9 and record.is_result == is_result
    assert bool(in_paper_tables(found)) == bool(results(found)) == is_result
    if not is_result:
        whole = 46_837 if labels else 50_000
        assert record.purpose.what == f"measured on {examples:,} of {whole:,} images"
        assert found.left_out == [f"{run}: {name} is not a result: {record.purpose.what}"]


def test_one_seed_that_was_measured_by_two_kinds_of_labels_has_a_line_for_each(tmp_path):
    write_fine_tuning(tmp_path / "own", "imagenet2012", 0.8)
    run = write_fine_tuning(tmp_path / "real", "imagenet2012", 0.9, data__eval_labels="real.json")
    change_rows(run, **{"validation/examples": 46_837})
    found = find([str(tmp_path)])
    assert not found.left_out and all(record.is_result for record in found.models)
    assert results(found) == {"own": ["80.00", ""], "real": ["", "90.00"]}


@pytest.mark.parametrize("variant", IMAGENET_TEST_SETS)
def test_number_on_part_of_a_variant_is_reported_and_the_rest_counts(tmp_path, variant):
    whole = 46_837 if variant == "real" else IMAGENET_TEST_SETS[variant].num_images
    for name, examples in (("whole", whole), ("part", whole - 1)):
        run = write_fine_tuning(tmp_path / name, "imagenet2012", 0.85, seed=int(name == "part"))
        change_rows(run, **{f"{variant}/accuracy": 0.5, f"{variant}/examples": examples})
    found = find([str(tmp_path)])
    flaw = f"measured on {whole - 1:,} of {whole:,} images"
    assert found.left_out == [f"{tmp_path}/part: {IMAGENET_TEST_SETS[variant].title} is not a result: {flaw}"]
    ((accuracy, value),) = results(found).values()
    assert (accuracy, value) == ("85.00 ± 0.00", "50.00")
    assert f"{tmp_path}: {IMAGENET_TEST_SETS[variant].title} is without seed 1" in results_table(found.models).remarks
    assert [row[8] for row in runs_table(found.models).rows] == [f"final; {flaw}", "final"]


def test_vtab_and_few_shot_on_part_of_a_test_set_are_not_results(tmp_path):
    write_vtab(tmp_path / "whole", "kitti_distance", 0.8)
    change_rows(write_vtab(tmp_path / "part", "kitti_distance", 0.9, seed=1), **{"test/examples": 700})
    few = {"evals__fewshot__datasets": ("tfds:imagenet2012",), "evals__fewshot__test_split": "validation"}
    metric = "fewshot/imagenet2012/pre_logits/5shot"
    for name, examples in (("few_whole", 50_000), ("few_part", 1_000)):
        metrics = {metric: 0.6, "fewshot/imagenet2012/examples": examples}
        write_evaluation(tmp_path / name, "vit_b16_i21k", metrics, **few)
    found = find([str(tmp_path)])
    uses = {record.path.name: record.purpose.what for record in found.models}
    assert uses["part"] == "measured on 700 of 711 images" and uses["whole"] == "final"
    assert uses["few_part"] == "measured on 1,000 of 50,000 images"
    assert uses["few_whole"] == "final"


def test_evaluation_of_any_name_and_type_has_a_column(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.TYPES, "mine", registry.Registered(None, {"threshold": registry.Field(0.5, None)}))
    entries = {
        "birds": entry("classification", dataset="/data/birds"),
        "probe": entry("fewshot", datasets=("/data/birds",), image_size=224),
        "new": {"type": "mine", "threshold": 0.5},
    }
    metrics = {"birds/accuracy": 0.5, "probe/birds/pre_logits/5shot": 0.6, "new/accuracy": 0.7}
    for name, threshold in (("a", 0.5), ("b", 0.6)):
        entries["new"]["threshold"] = threshold
        fields = {f"evals__{each}": value for each, value in entries.items()}
        write_evaluation(tmp_path / name, "vit_b16_i21k", metrics, **fields)
    found = find([str(tmp_path)])
    listing = results_table(found.models)
    assert listing.headings[8:-1] == ["birds", "new", "5-shot birds (probe)"]
    assert [row[8:-1] for row in listing.rows] == [["50.00", "70.00", "60.00"]] * 2
    assert any(remark.endswith("evals.new.threshold=0.6") for remark in listing.remarks)


def test_number_on_images_that_were_trained_on_is_not_a_result(tmp_path):
    run = write_fine_tuning(tmp_path / "run", "cifar10", 0.9, data__dataset="/data/mine")
    summary = json.loads((run / "summary.json").read_text())
    write_json(run / "summary.json", summary | {"overlap": {"test": 12}})
    few = {"evals__fewshot__datasets": ("/data/mine",)}
    file = write_evaluation(tmp_path / "few", "vit_b16_i21k", {"fewshot/mine/pre_logits/5shot": 0.6}, **few)
    content = json.loads((file / "evaluation.json").read_text())
    write_json(file / "evaluation.json", content | {"overlap": {"fewshot/mine": 7}})
    found = find([str(tmp_path)])
    assert [record.purpose.what for record in found.models] == [
        "measured on images of which 7 were trained on",
        "measured on images of which 12 were trained on",
    ]
    assert len(found.left_out) == 2


def test_unknown_number_of_images_is_not_a_flaw(tmp_path):
    """Of old workdirs."""
    change_rows(write_fine_tuning(tmp_path, "cifar10", 0.9), **{"test/examples": None})
    found = find([str(tmp_path)])
    assert found.models[0].is_result and not found.left_out


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY, -0.1, 1.2, 90.0, "0.9", None, True, [0.9]])
def test_invalid_accuracy_leaves_its_run_out_with_a_line(tmp_path, value):
    write_fine_tuning(tmp_path / "good", "pets", 0.9)
    run = write_fine_tuning(tmp_path / "bad", "cifar10", 0.5)
    rows = (run / "metrics.jsonl").read_text().replace('"test/accuracy": 0.5', f'"test/accuracy": {json.dumps(value)}')
    (run / "metrics.jsonl").write_text(rows)
    found = find([str(tmp_path)])
    assert [record.path.name for record in found.models] == ["good"]
    (line,) = found.left_out
    assert line.startswith(f"{run}: test/accuracy is {value!r}")


@pytest.mark.parametrize(
    "metric", ["real/accuracy", "fewshot/digits/pre_logits/5shot", "objectnet/examples", "test/top5_accuracy"]
)
@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_other_number_that_is_not_finite_is_left_out_with_a_line(tmp_path, metric, value):
    run = write_fine_tuning(tmp_path, "cifar10", 0.9, evals__fewshot__datasets=("digits",))
    change_rows(run, **{"objectnet/accuracy": 0.5, metric: value})
    found = find([str(tmp_path)])
    assert found.left_out == [f"{run}: {metric} is {value}, not a finite number"]
    assert found.models[0].values[ACCURACY].value == 0.9
    assert not {"ImageNet ReaL", "5-shot digits"} & found.models[0].values.keys()


def test_loss_that_is_not_finite_is_reported_beside_the_accuracy(tmp_path):
    """The arg-max of logits that are no numbers is some class all the same."""
    for seed, loss in enumerate((0.4, NAN, 0.5)):
        change_rows(write_fine_tuning(tmp_path / str(seed), "cifar10", 0.9, seed=seed), **{"test/loss": loss})
    found = find([str(tmp_path)])
    listing = results_table(found.models)
    assert [row[8] for row in listing.rows] == ["90.00 ± 0.00"]
    told = "test/loss is nan: some logits are not finite, so the accuracy may be meaningless"
    assert f"{tmp_path}: accuracy: {told}" in listing.remarks


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", each) for each in (NAN, INFINITY, -1.0, "3", True, [1])),
        *(("steps", each) for each in (NAN, 1e400, 10_000.5, "10000")),
        *(("tpuv3_core_days", each) for each in (NAN, INFINITY)),
        ("model", 3),
    ],
)
def test_summary_with_impossible_values_leaves_its_run_out_with_a_line(tmp_path, name, value):
    write_fine_tuning(tmp_path / "good", "pets", 0.9)
    run = write_fine_tuning(tmp_path / "bad", "cifar10", 0.9)
    summary = json.loads((run / "summary.json").read_text())
    write_json(run / "summary.json", summary | {name: value})
    found = find([str(tmp_path)])
    assert [record.path.name for record in found.models] == ["good"]
    (line,) = found.left_out
    assert line.startswith(f"{run}/summary.json: {name} is {value!r}")


@pytest.mark.parametrize("text", ['{"steps": NaN', "[1]", "", "[" * 3000, '{"a": 1, "a": 2}'])
@pytest.mark.parametrize("file", ["summary.json", "config.json", "model.json"])
def test_damaged_file_is_a_line(tmp_path, file, text):
    write_fine_tuning(tmp_path / "good", "pets", 0.9)
    run = write_fine_tuning(tmp_path / "bad", "cifar10", 0.9)
    (run / file).write_text(text)
    found = find([str(tmp_path)])
    assert [record.path.name for record in found.models] == ["good"] and len(found.left_out) == 1
    assert found.left_out[0].startswith((f"{run}/{file} is damaged", f"{run}/{file} is not a config"))


@pytest.mark.parametrize(
    "field",
    [
        {"batch_size": "512"},
        {"data.image_size": "large"},
        {"data.eval_split": 3},
        {"data.mixture": ["a"]},
        {"train_only": None},
        {"seed": None},
        {"weights": ["a"]},
        {"evals.fewshot.datasets": "digits"},
    ],
)
def test_config_with_impossible_values_is_a_line(tmp_path, field):
    write_fine_tuning(tmp_path / "good", "pets", 0.9)
    run = write_fine_tuning(tmp_path / "bad", "cifar10", 0.9)
    config = json.loads((run / "config.json").read_text())
    ((name, value),) = field.items()
    *groups, last = name.split(".")
    functools.reduce(lambda group, each: group[each], groups, config)[last] = value
    write_json(run / "config.json", config)
    found = find([str(tmp_path)])
    assert [record.path.name for record in found.models] == ["good"]
    assert found.left_out == [f"{run}/config.json: {name} is {value!r}, which is invalid."]


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"test/accuracy": NAN}},
        {"metrics": {"test/accuracy": INFINITY}},
        {"metrics": [1]},
        {"model_fields": {}},
        {"config": {}},
        {"weights": None},
        {"metrics": None},
    ],
)
def test_evaluation_with_impossible_values_is_a_line(tmp_path, change):
    write_fine_tuning(tmp_path / "good", "pets", 0.9)
    fields = {"data__dataset": "tfds:cifar10", "data__eval_split": "test"}
    path = write_evaluation(tmp_path / "bad", "vit_b16_i21k", {"test/accuracy": 0.5}, **fields)
    content = json.loads((path / "evaluation.json").read_text())
    write_json(path / "evaluation.json", content | change)
    found = find([str(tmp_path)])
    shown = {record.path.name for record in found.models if record.values}
    assert shown == {"good"} and any(line.startswith(f"{path}") for line in found.left_out)


def test_every_folder_of_a_run_is_in_a_table_or_has_a_line(tmp_path):
    """For any name, any surrounding folder, and any missing file."""
    folders = [write_fine_tuning(tmp_path / "a", "cifar10", 0.9)]
    folders += [write_fine_tuning(tmp_path / name, "pets", 0.8) for name in ("best", "profile", "checkpoints/x")]
    folders.append(shutil.copytree(tmp_path / "a", tmp_path / "a_copy"))
    for missing in ("config.json", "summary.json", "metrics.jsonl", "model.json"):
        folders.append(write_fine_tuning(tmp_path / f"without/{missing}", "cifar100", 0.7))
        (folders[-1] / missing).unlink()
    folders.append(write_fine_tuning(tmp_path / "a/more/inside", "flowers", 0.7))
    for file in ("config.json", "summary.json"):
        folders.append(write_fine_tuning(tmp_path / f"pipe/{file}", "cifar10", 0.7))
        (folders[-1] / file).unlink()
        os.mkfifo(folders[-1] / file)
    os.symlink(tmp_path, tmp_path / "loop")
    found = find([str(tmp_path)])
    rows = {row[-1] for row in runs_table(found.models).rows}
    for folder in folders:
        in_line = [line for line in found.left_out if f"{folder}:" in line or f"{folder}/" in line]
        assert (str(folder) in rows) or in_line, folder
    # A run's own folders are none.
    assert write_run(tmp_path / "a/best", "ViT-B/16", {}, steps=3, data__dataset="digits")
    assert str(tmp_path / "a/best") not in {str(record.path) for record in find([str(tmp_path)]).models}


def test_name_that_is_not_text_is_shown(tmp_path, capsys):
    from vit_jax.report import __main__ as report

    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_fine_tuning(folder / "run", "cifar10", 0.9, data__dataset="/data/line\nbreak")
    write_fine_tuning(folder / "copy", "cifar10", 0.9, data__dataset="/data/line\nbreak")
    assert report.main([str(folder), f"--out={tmp_path / 'out'}"]) == 0
    assert "caf\\xe9" in capsys.readouterr().out
    assert "caf\\xe9" in (tmp_path / "out/results.csv").read_text()
    with pytest.raises(UserError, match=r"caf\\xe9"):
        find([str(folder / "none")])


def test_paper_cells_hold_no_part_of_a_test_set(tmp_path):
    """Each task of the tables, once whole and once in part."""
    for task, (*_, examples) in FINE_TUNING.items():
        run = write_fine_tuning(tmp_path / task, task, 0.9, real=0.9 if task == "imagenet2012" else None)
        split = FINE_TUNING[task][2]
        change_rows(run, **{f"{split}/examples": examples // 2, "real/examples": 40_000})
    found = find([str(tmp_path)])
    assert not in_paper_tables(found) and len(found.left_out) == len(FINE_TUNING) + 1
    assert len(runs_table(found.models).rows) == len(FINE_TUNING)
    assert tables.TABLE_5["ImageNet-21k"]["Pets"]
