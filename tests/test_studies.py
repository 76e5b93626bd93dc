"""Each study has the paper's cells at one scale, and runs at the other."""

import dataclasses
import json
import re

import jax
import pytest

from tests.conftest import ROOT
from tests.data.test_sources import write_image
from vit_jax.costs.flops import forward_flops
from vit_jax.data.sources import MissingDataError
from vit_jax.errors import UserError
from vit_jax.experiment import build
from vit_jax.models import create_model
from vit_jax.multihost.signals import Stopped
from vit_jax.paper import tables
from vit_jax.sweep import Sweep, study_pages
from vit_jax.sweep import __main__ as command
from vit_jax.sweep.spec import check_sequence
from vit_jax.sweep.trials import call, load_config, load_module, make_tasks

STUDIES = ROOT / "configs" / "studies"
PAGES = sorted(STUDIES.glob("*.py"))
INDEX = (ROOT / "docs" / "studies.md").read_text()
SCALES = pytest.mark.parametrize("scale", study_pages.SCALES)
EACH_PAGE = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def sweeps_of(page, argument):
    described = call(load_module(str(STUDIES / f"{page}.py")), "get_sweep", f"{page}:{argument}")
    return [described] if isinstance(described, Sweep) else list(described)


def config_of(page, argument):
    return load_config(f"{STUDIES / page}.py:{argument}", ())


def configs(page, scale="paper", number=0):
    """The configs of one of a study's sweeps, by task."""
    return {name: config_of(page, each) for name, each in sweeps_of(page, f"scale={scale}")[number].tasks.items()}


