"""Settings that separate results, and runs whose config changed."""

import json

import pytest

from tests.report.workdirs import (
    write_evaluation,
    write_facts,
    write_fine_tuning,
    write_json,
    write_run,
    write_starts,
)
from vit_jax.config import base_config, flatten
from vit_jax.report import settings
from vit_jax.report.collect import find
from vit_jax.report.listings import results_table, runs_table
from vit_jax.report.measured import ACCURACY
from vit_jax.report.seeds import group

FIELDS = flatten(json.loads(base_config().to_json()))
MODEL = {"name": "ViT-Ti/16", "num_classes": 3, "dtype": "bfloat16"}
# Other values of fields and of attributes of a model that are computed with.
OTHER = {
    **dict.fromkeys(("num_layers", "hidden_dim", "mlp_dim", "num_heads", "num_classes"), 6),
    **dict.fromkeys(("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate", "head_bias"), 0.5),
    **{"pool": "gap", "position_embedding": "none", "position_embedding_at": "shared", "pre_logits": True},
    **{"data.mixture": [["/data/mine", 1.0]], "data.image_size": 99, "evals.fewshot.image_size": 99},
    **{"attention": "einsum", "dtype": "float32", "param_dtype": "bfloat16", "scan_layers": True, "remat": "full"},
}


def keys(fields, model):
    """What training, accuracy, ReaL and few-shot depend on."""
    return {
        "training": settings.key_of(settings.training_settings(fields, model, 100)),
        "accuracy": settings.accuracy_settings(fields, model),
        "real": settings.entry_settings("real", fields, model),
        "few-shot": settings.few_shot_settings("fewshot", "tfds:pets", fields, model),
    }


def is_in(name, *lists):
    return any(settings.is_among(name, each) for each in lists)


TYPES = [name for name in FIELDS if name.endswith(".type")]  # of evaluations, which are different ones then
NEW = ("optimizer.brand_new", "data.brand_new", "brand_new")


@pytest.mark.parametrize("name", [*(name for name in FIELDS if name not in TYPES), *NEW])
def test_each_field_separates_results_unless_a_list_says_why_not(name):
    """A field that is added to the config counts, until somebody gives a reason."""
    model, changed = MODEL, {**FIELDS, name: OTHER.get(name, "something else")}
    if name.startswith("model.") and name != "model.name":  # what the model has counts, not what the config asks for
        model = {**MODEL, name.removeprefix("model."): OTHER.get(name.removeprefix("model."), "something else")}
    before, after = keys(FIELDS, MODEL), keys(changed, model)
    differing = {what for what in before if before[what] != after[what]}
    if is_in(name, settings.WITHOUT_EFFECT):
        assert differing == set()
        return
    if is_in(name, settings.COUNTED_ELSEWHERE) and not name.startswith("model."):
        assert differing == set()
        return
    if name == "model.name":
        return
    assert ("training" in differing) != is_in(name, settings.ONLY_EVALUATION)
    if is_in(name, settings.ONLY_TRAINING):
        assert differing == {"training"}
    elif not name.startswith("evals."):
        assert "accuracy" in differing
    elif name.endswith((".l2", ".bias", ".seeds", "real.dataset")):
        assert differing & {"real", "few-shot"}


def test_lists_name_existing_fields_each_with_a_reason():
    for names in (
        settings.WITHOUT_EFFECT,
        settings.COUNTED_ELSEWHERE,
        settings.ONLY_EVALUATION,
        settings.ONLY_TRAINING,
    ):
        for name, reason in names.items():
            assert len(reason) > 5
            assert name in FIELDS or (name.endswith(".") and any(field.startswith(name) for field in FIELDS)), name
    assert not settings.ONLY_EVALUATION.keys() & settings.ONLY_TRAINING.keys()


def test_defaults_of_a_model_are_the_same_whether_they_are_written_out_or_not():
    plain = settings.attributes({"name": "ViT-B/16", "num_classes": 3})
    assert plain == settings.attributes({"name": "ViT-B/16", "num_classes": 3, "dropout_rate": 0.0, "num_layers": 12})
    assert plain != settings.attributes({"name": "ViT-B/16", "num_classes": 3, "dropout_rate": 0.1})
    foreign = {"name": "ViT-B/16", "no_such_attribute": 3}  # of another version
    assert settings.attributes(foreign) == {"model.name": "ViT-B/16", "model.no_such_attribute": 3}


