"""Each config file builds, has a header with a command, and matches the paper."""

import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import ROOT
from vit_jax.costs.flops import train_exaflops
from vit_jax.errors import UserError
from vit_jax.experiment import build, dry_run
from vit_jax.models import create_model
from vit_jax.objectives.losses import Loss
from vit_jax.paper import tables

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
OTHERS = ("quickstart", "cifar10", "transfer", "vtab", "small_transfer", "fewshot", "masked_patches")
PRE_TRAINING = [path for path in CONFIGS if path.stem not in OTHERS]
INDEX = (ROOT / "docs" / "configs.md").read_text()

# Where the runs of the paper are: by data, and on JFT by model.
TABLES = {"ImageNet-21k": "vit_i21k", "ImageNet": "vit_i1k"}


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_of(config_string):
    """The config of `vit_jft.py:model=ViT-L/16`."""
    name, _, argument = config_string.partition(":")
    return load(ROOT / "configs" / name).get_config(argument)


def name_of(model, data, epochs):
    """The run of a model on some data as docs/configs.md names it: `vit_jft.py:model=ViT-L/16,epochs=14`."""
    family = "vit" if model.startswith("ViT") else "hybrid" if "+" in model else "bit"
    page = TABLES.get(data, f"{family}_jft")
    return f"{page}.py:model={model},epochs={epochs}"


def num_steps(config):
    return round(config.epochs * config.data.expected_train_images / config.batch_size)


def exaflops(config):
    """As table 6 counts them: without the head."""
    images = config.epochs * config.data.expected_train_images
    return train_exaflops(create_model(config.model.name, num_classes=0), config.data.image_size, images)


