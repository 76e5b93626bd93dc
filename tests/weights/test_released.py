import dataclasses
import re

import pytest

from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.weights import released
from vit_jax.weights.download import cached_path
from vit_jax.weights.released import get_checkpoint, list_checkpoints

ALL = [get_checkpoint(name) for name in list_checkpoints()]

# Model: pre-training file, learning rate of the fine-tuning, ImageNet accuracy; in the README's order.
RECOMMENDED = {
    "L/16": ("L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0", "0.01", 85.59),
    "B/16": ("B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0", "0.03", 85.49),
    "S/16": ("S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0", "0.03", 83.73),
    "R50+L/32": ("R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1", "0.01", 85.99),
    "R26+S/32": ("R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0", "0.01", 83.85),
    "Ti/16": ("Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", "0.03", 78.22),
    "B/32": ("B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0", "0.01", 83.59),
    "S/32": ("S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0", "0.01", 79.58),
    "R+Ti/16": ("R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", "0.03", 75.40),
}


def short(model):
    return re.sub("vit-|[^a-z0-9]", "", model.lower())


@pytest.mark.parametrize("model", RECOMMENDED)
def test_the_recommended_augreg_checkpoints_are_there_with_their_accuracy(model):
    run, learning_rate, accuracy = RECOMMENDED[model]
    pretrained = get_checkpoint(f"augreg_{short(model)}_i21k")
    finetuned = get_checkpoint(f"augreg_{short(model)}_i21k_in1k_384")
    assert pretrained.url == f"gs://vit_models/augreg/{run}.npz"
    assert finetuned.url == f"gs://vit_models/augreg/{run}--imagenet2012-steps_20k-lr_{learning_rate}-res_384.npz"
    assert finetuned.published_accuracy == {"imagenet2012": accuracy}
    assert pretrained.model == finetuned.model == (model if "+" in model else f"ViT-{model}")


def test_the_papers_checkpoints_are_there():
    assert list_checkpoints("vit_*_i21k") == [
        f"vit_{model}_i21k" for model in ("b16", "b32", "l16", "l32", "h14", "r50b16", "r50l32")
    ]
    b16 = get_checkpoint("vit_b16_i21k")
    assert b16.url == "gs://vit_models/imagenet21k/ViT-B_16.npz"
    assert b16.published_accuracy == {"cifar10": 99.02, "cifar100": 92.06, "imagenet2012": 84.53}
    assert get_checkpoint("vit_r50l32_i21k").url == "gs://vit_models/imagenet21k/R50+ViT-L_32.npz"
    assert get_checkpoint("vit_r50b16_i21k_in1k_384").url == "gs://vit_models/imagenet21k+imagenet2012/R50+ViT-B_16.npz"
    assert get_checkpoint("vit_l16_i21k_in1k_224").url == "gs://vit_models/imagenet21k+imagenet2012/ViT-L_16-224.npz"
    assert get_checkpoint("bit_m_r152x4_in1k").url == "gs://bit_models/BiT-M-R152x4-ILSVRC2012.npz"
    assert len(list_checkpoints("bit_[sm]_r*x[0-9]")) == 12
    published = {name: get_checkpoint(name).published_accuracy for name in list_checkpoints("vit_*")}
    assert published["vit_h14_i21k"] == {"cifar10": 99.27, "cifar100": 93.82, "imagenet2012": 85.13}
    assert published["vit_l16_i21k_in1k_384"] == {"imagenet2012": 85.15}
    assert published["vit_r50b16_i21k_in1k_384"] == {"imagenet2012": 85.08}
    assert published["vit_r50l32_i21k"] is None


def test_names_and_addresses_are_unique():
    # Not asked of the dictionary, in which a name given twice would show once.
    made = [each for family in (released._vit, released._augreg, released._imagenet_alone, released._bit)
            for each in family()]  # fmt: skip
    assert len({each.name for each in made}) == len({each.url for each in made}) == len(made) == len(ALL)