@pytest.mark.parametrize(
    "field",
    [
        {"model_fields": {"dropout_rate": 0.0}},
        {"model_fields": {"dropout_rate": 0.1, "stochastic_depth_rate": 0.1}},
        {"rng": "rbg"},
        {"accumulation_steps": 4},
        {"data__image_key": "picture"},
        {"optimizer__momentum_dtype": "float32"},
        {"images_": 49_000},  # the data set was smaller
    ],
)
def test_runs_that_differ_in_what_can_change_a_number_are_not_averaged(tmp_path, field):
    write_fine_tuning(tmp_path / "a", "cifar10", 0.9)
    write_fine_tuning(
        tmp_path / "b", "cifar10", 0.8, seed=1, **{name.rstrip("_"): each for name, each in field.items()}
    )
    found = find([str(tmp_path)])
    assert [len(result.models) for result in group(found.models)] == [1, 1]
    first, second = results_table(found.models).rows
    assert first[:8] != second[:8]  # a reader sees what sets them apart


def test_length_counts_however_it_was_given(tmp_path):
    write_fine_tuning(tmp_path / "a", "cifar10", 0.9, steps=100)
    write_fine_tuning(tmp_path / "b", "cifar10", 0.8, seed=1, steps=100)
    config = json.loads((tmp_path / "b/config.json").read_text())
    write_json(tmp_path / "b/config.json", config | {"steps": None, "epochs": 51.2})
    assert [len(result.models) for result in group(find([str(tmp_path)]).models)] == [2]


def test_number_of_images_is_the_recorded_one_if_the_batch_size_changed(tmp_path):
    """10 steps of 512 and 10 of 1024 of 1,000 images; the config has only the last batch size."""
    run = write_fine_tuning(tmp_path, "cifar10", 0.9, steps=20, batch_size=1024)
    summary = json.loads((run / "summary.json").read_text())
    write_json(run / "summary.json", summary | {"epochs": 15.36})
    write_facts(run, train="x")
    (record,) = find([str(tmp_path)]).models
    assert record.train_images == (1000, "x")


def test_images_that_were_recorded_as_others_are_not_averaged(tmp_path):
    """Runs from before images were recorded go with either."""
    for seed, fingerprint in enumerate((None, "aa", "bb")):
        run = write_fine_tuning(tmp_path / str(seed), "cifar10", 0.9, seed=seed)
        if fingerprint:
            write_facts(run, evaluation=fingerprint)
    assert [len(result.models) for result in group(find([str(tmp_path)]).models)] == [2, 1]


@pytest.mark.parametrize(
    ("dataset", "old", "new", "results"),
    [
        ("/data/mine", "absent", None, 2),  # which turns photos as their EXIF says; nobody did before
        ("/data/mine.zip", "absent", None, 2),
        ("/data/mine", "absent", False, 1),
        ("/data/mine", True, None, 2),
        ("tfds:pets", "absent", None, 1),  # records are turned by neither
        ("/tfds/pets/4.0.0", "absent", None, 1),
        ("tfds:pets", "absent", True, 2),
        ("digits", None, False, 1),
    ],
)
def test_runs_with_and_without_turned_images_are_not_averaged(tmp_path, dataset, old, new, results):
    for seed, turned in enumerate((old, new)):
        run = write_fine_tuning(tmp_path / str(seed), "cifar10", 0.9, seed=seed, data__dataset=dataset)
        config = json.loads((run / "config.json").read_text())
        config["data"]["exif_orientation"] = turned
        if turned == "absent":
            del config["data"]["exif_orientation"]
        write_json(run / "config.json", config)
    assert len(group(find([str(tmp_path)]).models)) == results


def few_shot(path, value, weights="vit_b16_i21k", **fields):
    fields = {"evals__fewshot__datasets": ("tfds:imagenet2012",), "evals__fewshot__test_split": "validation", **fields}
    return write_evaluation(path, weights, {"fewshot/imagenet2012/pre_logits/5shot": value}, **fields)


@pytest.mark.parametrize(
    "field",
    [
        {"evals__fewshot__l2": (1.0,)},
        {"evals__fewshot__whiten": False},
        {"evals__fewshot__seeds": 5},
        {"evals__fewshot__train_split": "train[:65000]"},
        {"data__eval_resize": "area"},
        {"model__dtype": "float32"},
        {"evals__fewshot__crop_from": 300},
    ],
)
def test_evaluations_of_the_same_weights_that_differ_are_both_shown(tmp_path, field):
    few_shot(tmp_path / "a", 0.5)
    few_shot(tmp_path / "b", 0.7, **field)
    found = find([str(tmp_path)])
    assert not found.left_out
    rows = results_table(found.models).rows
    assert sorted(row[8] for row in rows) == ["50.00", "70.00"]
    (name,) = field
    assert all("[" in row[0] for row in rows)
    remarks = " ".join(results_table(found.models).remarks)
    assert f"{name.replace('__', '.')}=" in remarks


