import pytest

from tests.conftest import ROOT
from tests.data.vtab import prepared
from tests.test_configs import load
from vit_jax.data.vtab import GROUPS, TASKS
from vit_jax.errors import UserError
from vit_jax.experiment import build, dry_run
from vit_jax.paper import tables

PAGE = load(ROOT / "configs" / "vtab.py")
NO_CROP = ("clevr_count", "clevr_distance", "dmlab", "dsprites_location", "kitti_distance")
NO_FLIP = ("dsprites_location", "dsprites_orientation", "smallnorb_azimuth")


@pytest.fixture(autouse=True)
def no_data(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("VIT_JAX_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "data"


def small(argument):
    """A config of a small model, which is quick to trace."""
    config = PAGE.get_config(f"weights=none,model=ViT-Ti/16,{argument}")
    config.model.num_layers = 1
    return config


@pytest.mark.parametrize("name", TASKS)
def test_task_dry_runs_without_its_data(name):
    config = small(f"task={name}")
    built = build.build(config, allow_missing_data=True)
    text = dry_run.dry_run(built, [], {})
    assert f"data      vtab:{name} (train800val200): 1,000 images expected, not prepared yet" in text
    assert "2,500 steps of 512 images" in text
    assert built.num_classes == TASKS[name].num_classes
    assert built.batch_shapes["image"].shape == (512, 384, 384, 3)


def test_weights_determine_the_model_and_are_not_fetched_for_a_dry_run():
    built = build.build(PAGE.get_config("task=dtd,weights=vit_b32_i21k"), allow_missing_data=True)
    assert (built.model_name, built.num_classes) == ("ViT-B/32", 47)


def test_final_run_is_what_a_page_without_stage_gives():
    assert PAGE.get_config("task=dtd").to_dict() == PAGE.get_config("task=dtd,stage=final").to_dict()


def test_settings_match_table_4():
    config = PAGE.get_config()
    row, optimizer = tables.TABLE_4["VTAB"], config.optimizer
    assert (config.steps, optimizer.learning_rate) == (row.steps, *row.learning_rates)
    assert (config.batch_size, config.data.image_size, config.loss) == (512, 384, "softmax")
    assert (optimizer.name, optimizer.momentum, optimizer.momentum_dtype) == ("sgd", 0.9, "bfloat16")
    assert (optimizer.schedule, optimizer.warmup_steps, optimizer.end_learning_rate) == ("cosine", 500, 0.0)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.0, 1.0)


def test_last_parameters_count_not_those_that_are_best_on_the_test_set():
    assert not PAGE.get_config("stage=final").checkpoint.keep_best


@pytest.mark.parametrize("name", TASKS)
def test_images_are_cropped_and_flipped_if_the_label_allows(name):
    data = PAGE.get_config(f"task={name}").data
    assert (data.inception_crop, data.random_crop_from) == (False, None if name in NO_CROP else 448)
    assert data.flip == (name not in NO_FLIP)
    assert data.eval_resize_small is None  # at evaluation the whole image


@pytest.mark.parametrize(("resolution", "crop_from"), [(384, 448), (224, 261), (512, 597)])
def test_crops_show_the_same_share_at_other_resolutions(resolution, crop_from):
    data = PAGE.get_config(f"resolution={resolution}").data
    assert (data.image_size, data.random_crop_from) == (resolution, crop_from)


@pytest.mark.parametrize(
    ("stage", "train", "evaluation", "images"),
    [("choose", "train800", "val200", 800), ("final", "train800val200", "test", 1000)],
)
def test_stage_determines_training_and_evaluation_data(stage, train, evaluation, images):
    data = PAGE.get_config(f"task=svhn,stage={stage}").data
    assert (data.dataset, data.train_split, data.eval_split) == ("vtab:svhn", train, evaluation)
    assert data.expected_train_images == images


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("task=sun", r"unknown VTAB task 'sun'. Did you mean 'sun397'"),
        ("stage=test", r"unknown stage 'test'. .* Known: choose, final"),
        ("resolution=large", r"'resolution' takes resolution=<int>"),
    ],
)
def test_unknown_values_are_refused(argument, message):
    with pytest.raises(UserError, match=message):
        PAGE.get_config(argument)


def test_sweep_has_all_tasks_with_the_same_model_and_the_final_stage():
    sweep = PAGE.get_sweep("weights=vit_b16_i21k,resolution=224")
    assert list(sweep.tasks) == list(TASKS)
    assert sweep.groups == {group: [task.id for task in TASKS.values() if task.group == group] for group in GROUPS}
    for name, argument in sweep.tasks.items():
        config = PAGE.get_config(argument)
        assert (config.data.dataset, config.weights, config.data.image_size) == (f"vtab:{name}", "vit_b16_i21k", 224)
        assert config.data.train_split == "train800"
        config.update_from_flattened_dict(sweep.final)
        assert config.to_dict() == PAGE.get_config(argument.replace("choose", "final")).to_dict()


def test_sweep_chooses_nothing_and_repeats_three_times_as_the_paper():
    sweep = PAGE.get_sweep()
    assert (sweep.combinations(), sweep.seeds) == ([{}], 3)


@pytest.mark.parametrize("stage", ["choose", "final"])
def test_config_trains_on_the_examples_of_its_task(no_data, stage):
    features = prepared.features_of("kitti", no_data)
    examples = [prepared.example(features, number) for number in range(3)]
    train, validation, test = (prepared.serialize(features, one) for one in examples)
    files = {"train": [[train] * 800, 5547], "validation": [[validation] * 200, 223], "test": [[test] * 20, 691]}
    prepared.write(no_data, "kitti", files)
    config = small(f"task=kitti_distance,resolution=32,stage={stage}")
    config.data.eval_split = {"choose": "val200", "final": "test[:20]"}[stage]  # the rest is not there
    built = build.build(config)
    assert len(built.train_source) == {"choose": 800, "final": 1000}[stage]
    assert len(built.eval_source) == {"choose": 200, "final": 20}[stage]
    assert built.train_source[799]["image"] == examples[0]["image"]
    assert built.eval_source[0]["image"] == examples[{"choose": 1, "final": 2}[stage]]["image"]