def test_patterns_choose_names():
    assert list_checkpoints("vit_l16*") == ["vit_l16_i21k", "vit_l16_i21k_in1k_384", "vit_l16_i21k_in1k_224"]
    assert list_checkpoints("nothing*") == []


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("vit_b16_in21k", "vit_b16_i21k"),
        ("ViT_B16_i21k", "vit_b16_i21k"),
        ("augreg_l16_i21k_in1k_348", "augreg_l16_i21k_in1k_384"),
        ("bit_m_r50_x1", "bit_m_r50x1"),
    ],
)
def test_a_name_that_does_not_exist_comes_with_the_nearest(given, nearest):
    with pytest.raises(UserError, match=f"unknown released checkpoint {given!r}. Did you mean {nearest!r}"):
        get_checkpoint(given)


@pytest.mark.parametrize("checkpoint", ALL, ids=lambda checkpoint: checkpoint.name)
def test_an_entry_agrees_with_itself(checkpoint):
    bit, augreg = checkpoint.name.startswith("bit_"), checkpoint.name.startswith("augreg_")
    # The name
    pretraining = {"imagenet21k": "i21k", "imagenet2012": "in1k"}[checkpoint.pretraining_data]
    family = {"i21k": "bit_m", "in1k": "bit_s"}[pretraining] if bit else checkpoint.name.partition("_")[0]
    expected = f"{family}_{short(checkpoint.model)}" + ("" if bit else f"_{pretraining}")
    if checkpoint.finetuning_data:
        expected += "_in1k" if bit else f"_in1k_{checkpoint.image_size}"
    assert re.fullmatch(f"{expected}(_[0-9]+ep)?", checkpoint.name)
    # The address
    assert re.fullmatch(r"gs://(vit_models|bit_models|big_vision)/[\w./+-]+\.npz", checkpoint.url)
    assert cached_path(checkpoint.url).suffix == ".npz"
    assert ("res_384" in checkpoint.url) == (augreg and checkpoint.image_size == 384)
    assert ("res_224" in checkpoint.url) == (
        augreg and bool(checkpoint.finetuning_data) and checkpoint.image_size == 224
    )
    if augreg:
        assert f"-{pretraining.replace('in1k', 'i1k')}-300ep-" in checkpoint.url
        assert ("--imagenet2012-" in checkpoint.url) == bool(checkpoint.finetuning_data)
    # The head
    data = checkpoint.finetuning_data or checkpoint.pretraining_data
    assert checkpoint.num_classes == {"imagenet21k": 21_843, "imagenet2012": 1000}[data]
    assert checkpoint.class_names == (None if "zero" in checkpoint.note else data)
    assert ("zero" in checkpoint.note) == (family == "vit" and not checkpoint.finetuning_data)
    assert checkpoint.probabilities == ("sigmoid" if augreg and not checkpoint.finetuning_data else None)
    # The input
    assert checkpoint.preprocessing.image_size == (checkpoint.image_size, checkpoint.image_size)
    assert checkpoint.preprocessing.mean == checkpoint.preprocessing.std == (0.5, 0.5, 0.5)
    # What is published
    assert (checkpoint.published_accuracy is None) == (checkpoint.accuracy_source is None)
    for percent in (checkpoint.published_accuracy or {}).values():
        assert 60 < percent < 100
    assert checkpoint.sha256 is None or re.fullmatch("[0-9a-f]{64}", checkpoint.sha256)


@pytest.mark.parametrize("checkpoint", ALL, ids=lambda checkpoint: checkpoint.name)
def test_every_model_can_be_created(checkpoint):
    create_model(checkpoint.model, num_classes=checkpoint.num_classes, **checkpoint.model_overrides)


def test_only_the_papers_own_pre_trained_vits_have_pre_logits():
    with_it = {checkpoint.name for checkpoint in ALL if checkpoint.model_overrides.get("pre_logits")}
    assert with_it == {*list_checkpoints("vit_*_i21k"), *list_checkpoints("plain_*")}


def test_fine_tuned_augreg_files_name_the_pre_training_they_come_from():
    for checkpoint in ALL:
        if checkpoint.name.startswith("augreg_") and checkpoint.finetuning_data and "_i21k_" in checkpoint.name:
            pretrained = get_checkpoint(checkpoint.name.partition("_in1k")[0])
            run = re.fullmatch("gs://vit_models/augreg/(.+)--.+", checkpoint.url)[1]
            assert (pretrained.url == f"gs://vit_models/augreg/{run}.npz") != (run in checkpoint.note)


def test_entries_cannot_be_changed_and_can_be_hashed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_checkpoint("vit_b16_i21k").url = "elsewhere"
    assert len(set(ALL)) == len(ALL)