@pytest.mark.parametrize(
    "field", [{"polyak_decay": 0.9}, {"loss": "sigmoid"}, {"batch_size": 7}, {"optimizer__learning_rate": 0.5}]
)
def test_settings_of_training_do_not_set_evaluations_apart(tmp_path, field):
    few_shot(tmp_path / "a", 0.5)
    few_shot(tmp_path / "b", 0.5, **field)
    (model,) = find([str(tmp_path)]).models
    assert model.path == tmp_path / "a"


def test_few_shot_says_what_differs_from_the_released_evaluator(tmp_path):
    few_shot(tmp_path, 0.5, evals__fewshot__l2=(1.0,), evals__fewshot__bias=0.0, data__image_size=224)
    (record,) = find([str(tmp_path)]).models
    assert set(record.values["5-shot ImageNet"].notes) == {
        "evals.fewshot.l2=(1.0,), usually (1024.0,)",
        "evals.fewshot.bias=0.0, usually 100.0",
        "evals.fewshot.train_split=train, usually train[:65000]",
    }


def test_evaluation_that_measures_again_is_reported_and_what_is_new_in_it_is_kept(tmp_path):
    few_shot(tmp_path / "a", 0.5)
    other = write_evaluation(
        tmp_path / "b",
        "vit_b16_i21k",
        {"fewshot/imagenet2012/pre_logits/5shot": 0.6, "fewshot/imagenet2012/pre_logits/10shot": 0.8},
        evals__fewshot__datasets=("tfds:imagenet2012",),
        evals__fewshot__test_split="validation",
    )
    found = find([str(tmp_path)])
    (record,) = found.models
    assert {name: value.value for name, value in record.values.items()} == {
        "5-shot ImageNet": 0.5,
        "10-shot ImageNet": 0.8,
    }
    (line,) = found.left_out
    assert line.startswith(f"{other}: repeats what {tmp_path}/a measured")
    assert line.endswith("5-shot ImageNet is 60.00 here, 50.00 there.")
    assert f"{tmp_path}/a: with what {other} measured of it" in runs_table(found.models).remarks


def test_seeds_that_were_measured_differently_are_not_averaged(tmp_path):
    for seed, l2 in enumerate((1.0, 1.0, 1024.0)):
        run = write_fine_tuning(tmp_path / f"run_{seed}", "cifar10", 0.9, seed=seed, data__image_size=224)
        few_shot(tmp_path / f"few_{seed}", 0.5 + seed / 100, run, evals__fewshot__l2=(l2,))
    results = group(find([str(tmp_path)]).models)
    by_seeds = {
        tuple(record.seed for record in result.models): result.mean("5-shot ImageNet").mean for result in results
    }
    assert by_seeds == {(0, 1): pytest.approx(50.5), (2,): pytest.approx(52.0)}


def test_number_that_some_seeds_lack_says_so(tmp_path):
    for seed, real in ((0, 0.90), (1, None), (2, 0.94)):
        write_fine_tuning(tmp_path / str(seed), "imagenet2012", 0.8, seed=seed, real=real)
    records = find([str(tmp_path)]).models
    (result,) = group(records)
    ours = result.mean("ImageNet ReaL")
    assert ours.mean == pytest.approx(92.0) and ours.seeds == 2
    assert ours.notes == ("without seed 1, which has no ImageNet ReaL",)
    assert f"{tmp_path}: ImageNet ReaL is without seed 1" in results_table(records).remarks


@pytest.mark.parametrize(
    ("place", "results"),
    [("", 1), ("best", 1), ("checkpoints", 2), ("checkpoints/300", 2)],
)
def test_weights_of_an_earlier_step_are_another_beginning(tmp_path, place, results):
    pre = write_run(tmp_path / "pre", "ViT-B/16", {}, steps=900, data__dataset="tfds:jft")
    (pre / place).mkdir(parents=True, exist_ok=True)
    write_fine_tuning(tmp_path / "fine/a", "cifar10", 0.9, weights=pre)
    write_fine_tuning(tmp_path / "fine/b", "cifar10", 0.7, weights=pre / place, seed=1)
    records = [record for record in find([str(tmp_path)]).models if record.before]
    assert len(group(records)) == results


