"""Settings that configs/transfer.py and configs/vtab.py derive from the weights, and their dry run."""

import json
import re

import jax
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.experiment.test_build import digits_config
from tests.test_configs import load, run_of
from vit_jax.errors import UserError
from vit_jax.experiment import build, dry_run
from vit_jax.experiment.fine_tuning import dropout_of, fitting_size, model_of
from vit_jax.models import create_model
from vit_jax.weights import from_params, list_checkpoints, save

BUCKET = "https://storage.googleapis.com/vit_models"


def make_workdir(path, **model):
    """The files of a run that identify its model."""
    (path / "starts.jsonl").touch()
    (path / "config.json").write_text(json.dumps({"data": {}, "model": model}))
    (path / "model.json").write_text(json.dumps({"name": "ViT-Ti/16", "num_classes": 3} | model))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small ViT with patches of 14 pixels, in a file whose name says nothing."""
    fields = {"num_layers": 1, "hidden_dim": 8, "mlp_dim": 8, "num_heads": 2}
    model = create_model("ViT-Ti/14", num_classes=0, **fields)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 28, 28, 3), np.float32))["params"])
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    return save(from_params("ViT-Ti/14", params, image_size=28, **fields), tmp_path_factory.mktemp("weights") / "x.npz")


@pytest.mark.parametrize("page", ["transfer", "vtab"])
@pytest.mark.parametrize(
    ("weights", "rate"),
    [
        ("vit_b16_i21k", 0.1),
        ("vit_h14_i21k", 0.1),
        ("vit_r50l32_i21k", 0.1),
        ("vit_b16_i21k_in1k_384", 0.1),
        ("gs://vit_models/imagenet21k/ViT-L_16.npz", 0.1),
        (f"{BUCKET}/imagenet21k/R50+ViT-B_16.npz", 0.1),
        (f"{BUCKET}/sam/ViT-B_16.npz", None),
        ("augreg_b16_i21k", None),
        ("augreg_r50l32_i21k", None),  # although its pre-training had dropout 0.1
        ("sam_b16_in1k", None),
        ("gsam_b16_in1k", None),
        ("bit_m_r50x1", None),
        ("none", None),
        ("/no/such/file.npz", None),
    ],
)
def test_dropout_of_fine_tuning_follows_the_weights(page, weights, rate):
    module = load(ROOT / "configs" / f"{page}.py")
    assert module.get_config(f"weights={weights}").model.dropout_rate == rate
    if not weights.startswith("bit"):
        assert module.get_config(f"weights={weights},dropout=0.25").model.dropout_rate == 0.25
        assert module.get_config(f"weights={weights},dropout=0").model.dropout_rate is None


def test_every_released_checkpoint_has_a_rate_with_a_reason():
    rates = {name: dropout_of(name) for name in list_checkpoints()}
    assert {name for name, (rate, _) in rates.items() if rate} == {name for name in rates if name.startswith("vit_")}
    assert all(reason for _, reason in rates.values())


@pytest.mark.parametrize(("written", "rate"), [(0.1, 0.1), (0.3, 0.3), (0.0, None), (None, None), ("much", None)])
def test_a_run_is_fine_tuned_with_the_dropout_it_was_trained_with(tmp_path, written, rate):
    make_workdir(tmp_path, dropout_rate=written)
    assert run_of(f"transfer.py:weights={tmp_path}").model.dropout_rate == rate


def test_dropout_matches_the_model_and_the_dry_run_says_where_it_is_from():
    config = run_of("transfer.py:weights=vit_b32_i21k,dataset=pets,resolution=64")
    config.model.num_layers = 1
    config.optimizer.warmup_steps, config.batch_size = 1, 8
    built = build.build(config, allow_missing_data=True)
    assert built.model.dropout_rate == 0.1
    assert "dropout   0.1: as the released README says" in dry_run.describe_run(built)
    config.weights = "augreg_b32_i21k"
    lines = dry_run.describe_choices(built)
    assert lines[0].startswith("dropout   0.1, as the config says; the default for these weights is 0: as AugReg's")


@pytest.mark.parametrize("argument", ["1", "-0.1", "nan", "no"])
def test_dropout_that_is_not_a_rate_is_refused(argument):
    with pytest.raises(UserError, match="'dropout' takes a rate of at least 0 and less than 1"):
        run_of(f"transfer.py:dropout={argument}")


@pytest.mark.parametrize(
    ("argument", "size", "crop_from"),
    [
        ("transfer.py:weights=vit_h14_i21k", 378, None),
        ("transfer.py:weights=vit_h14_i21k,resolution=518", 518, None),
        ("transfer.py:weights=gs://vit_models/imagenet21k/ViT-H_14.npz", 378, None),
        ("transfer.py:weights=none,model=ViT-S/14", 378, None),
        ("transfer.py:weights=none,model=ViT-Ti/20", 380, None),
        ("transfer.py:weights=none,model=ViT-S/14,rule=bit,dataset=cifar10", 126, 158),
        ("transfer.py:weights=vit_b16_i21k", 384, None),
        ("transfer.py:weights=vit_r50l32_i21k", 384, None),
        ("vtab.py:weights=vit_h14_i21k", 378, 441),
        ("vtab.py:weights=vit_l16_i21k", 384, 448),
        ("vtab.py:weights=bit_m_r50x1", 384, 448),
    ],
)
def test_images_are_the_largest_that_the_patches_tile(argument, size, crop_from):
    data = run_of(argument).data
    assert (data.image_size, data.random_crop_from) == (size, crop_from)


@pytest.mark.parametrize("page", ["transfer.py", "vtab.py"])
def test_patch_size_of_files_and_runs_is_found_in_them(page, file, tmp_path):
    make_workdir(tmp_path, name="ViT-H/14")
    for weights in (file, tmp_path):
        assert run_of(f"{page}:weights={weights}").data.image_size == 378
    assert run_of(f"fewshot.py:weights={file},dataset=digits").data.image_size == 224
    assert model_of(str(file))["num_layers"] == 1


def test_a_damaged_file_is_left_for_the_run_to_report(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK")
    assert run_of(f"transfer.py:weights={tmp_path / 'x.npz'}").data.image_size == 384


def test_dry_run_says_why_images_are_smaller(file):
    config = run_of(f"transfer.py:weights={file},dataset=digits,rule=bit,batch=8,steps=10,dtype=float32")
    lines = dry_run.describe_run(build.build(config)).splitlines()
    assert "size      126 pixels instead of 128, which is not divisible by the patch size 14" in lines
    assert any(line.startswith("dropout   0: nothing says how these weights were trained") for line in lines)


def test_resnets_and_hybrids_take_any_size():
    assert [fitting_size(383, {"name": name}) for name in ("R50x1", "R50+ViT-B/16", "ViT-B/16")] == [383, 383, 368]


@pytest.mark.parametrize(
    ("model", "rate", "says"),
    [
        ("ViT-B/16", 8e-4, "0.0008, table 3's for the class token.*--config.optimizer.learning_rate=0.0003"),
        ("ViT-B/16", 3e-3, "0.003, table 3's for the class token"),
        ("ViT-H/14", 3e-4, "learning_rate=0.0001125"),
        ("ViT-B/16", 3e-4, "gap, at 3/8 of table 3's"),
        ("ViT-Ti/4", 1e-3, "0.001, which may have been chosen for a class token.*learning_rate=0.000375"),
    ],
)
def test_dry_run_says_that_gap_needs_a_lower_rate(model, rate, says):
    config = digits_config(**{"model.pool": "gap", "optimizer.learning_rate": rate})
    built = build.build(config)
    built.model_fields["name"] = model
    (line,) = dry_run.describe_choices(built)
    assert line.startswith("pool      gap")
    assert re.search(says, line)
    config.model.pool = "cls"
    assert dry_run.describe_choices(build.build(config)) == []


@pytest.mark.parametrize(
    ("page", "rate"),
    [
        ("vit_jft.py:model=ViT-B/16", 3e-4),
        ("vit_jft.py:model=ViT-L/16", 1.5e-4),
        ("hybrid_jft.py:model=R50+ViT-B/32", 3e-4),
        ("vit_i21k.py:model=ViT-B/16", 3.75e-4),
        ("vit_i1k.py:model=ViT-B/16", 1.125e-3),
    ],
)
def test_pages_offer_gap_with_its_rate(page, rate):
    config = run_of(f"{page},pool=gap")
    assert (config.model.pool, config.optimizer.learning_rate) == ("gap", rate)
    with pytest.raises(UserError, match="unknown pool 'max'"):
        run_of(f"{page},pool=max")