@EACH_PAGE
@SCALES
def test_page_builds_without_its_data(path, scale, monkeypatch, tmp_path):
    monkeypatch.delenv("VIT_JAX_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    config = load_module(str(path)).get_config(f"scale={scale}")
    built = build.build(config, allow_missing_data=True, devices=jax.devices()[:1])
    assert built.train_source is None and built.num_steps > 0
    with pytest.raises(MissingDataError) as error:
        build.build(config, devices=jax.devices()[:1])
    assert re.search(r"data=|prepare", str(error.value))


@EACH_PAGE
@SCALES
def test_sweep_of_a_page_fits_together_and_its_models_fit_the_images(path, scale):
    sweeps = sweeps_of(path.stem, f"scale={scale}")
    check_sequence(sweeps)
    for sweep in sweeps:
        assert sweep.tasks and all(f"scale={scale}" in argument for argument in sweep.tasks.values())
        assert len(set(sweep.tasks.values())) == len(sweep.tasks)
        for argument in sweep.tasks.values():
            config = config_of(path.stem, argument)
            if config.weights is None:
                fields = {name: value for name, value in config.model.items() if value is not None}
                model = create_model(**{"num_classes": 10} | fields)
                if hasattr(model, "grid"):
                    model.grid(config.data.image_size, config.data.image_size)


@EACH_PAGE
def test_header_and_index_have_the_commands_and_what_they_take(path):
    header = load_module(str(path)).__doc__
    for heading in ("Needs", "Takes", "Reaches", "Arguments"):
        assert f"\n{heading} " in header
    sweep = f"python -m vit_jax.sweep --config=configs/studies/{path.name}:scale=small"
    assert f"{sweep} --workdir=" in header and sweep in INDEX
    for argument in re.findall(rf"configs/studies/{path.name}:(\S+)", header):
        load_module(str(path)).get_config(argument)


@EACH_PAGE
def test_wrong_arguments_are_one_message(path):
    page = load_module(str(path))
    with pytest.raises(UserError, match=r"unknown scale 'big'.*paper"):
        page.get_config("scale=big")
    with pytest.raises(UserError, match=r"unknown config argument 'scales'.*Did you mean 'scale'"):
        page.get_config("scales=small")
    with pytest.raises(UserError, match="unknown scale"):
        page.get_sweep("scale=big")


@pytest.mark.parametrize(
    ("page", "argument", "message"),
    [
        ("table7_optimizers", "optimizer=lion", "unknown optimizer 'lion'"),
        ("table8_position_embeddings", "kind=none,at=shared", "unknown kind and place 'none,shared'"),
        ("figure3_data_sets", "on=cifar", "unknown on 'cifar'"),
        ("figure3_data_sets", "on=imagenet,model=ViT-H/14", "unknown model 'ViT-H/14'"),
        ("figure3_data_sets", "part=finetune", "unknown part 'finetune'"),
        ("figure4_data_size", "scale=small,images=60000", "images must be between 1 and 50,000"),
        ("figure5_compute", "model=ViT-B/32,epochs=14", "unknown epochs '14'"),
        ("figure8_shape", "axis=depth", "axis=depth needs a value, such as value=2"),
        ("figure9_pooling", "pool=map", "unknown pool 'map'"),
        ("figure10_embeddings", "run=short", "unknown run 'short'"),
        ("figure13_axial", "scale=small,model=ViT-B/16", "unknown model 'ViT-B/16'"),
        ("masked_patches", "method=colours", "unknown method 'colours'"),
        ("masked_patches", "scale=small,method=scratch", "has no pre-training at scale=small. Add part=transfer"),
        ("masked_patches", "scale=small,part=transfer,labels=5", "unknown labels '5'"),
        ("masked_patches", "labels=10", "unknown labels '10'"),
    ],
)
def test_cell_that_a_study_lacks_is_one_message(page, argument, message):
    with pytest.raises(UserError, match=message):
        load_module(str(STUDIES / f"{page}.py")).get_config(argument)


# The paper's cells.


def test_table_7_has_each_model_with_each_optimizer_and_its_recipe():
    found = configs("table7_optimizers")
    recipes = {(config.model.name, config.optimizer.name): config.optimizer for config in found.values()}
    names = {"adam": "adamw", "sgd": "sgd"}
    assert set(recipes) == {(model, names[optimizer]) for model, optimizer in tables.TABLE_7}
    bit = load_config(f"{ROOT}/configs/bit_jft.py:model=R152x4", ()).optimizer
    for model in ("R50x1", "R152x2"):
        assert recipes[model, "sgd"].to_dict() == bit.to_dict()  # BiT's
        (row,) = (row for row in tables.TABLE_3 if model in row.models)
        adam = recipes[model, "adamw"]
        assert (adam.learning_rate, adam.schedule, adam.weight_decay) == (row.learning_rate, "linear", row.weight_decay)
    for config in found.values():
        assert config.epochs == 7
    transferred = {
        (before, task.rpartition(",")[2])
        for sweep in sweeps_of("table7_optimizers", "scale=paper")[1:]
        for task, before in sweep.weights.items()
    }
    datasets = load_module(str(STUDIES / "table7_optimizers.py")).DATASETS
    assert transferred == {
        (f"{model},{optimizer}", datasets[column])
        for (model, optimizer), columns in tables.TABLE_7.items()
        for column in columns
        if column != tables.TABLE_7_AVERAGE
    }


@SCALES
def test_table_8_has_its_eight_cells(scale):
    found = configs("table8_position_embeddings", scale)
    cells = [(config.model.position_embedding, config.model.position_embedding_at) for config in found.values()]
    assert cells == list(tables.TABLE_8)
    others = {str({**config.model, "position_embedding": 0, "position_embedding_at": 0}) for config in found.values()}
    assert len(others) == 1
    if scale == "paper":
        assert {config.model.name for config in found.values()} == {"ViT-B/16"}
        (sweep,) = sweeps_of("table8_position_embeddings", "scale=paper")
        assert sweep.metric == "fewshot/imagenet2012/pre_logits/5shot"


def test_figure_3_has_table_5s_models_on_each_set_and_tunes_on_the_small_ones():
    tuned, jft, *transfers = sweeps_of("figure3_data_sets", "scale=paper")
    found = {name: config_of("figure3_data_sets", each) for name, each in {**tuned.tasks, **jft.tasks}.items()}
    on = {"tfds:imagenet2012": "ImageNet", "tfds:imagenet21k": "ImageNet-21k", "tfds:jft": "JFT-300M"}
    assert {(on[config.data.dataset], config.model.name) for config in found.values()} == {
        (data, model)
        for data, rows in tables.TABLE_5.items()
        for model, accuracy in zip(tables.TABLE_5_MODELS, rows["ImageNet"], strict=True)
        if accuracy is not None
    }
    assert set(tuned.choose) == {"optimizer.weight_decay", "model.dropout_rate", "label_smoothing"}
    assert not any("jft" in task for task in tuned.tasks) and not jft.choose
    assert {before for sweep in transfers for before in sweep.weights.values()} == set(found)


@pytest.mark.parametrize("name", ["ViT-B_16,imagenet", "ViT-B_16,i21k", "ViT-B_16,jft"])
def test_figure_3_chooses_and_reports_on_different_held_out_images(name):
    tasks = {
        **sweeps_of("figure3_data_sets", "scale=paper")[0].tasks,
        **sweeps_of("figure3_data_sets", "scale=paper")[1].tasks,
    }
    choose = config_of("figure3_data_sets", tasks[name]).data
    final = config_of("figure3_data_sets", f"{tasks[name]},stage=final").data
    assert choose.eval_split not in (final.eval_split, choose.train_split)


def test_figure_4_has_each_model_on_each_size_for_the_same_number_of_steps():
    found = configs("figure4_data_size")
    sizes = (9_000_000, 30_000_000, 90_000_000, tables.JFT_IMAGES)
    cells = [(config.model.name, config.data.expected_train_images) for config in found.values()]
    models = ("ViT-b/32", "ViT-B/32", "ViT-L/32", "ViT-L/16", "R50x1", "R152x2")
    assert cells == [(model, size) for model in models for size in sizes]
    assert {(config.images, config.epochs, config.steps) for config in found.values()} == {
        (7 * 303_000_000, None, None)
    }
    assert found["ViT-B_32,9000000"].data.train_split == "train[51200:9051200]"
    for model in models:
        recipes = [config.to_dict() for config in found.values() if config.model.name == model]
        assert all({**each, "data": 0} == {**recipes[0], "data": 0} for each in recipes)
    (sweep,) = sweeps_of("figure4_data_size", "scale=paper")
    assert (sweep.early_stopping, sweep.metric) == ("accuracy", "fewshot/imagenet2012/pre_logits/5shot")


def test_figure_4_of_ones_own_set_has_the_sizes_below_its_own():
    (sweep,) = sweeps_of("figure4_data_size", "scale=paper,data=tfds:web,num_classes=9,train_images=40000000")
    sizes = {config_of("figure4_data_size", each).data.expected_train_images for each in sweep.tasks.values()}
    assert sizes == {9_000_000, 30_000_000, 40_000_000}


def test_small_figure_4_has_models_of_equal_flops_and_reports_on_images_that_stop_nothing():
    found = configs("figure4_data_size", "small")
    flops = {}
    for config in found.values():
        fields = {name: value for name, value in config.model.items() if value is not None}
        flops[fields["name"]] = forward_flops(create_model(**fields), 32)
    assert len(flops) == 3 and max(flops.values()) < 1.01 * min(flops.values())
    sizes = [config.data.train_split for config in found.values()][:6]
    assert sizes == [f"train[0:{size}]" for size in (1000, 2500, 5000, 10000, 25000)] + ["train"]
    for config in found.values():
        assert (config.data.eval_split, config.evals.test.split) == ("test[:2000]", "test[2000:]")
        assert config.evals.test.every_steps == config.evals.fewshot.every_steps == config.evals.eval_split.every_steps


def test_figure_5_has_table_6s_runs_and_transfers_each_to_the_five_sets():
    found = configs("figure5_compute")
    assert [(config.model.name, config.epochs) for config in found.values()] == [
        (row.model, row.epochs) for row in tables.TABLE_6
    ]
    transfers = [
        before for sweep in sweeps_of("figure5_compute", "scale=paper")[1:] for before in sweep.weights.values()
    ]
    assert {name: transfers.count(name) for name in found} == dict.fromkeys(found, 5)


@SCALES
def test_figure_8_varies_one_dimension_of_the_base(scale):
    found = configs("figure8_shape", scale)
    fields = ("name", "num_layers", "hidden_dim", "mlp_dim")
    shapes = {name: tuple(config.model[field] for field in fields) for name, config in found.items()}
    if scale == "paper":
        assert shapes["base"] == ("ViT-L/32", 8, 1024, 2048)
        assert {shapes[f"depth={depth}"][1] for depth in (16, 64)} == {16, 64}
    place = {"patch": 0, "depth": 1, "width": 2, "mlp": 3}
    for name, shape in shapes.items():
        axis = name.partition("=")[0]
        differing = {index for index in range(4) if shape[index] != shapes["base"][index]}
        assert differing == ({place[axis]} if axis in place else set() if axis == "base" else {0, 1, 2, 3})
    for axis in (*place, "all"):
        assert sum(name.startswith(f"{axis}=") for name in shapes) >= 2


@pytest.mark.parametrize(("scale", "rate"), [("paper", 8e-4), ("small", 1e-3)])
def test_figure_9_has_the_class_token_and_gap_at_two_rates(scale, rate):
    found = configs("figure9_pooling", scale)
    cells = [(config.model.pool or "cls", config.optimizer.learning_rate) for config in found.values()]
    low = rate * tables.FIGURE_9["gap"] / tables.FIGURE_9["cls"]
    assert cells == [("cls", rate), ("gap", rate), ("gap", pytest.approx(low))]


def test_figure_10_has_two_rows_of_table_3_and_a_weaker_recipe():
    found = configs("figure10_embeddings")
    recipes = [(each.optimizer.learning_rate, each.optimizer.weight_decay, each.epochs) for each in found.values()]
    assert recipes == [(2e-4, 0.01, 7), (4e-4, 0.1, 7), (4e-4, 0.1, 14)]


MASKED = [("mean_colour", 0.5), ("downsized", 0.5), ("pixels", 0.5), ("mean_colour", 0.15)]


@SCALES
def test_masked_patches_have_three_targets_and_two_rates_against_supervised_pre_training(scale):
    found = configs("masked_patches", scale)
    masked = {name: config for name, config in found.items() if config.objective == "masked_patches"}
    cells = [(config.masked_patches.target, config.masked_patches.corruption_rate) for config in masked.values()]
    assert cells == MASKED + [("mean_colour", 0.5)] * (2 if scale == "paper" else 0)
    assert set(found) - set(masked) == {"supervised"} | ({"scratch"} if scale == "paper" else set())
    if scale == "paper":
        steps = {name: config.steps for name, config in masked.items()}
        assert steps.pop("mean_colour_100k") == 100_000 and set(steps.values()) == {1_000_000}
    else:
        assert len({str(config.model) for config in masked.values()}) == 1
        assert {config.data.expected_train_images for config in masked.values()} == {50_000}


def test_masked_patches_are_compared_with_scratch_on_1_and_10_percent_and_all_labels():
    before, after = sweeps_of("masked_patches", "scale=small")
    found = configs("masked_patches", "small", 1)
    images = {name: config.data.expected_train_images for name, config in found.items()}
    names = [*before.tasks, "scratch"]
    labels = {1: 250, 10: 2_500, 100: 25_000}
    assert images == {f"{name},{percent}": count for name in names for percent, count in labels.items()}
    assert after.weights == {task: task.partition(",")[0] for task in images if not task.startswith("scratch")}
    for percent in labels:  # the initial weights are all that differs
        assert len({found[f"{name},{percent}"].to_json() for name in names}) == 1
    assert {config.data.train_split for config in found.values()} == {"train[:250]", "train[:2500]", "train"}


# At the small scale, really run.


@pytest.fixture
def tiny_data(tmp_path):
    """Two folders of two classes and 24 images each, one image many times."""
    for name in ("upstream", "downstream"):
        for split, count in (("train", 8), ("test", 16)):
            for label in ("cat", "dog"):
                first = tmp_path / name / split / label / "0.jpg"
                write_image(first, 7)
                for number in range(1, count):
                    first.with_name(f"{number}.jpg").hardlink_to(first)
    return tmp_path


TINY = (
    *("model.num_layers=1", "model.hidden_dim=16", "model.mlp_dim=16", "model.num_heads=1", "data.image_size=16"),
    *("data.expected_train_images=16", "batch_size=8", "eval_batch_size=32"),
)


def run_twice(sweeps, page, fields, path, run_main):
    """Runs a sweep, which a signal ends before its second run, and then again. Returns the runs' paths, in order."""
    trained = []

    def train(run):
        if len(trained) == 1:
            trained.append(None)
            raise Stopped(15)
        trained.append(run.path)
        run_main(*run.arguments, f"--workdir={run.path}", check=True)

    arguments = [f"--config.{field}" for field in fields]
    with pytest.raises(Stopped):
        command.run_sweep(make_tasks(sweeps, str(STUDIES / page), arguments, path), path, train)
    results = command.run_sweep(make_tasks(sweeps, str(STUDIES / page), arguments, path), path, train)
    assert all(result.is_complete for result in results)
    return [each for each in trained if each is not None]


def test_small_study_pre_trains_and_transfers_and_resumes(tiny_data, run_main):
    data = f"data={tiny_data / 'upstream'},downstream={tiny_data / 'downstream'}"
    before, after = sweeps_of("masked_patches", f"scale=small,{data}")
    name, tuned = "mean_colour", "mean_colour,100"
    sweeps = [
        dataclasses.replace(before, tasks={name: before.tasks[name]}, seeds=1),
        dataclasses.replace(after, tasks={tuned: after.tasks[tuned]}, weights={tuned: name}, seeds=1),
    ]
    fields = (*TINY, "steps=2", "optimizer.warmup_steps=1", "data.eval_split=test", "evals.fewshot.shots=(5,)")
    first, second = run_twice(sweeps, "masked_patches.py", fields, tiny_data / "sweep", run_main)
    config = json.loads((second / "config.json").read_text())
    assert config["weights"] == str(first) and first.name == second.name == "seed_0"
    assert config["data"]["dataset"] == str(tiny_data / "downstream")
    content = json.loads((tiny_data / "sweep" / "sweep.json").read_text())["tasks"]
    assert {"fewshot/downstream/encoded/5shot", "test/loss"} <= set(content[name]["mean"])
    assert "test/accuracy" in content[tuned]["mean"]


def test_small_study_of_data_sizes_stops_early_and_resumes(tiny_data, run_main):
    (sweep,) = sweeps_of("figure4_data_size", f"scale=small,data={tiny_data / 'upstream'}")
    tasks = {name: sweep.tasks[name] for name in ("vit,1000", "vit,2500")}
    sweep = dataclasses.replace(sweep, tasks=tasks, seeds=1)
    fields = (
        *(
            *TINY,
            "steps=4",
            "optimizer.warmup_steps=1",
            "data.train_split=train",
            "data.eval_split=test[:50%]",
            "evals.test.split=test[50%:]",
        ),
        *("evals.fewshot.train_split=test[:50%]", "evals.fewshot.test_split=test[50%:]", "evals.fewshot.shots=(5,)"),
        *(f"evals.{name}.every_steps=2" for name in ("test", "fewshot", "eval_split")),
    )
    path = tiny_data / "sweep"
    assert len(run_twice([sweep], "figure4_data_size.py", fields, path, run_main)) == 2
    for task in json.loads((path / "sweep.json").read_text())["tasks"].values():
        (run,) = task["final"]
        assert run["step"] in (2, 4)
        assert {"test/accuracy", "fewshot/upstream/pre_logits/5shot", "test[:50%]/accuracy"} <= set(run["metrics"])
    assert "| 5shot" in (path / "sweep.md").read_text()