def test_evaluation_of_an_earlier_step_is_not_mixed_with_the_runs_own_numbers(tmp_path):
    run = write_fine_tuning(tmp_path / "run", "cifar10", 0.9)
    (run / "checkpoints/300").mkdir(parents=True)
    fields = {"data__dataset": "tfds:cifar10", "data__eval_split": "test", "data__image_size": 384}
    metrics = {"test/accuracy": 0.4, "test/examples": 10_000}
    write_evaluation(tmp_path / "early", run / "checkpoints/300", metrics, **fields)
    early, last = find([str(tmp_path)]).models
    assert (early.values[ACCURACY].value, last.values[ACCURACY].value) == (0.4, 0.9)
    assert early.values[ACCURACY].notes == ("of checkpoints/300, not of the last parameters",)
    assert len(group([early, last])) == 2


def three_seeds(path, starts):
    for seed in range(3):
        run = write_fine_tuning(path / str(seed), "cifar10", 0.9, seed=seed, steps=100)
        write_starts(run, starts if seed == 2 else [(0, {})])
    return find([str(path)]).models


@pytest.mark.parametrize(
    ("starts", "told"),
    [
        ([(0, {"optimizer__learning_rate": 0.3}), (40, {})], "optimizer.learning_rate 0.3 -> 0.01 from step 41 on"),
        ([(0, {"steps": 50}), (50, {})], "steps 50 -> 100 from step 51 on"),
        ([(0, {}), (20, {"model__dropout_rate": 0.5}), (60, {})], "model.dropout_rate None -> 0.5 from step 21 on"),
        ([(0, {"data__train_split": "train[:9%]"}), (70, {})], "data.train_split train[:9%] -> train from step 71 on"),
    ],
)
def test_run_whose_config_changed_is_separate(tmp_path, starts, told):
    records = three_seeds(tmp_path, starts)
    first, second = group(records)
    assert [record.seed for record in first.models] == [0, 1] and second.first.seed == 2
    assert second.first.changes[0] == told
    listing = results_table(records)
    assert any(
        remark.startswith(f"{tmp_path}/2: its config changed during the run, {told}") for remark in listing.remarks
    )
    assert "config changed during the run" in [row[8] for row in runs_table(records).rows][2]


@pytest.mark.parametrize(
    "starts",
    [
        [(0, {"optimizer__learning_rate": 0.3}), (0, {})],  # nothing of the first start is left
        [(0, {}), (50, {"optimizer__learning_rate": 0.3}), (30, {})],  # given up: resumed from before it
        [(0, {"log_every_steps": 1, "mesh__model": 2, "evals__eval_split__every_steps": 3}), (40, {})],
        [(0, {"evals__fewshot__shots": (1,), "data__eval_split": "train[:1%]"}), (40, {})],  # evaluations alone
    ],
)
def test_change_without_effect_on_the_parameters_separates_nothing(tmp_path, starts):
    (result,) = group(three_seeds(tmp_path, starts))
    assert len(result.models) == 3 and not any(record.changes for record in result.models)


@pytest.mark.parametrize(("dataset", "changes"), [("tfds:pets", 0), ("/data/mine", 1)])
def test_start_from_before_images_were_turned_counts_as_a_change_for_files(tmp_path, dataset, changes):
    run = write_fine_tuning(tmp_path, "pets", 0.9, data__dataset=dataset)
    write_starts(run, [(0, {}), (40, {})])
    first, second = (json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines())
    del first["config"]["data"]["exif_orientation"]
    (run / "starts.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    (record,) = find([str(tmp_path)]).models
    assert len(record.changes) == changes


def test_run_from_a_changed_pre_training_is_separate_too(tmp_path):
    for seed in range(2):
        pre = write_run(tmp_path / f"pre/{seed}", "ViT-B/16", {}, steps=10, data__dataset="tfds:jft", seed=seed)
        if seed:
            write_starts(pre, [(0, {"optimizer__weight_decay": 0.5}), (5, {})])
        write_fine_tuning(tmp_path / f"fine/{seed}", "cifar10", 0.9, weights=pre)
    records = [record for record in find([str(tmp_path)]).models if record.before]
    assert [len(result.models) for result in group(records)] == [1, 1]


def test_damaged_record_of_starts_is_not_a_traceback(tmp_path):
    run = write_fine_tuning(tmp_path, "cifar10", 0.9, steps=100)
    write_starts(run, [(0, {"optimizer__learning_rate": 0.3}), (40, {})])
    with (run / "starts.jsonl").open("a") as file:
        file.write('"text"\n{"step": "x", "config": 3}\n{"step": 3}\n{"step": 60, "conf\n')
    (record,) = find([str(tmp_path)]).models
    assert len(record.changes) == 1
