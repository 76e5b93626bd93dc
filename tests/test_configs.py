"""Each config file is a page that is true: it can be built, and its header says how to run it."""

import importlib.util
import pathlib

import jax
import pytest

from tests.conftest import ROOT
from vit_jax import experiment, overview, partitioning

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_without_its_data(path, monkeypatch):
    monkeypatch.delenv("VIT_JAX_DATA", raising=False)
    one_device = partitioning.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(partitioning, "make_mesh", lambda *_, **__: one_device)
    config = load(path).get_config()
    built = experiment.build(config, allow_missing_data=True)
    assert config.model.name in overview.dry_run(config, built)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_of_config_tells_command_needs_time_and_result(path):
    header = load(path).__doc__
    assert f"python -m vit_jax.main --config=configs/{path.name}" in header
    for heading in ("Needs", "Takes", "Reaches"):
        assert f"\n{heading} " in header


def test_vit_l16_i21k_is_the_papers_recipe():
    config = load(ROOT / "configs" / "vit_l16_i21k.py").get_config()
    assert config.model.name == "ViT-L/16"
    assert (config.batch_size, config.epochs, config.data.image_size) == (4096, 90, 224)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.b1, optimizer.b2, optimizer.warmup_steps) == ("adamw", 0.9, 0.999, 10_000)
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.end_learning_rate) == (1e-3, "linear", 1e-5)
    assert (optimizer.weight_decay, config.model.dropout_rate, optimizer.clip_norm) == (0.03, 0.1, 1.0)
    assert (config.loss, config.model.num_classes, config.model.head_bias) == ("sigmoid", 21_843, -10.0)
    assert config.model.pre_logits


def test_vit_l16_i21k_argument_sets_the_epochs():
    assert load(ROOT / "configs" / "vit_l16_i21k.py").get_config("epochs=30").epochs == 30