TABLE_3_RUNS = [
    pytest.param(row, model, epochs, id=f"{row.data} {model} {epochs}")
    for row in tables.TABLE_3
    for model in (row.models if row.models != ("*",) else tables.IMAGENET_FROM_SCRATCH)
    for epochs in row.epochs
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_without_its_data(path, monkeypatch):
    monkeypatch.delenv("VIT_JAX_DATA", raising=False)
    config = load(path).get_config()
    built = build.build(config, allow_missing_data=True, devices=jax.devices()[:1])
    text = dry_run.dry_run(built, [], {})
    assert built.model_name in text and "python/tuple" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) <= (80 if built.model_name.startswith("ViT") else 110)
    if path in PRE_TRAINING:
        assert built.num_steps == num_steps(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_of_config_has_command_needs_time_and_result(path):
    header = load(path).__doc__
    assert re.search(rf"python -m vit_jax\.main [^`]*?--config=configs/{path.name}", header)
    for heading in ("Needs", "Takes", "Reaches"):
        assert f"\n{heading} " in header


@pytest.mark.parametrize("path", PRE_TRAINING, ids=lambda path: path.stem)
def test_commands_in_the_header_of_a_page_parse(path):
    header = load(path).__doc__
    assert f"python -m vit_jax.plan --config=configs/{path.name}" in header
    commands = re.findall(r"--config=configs/(\S+)", header)
    assert len(commands) >= 3
    for command in commands:
        assert command.startswith(path.name)
        assert run_of(command).batch_size == 4096


@pytest.mark.parametrize(("row", "model", "epochs"), TABLE_3_RUNS)
def test_run_is_its_row_of_table_3(row, model, epochs):
    config = run_of(name_of(model, row.data, epochs))
    optimizer = config.optimizer
    assert (config.model.name, config.epochs, config.batch_size) == (model, epochs, 4096)
    assert (optimizer.name, optimizer.b1, optimizer.b2) == ("adamw", 0.9, 0.999)
    assert (optimizer.learning_rate, optimizer.schedule) == (row.learning_rate, row.schedule)
    assert (optimizer.weight_decay, optimizer.warmup_steps) == (row.weight_decay, 10_000)
    assert (config.model.dropout_rate or 0.0) == row.dropout
    assert config.data.image_size == tables.PRE_TRAINING_SIZE


@pytest.mark.parametrize(("row", "model", "epochs"), TABLE_3_RUNS)
def test_run_of_table_3_is_in_the_index(row, model, epochs):
    assert f"`{name_of(model, row.data, epochs)}` | {tables.TABLE_3.index(row) + 1} |" in INDEX


@pytest.mark.parametrize("row", tables.TABLE_6, ids=lambda row: f"{row.model} {row.epochs}")
def test_run_is_its_row_of_table_6(row):
    name = name_of(row.model, "JFT-300M", row.epochs)
    config = run_of(name)
    assert (config.model.name, config.epochs) == (row.model, row.epochs)
    assert config.data.expected_train_images == tables.JFT_IMAGES
    # Paper's numbers are rounded; ours have the kernel positions on padding, see `vit_jax.costs.flops`.
    assert exaflops(config) == pytest.approx(row.exaflops, abs=0.04 * row.exaflops + 0.5)
    header = load(ROOT / "configs" / name.partition(":")[0]).__doc__
    reached = rf"{re.escape(row.model)} +{row.epochs} epochs +{row.imagenet:.2f} % +{row.cifar100:.2f} %"
    assert re.search(reached, header)


@pytest.mark.parametrize("row", tables.TABLE_6, ids=lambda row: f"{row.model} {row.epochs}")
def test_row_of_table_6_is_in_the_index_with_its_numbers(row):
    name = name_of(row.model, "JFT-300M", row.epochs)
    config = run_of(name)
    numbers = f"{num_steps(config):,} | {exaflops(config):,.0f} | {row.exaflops:,} | {row.imagenet:.2f}"
    assert re.search(rf"\| {re.escape(row.model)} \| `{re.escape(name)}` \|[^|]+\| {re.escape(numbers)} \|", INDEX)


@pytest.mark.parametrize("data", TABLES)
def test_rows_of_table_5_are_in_the_index_with_their_numbers(data):
    for model, accuracy in zip(tables.TABLE_5_MODELS, tables.TABLE_5[data]["ImageNet"], strict=True):
        if accuracy is None:
            continue
        epochs = {"ImageNet-21k": 90, "ImageNet": 300}[data]
        name = name_of(model, data, epochs)
        config = run_of(name)
        upstream = (tables.IMAGENET21K_PRECISION if data == "ImageNet-21k" else tables.IMAGENET_FROM_SCRATCH)[model]
        numbers = f"{num_steps(config):,} | {exaflops(config):,.0f} | {upstream:.2f} | {accuracy:.2f}"
        assert re.search(rf"`{re.escape(name)}` \|[^|]+\| {re.escape(numbers)} \|", INDEX)
        header = load(ROOT / "configs" / f"{TABLES[data]}.py").__doc__
        assert re.search(rf"{model} +{upstream:.2f} % +{accuracy:.2f} %", header)


@pytest.mark.parametrize(
    ("run", "key"),
    [
        ("vit_jft.py:model=ViT-H/14", ("ViT-H/14", "JFT-300M")),
        ("vit_jft.py:model=ViT-L/16", ("ViT-L/16", "JFT-300M")),
        ("vit_l16_i21k.py", ("ViT-L/16", "ImageNet-21k")),
        ("bit_jft.py:model=R152x4", ("R152x4", "JFT-300M")),
    ],
)
def test_page_of_a_run_of_table_2_has_its_numbers(run, key):
    page, core_days = run.partition(":")[0], f"{tables.TPUV3_CORE_DAYS[key] / 1000:.3g}k"
    header = load(ROOT / "configs" / page).__doc__
    assert f"{tables.TABLE_2[key]['ImageNet'].mean:.2f} %" in header
    assert f"{core_days} TPUv3-core-days" in header
    config = run_of(run)
    numbers = f"{num_steps(config):,} | {exaflops(config):,.0f} | {tables.TABLE_2[key]['ImageNet'].mean:.2f}"
    assert re.search(rf"`{re.escape(run)}` \|[^|]+\| {numbers}[^|]* \| {core_days} \|", INDEX)


def test_page_that_is_written_out_equals_the_general_page():
    written_out, expected = (
        run_of("vit_l16_i21k.py").to_dict(),
        run_of("vit_i21k.py:model=ViT-L/16,epochs=90").to_dict(),
    )
    for each in (written_out, expected):
        each["data"].pop("how_to_prepare")  # they name themselves
    assert written_out == expected


@pytest.mark.parametrize("name", re.findall(r"`(\w+\.py:[^`\s]+)`", INDEX))
def test_command_of_the_index_parses(name):
    assert run_of(name).epochs >= 1


@pytest.mark.parametrize("path", PRE_TRAINING, ids=lambda path: path.stem)
def test_page_says_what_weight_decay_is_in_the_other_convention(path):
    module = load(path)
    config = module.get_config()
    told = re.search(
        r"removes\s+(\S+) x (\S+) of a kernel\..*?need\s+(\S+); .*?factor of\s+([\d,]+)", module.__doc__, re.DOTALL
    )
    if config.optimizer.name == "sgd":
        assert told is None
        return
    weight_decay, learning_rate, product, factor = (
        float(number.rstrip(".,:").replace(",", "")) for number in told.groups()
    )
    assert weight_decay == config.optimizer.weight_decay
    assert learning_rate in {config.optimizer.learning_rate, *getattr(module, "LEARNING_RATE", {}).values()}
    assert product == pytest.approx(weight_decay * learning_rate)
    assert factor == pytest.approx(1 / learning_rate, rel=0.02)


@pytest.mark.parametrize(
    ("page", "start", "start_without"), [("vit_jft", 13, 12_700), ("vit_i21k", 11, 15_100), ("vit_i1k", 8, 693)]
)
def test_head_bias_starts_the_loss_at_the_documented_value(page, start, start_without):
    module = load(ROOT / "configs" / f"{page}.py")
    config = module.get_config()
    labels_an_image = 1.26 if "jft" in page else 1

    def first_loss(bias):
        logits = jnp.full((2, config.model.num_classes), bias)
        with_one, with_two = Loss(config.loss)(logits, jnp.array([[0, -1], [0, 1]]))
        return with_one + (labels_an_image - 1) * (with_two - with_one)

    assert first_loss(config.model.head_bias) == pytest.approx(start, abs=0.5)
    assert first_loss(0.0) == pytest.approx(start_without, rel=0.003)
    assert f"the loss starts at {start};" in module.__doc__.lower() and f"{start_without:,}." in module.__doc__


def test_imagenet21k_has_the_settings_that_table_3_lacks():
    config = load(ROOT / "configs" / "vit_i21k.py").get_config()
    assert (config.loss, config.model.num_classes, config.model.head_bias) == ("sigmoid", 21_843, -10.0)
    assert (config.optimizer.end_learning_rate, config.optimizer.clip_norm) == (1e-5, 1.0)
    assert config.model.pre_logits


def test_imagenet_has_the_settings_that_table_3_lacks():
    config = load(ROOT / "configs" / "vit_i1k.py").get_config()
    assert (config.loss, config.model.num_classes, config.model.head_bias) == ("sigmoid", 1_000, -6.9)
    assert (config.optimizer.end_learning_rate, config.optimizer.clip_norm) == (0.0, 1.0)
    assert config.model.pre_logits


@pytest.mark.parametrize("page", ["vit_jft", "hybrid_jft", "bit_jft"])
def test_jft_has_the_settings_that_table_3_lacks(page):
    config = load(ROOT / "configs" / f"{page}.py").get_config()
    assert (config.loss, config.model.num_classes, config.model.head_bias) == ("sigmoid", 18_291, -10.0)
    assert (config.optimizer.end_learning_rate, config.optimizer.clip_norm) == (0.0, None)
    assert config.model.pre_logits == (None if page == "bit_jft" else True)


def test_bit_l_is_bits_recipe():
    config = run_of("bit_jft.py:model=R152x4")
    optimizer = config.optimizer
    assert (config.model.name, config.epochs, config.batch_size) == ("R152x4", 40, 4096)
    assert (optimizer.name, optimizer.momentum, optimizer.learning_rate) == ("sgd", 0.9, 0.48)
    assert (optimizer.weight_decay, optimizer.warmup_steps) == (1e-4, 5_000)
    assert optimizer.schedule == "drops"
    assert [share * config.epochs for share in optimizer.drop_at] == [10, 23, 30, 37]
    assert round(exaflops(config), -2) == 13_300


def test_masked_patch_prediction_is_the_papers_recipe():
    config = run_of("masked_patches.py")
    optimizer = config.optimizer
    assert (config.model.name, config.steps, config.batch_size, config.data.image_size) == (
        "ViT-B/16",
        10**6,
        4096,
        224,
    )
    assert (optimizer.name, optimizer.learning_rate, optimizer.schedule) == ("adamw", 2e-4, "cosine")
    assert (optimizer.b1, optimizer.b2, optimizer.warmup_steps) == (0.9, 0.999, 10_000)
    assert config.masked_patches.to_dict() == {"target": "mean_colour", "corruption_rate": 0.5}
    assert config.steps * config.batch_size / tables.JFT_IMAGES == pytest.approx(14, abs=0.5)  # "about 14 epochs"
    other = run_of("masked_patches.py:target=pixels,corruption_rate=0.15")
    assert other.masked_patches.to_dict() == {"target": "pixels", "corruption_rate": 0.15}


@pytest.mark.parametrize("page", ["vit_jft", "hybrid_jft", "bit_jft"])
def test_own_data_set_is_an_argument_of_the_jft_pages(page):
    config = load(ROOT / "configs" / f"{page}.py").get_config("data=tfds:web,num_classes=5000,train_images=40000000")
    assert (config.data.dataset, config.model.num_classes) == ("tfds:web", 5_000)
    assert config.data.expected_train_images == 40_000_000


@pytest.mark.parametrize(
    ("page", "model", "place"),
    [
        ("vit_jft", "R50x1", "configs/bit_jft.py"),
        ("vit_jft", "R50+ViT-B/16", "configs/hybrid_jft.py"),
        ("hybrid_jft", "ViT-B/16", "configs/vit_jft.py"),
        ("vit_i21k", "ViT-L16", "Did you mean 'ViT-L/16'?"),
        ("vit_i1k", "R50x1", "--config.model.name="),
    ],
)
def test_model_of_another_page_is_refused_and_that_page_named(page, model, place):
    with pytest.raises(UserError, match=re.escape(f"unknown model '{model}'")) as error:
        load(ROOT / "configs" / f"{page}.py").get_config(f"model={model}")
    assert place in str(error.value)


def test_subset_of_the_data_size_study_is_as_long_as_the_whole(run_main):
    command = re.search(r"python -m vit_jax\.main (--config=configs/vit_jft\.py:model=ViT-B/32 [^`]*?--dry_run)", INDEX)
    output = run_main(*command[1].replace("\\\n", " ").replace("'", "").split(), check=True).stdout
    assert "9,000,000 images expected" in output
    whole = num_steps(run_of("vit_jft.py:model=ViT-B/32"))
    assert f"{whole:,} steps" in output


@pytest.mark.parametrize(
    ("dataset", "row", "rates"),
    [
        ("imagenet2012", "ImageNet", (0.003, 0.01, 0.03)),
        ("cifar100", "CIFAR-100", (0.001, 0.003, 0.01, 0.03)),
        ("cifar10", "CIFAR-10", (0.001, 0.003, 0.01, 0.03)),
        ("pets", "Pets", (0.001, 0.003, 0.01, 0.03)),
        ("flowers", "Flowers-102", (0.001, 0.003, 0.01, 0.03)),
    ],
)
def test_fine_tuning_is_its_row_of_table_4(dataset, row, rates):
    page = load(ROOT / "configs" / "transfer.py")
    config = page.get_config(f"dataset={dataset}")
    optimizer = config.optimizer
    assert (config.steps, config.batch_size, config.data.image_size) == (tables.TABLE_4[row].steps, 512, 384)
    assert (optimizer.name, optimizer.momentum, optimizer.momentum_dtype) == ("sgd", 0.9, "bfloat16")
    assert (optimizer.schedule, optimizer.weight_decay, optimizer.clip_norm) == ("cosine", 0.0, 1.0)
    assert config.loss == "softmax"
    sweep = page.get_sweep(f"dataset={dataset}")
    assert sweep.choose == {"optimizer.learning_rate": rates}
    assert set(rates) <= set(tables.TABLE_4[row].learning_rates)
    assert sweep.seeds == 3
    (argument,) = sweep.tasks.values()
    chosen = page.get_config(argument)
    assert chosen.data.train_split != config.data.train_split
    assert config.data.train_split == sweep.final["data.train_split"]
    assert chosen.steps == config.steps


def test_resnets_and_hybrids_try_two_rules_by_default():
    page = load(ROOT / "configs" / "transfer.py")
    for weights in ("weights=bit_m_r50x1", "weights=vit_r50b16_i21k", "weights=none,model=R50x1"):
        tried = page.get_sweep(f"dataset=imagenet2012,{weights}").combinations()
        assert {"argument.rule": "vit", "optimizer.learning_rate": 0.06} in tried
        assert tried[-1] == {"argument.rule": "bit", "optimizer.learning_rate": 0.003}


@pytest.mark.parametrize(
    ("argument", "size", "crop_from", "mixup", "steps"),
    [
        ("dataset=cifar10,weights=bit_m_r50x1", 128, 160, 0.1, 10_000),
        ("dataset=cifar10,weights=bit_m_r152x4,bit_size=released", 128, 160, 0.1, 10_000),
        ("dataset=pets,weights=bit_m_r50x1", 384, 448, 0.0, 500),
        ("dataset=pets,weights=bit_m_r152x4", 480, 512, 0.0, 500),
        ("dataset=pets,weights=none,model=R152x4", 480, 512, 0.0, 500),
        ("dataset=pets,weights=bit_m_r50x1,bit_size=released", 480, 512, 0.0, 500),
        ("dataset=pets,weights=bit_m_r50x1,resolution=192", 192, 224, 0.0, 500),
        ("dataset=imagenet2012,weights=bit_m_r152x2", 384, 448, 0.1, 20_000),
    ],
)
def test_hyper_rule_of_bit_is_an_argument_of_fine_tuning(argument, size, crop_from, mixup, steps):
    config = run_of(f"transfer.py:{argument},rule=bit")
    data = config.data
    assert (data.image_size, data.random_crop_from, data.inception_crop) == (size, crop_from, False)
    assert (config.mixup_alpha, config.steps, config.optimizer.learning_rate) == (mixup, steps, 0.003)
    assert config.optimizer.schedule == "drops"
