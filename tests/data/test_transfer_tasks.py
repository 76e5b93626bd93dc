import json

import jax
import numpy as np
import PIL.Image
import pytest

from tests.conftest import ROOT
from tests.data.test_sources import write_image
from tests.test_configs import load, run_of
from vit_jax import optimizers
from vit_jax.data import transfer_tasks
from vit_jax.data.bit_hyper_rule import hyper_rule_schedule, hyper_rule_steps
from vit_jax.data.sources import open_source
from vit_jax.data.transfer_tasks import TASKS, transfer_task
from vit_jax.errors import UserError


def make_folder(root, *places):
    for number, place in enumerate(places):
        write_image(root / f"{place}.png", 3 * number % 250)
    return str(root)


@pytest.mark.parametrize(
    ("name", "images", "held_out"),
    [("cifar100", 50_000, 1000), ("pets", 3680, 368), ("flowers", 2040, 204), ("imagenet2012", 1_281_167, 12_812)],
)
def test_the_papers_tasks_hold_out_a_small_part_of_train(name, images, held_out):
    task = TASKS[name]
    assert (task.num_images["final"], task.num_images["choose"]) == (images, images - held_out)
    assert "test" not in task.splits["choose"][1]


def test_splits_of_flowers_hold_out_a_tenth_of_both_parts():
    assert TASKS["flowers"].splits["choose"] == (
        "train[:90%]+validation[:90%]",
        "train[90%:]+validation[90%:]",
    )


@pytest.mark.parametrize(
    ("num_images", "steps", "warmup", "drops"),
    [
        (19_999, 500, 100, (200, 300, 400)),
        (20_000, 10_000, 500, (3000, 6000, 9000)),
        (499_999, 10_000, 500, (3000, 6000, 9000)),
        (500_000, 20_000, 500, (6000, 12_000, 18_000)),
    ],
)
def test_hyper_rule_matches_bit(num_images, steps, warmup, drops):
    assert hyper_rule_steps(num_images) == steps
    found_warmup, drop_at = hyper_rule_schedule(steps)
    schedule = optimizers.make_schedule(
        "drops", learning_rate=0.003, num_steps=steps, warmup_steps=found_warmup, drop_at=drop_at
    )

    def rule(step):  # steps from 0; a step that equals a boundary already has the divided rate
        return 0.003 * step / warmup if step < warmup else 0.003 / 10 ** sum(step >= drop for drop in drops)

    every_step = np.arange(20_000)  # of each case, so that they share compiled programs
    np.testing.assert_allclose(
        jax.vmap(schedule)(every_step), [rule(step) for step in every_step], rtol=1e-5, atol=1e-9
    )


def test_a_folder_of_classes_is_split_into_what_has_nothing_in_common(tmp_path):
    folder = make_folder(tmp_path / "pets", *(f"{name}/{i}" for name in ("cat", "dog") for i in range(40)))
    task = transfer_task(folder)
    parts = {
        name: {open_source(folder, split)[i]["image"] for i in range(len(open_source(folder, split)))}
        for name, split in zip(
            ("train", "validation", "all", "test"), (*task.splits["choose"], *task.splits["final"]), strict=True
        )
    }
    assert {name: len(part) for name, part in parts.items()} == {"train": 64, "validation": 8, "all": 72, "test": 8}
    assert parts["all"] == parts["train"] | parts["validation"]
    assert not parts["all"] & parts["test"]
    assert not parts["train"] & parts["validation"]
    assert task.steps == 500


@pytest.mark.parametrize(
    ("splits", "choose", "final"),
    [
        (("train", "test"), ("train[:90%]", "train[90%:]"), ("train", "test")),
        (("train",), ("train[:80%]", "train[80%:90%]"), ("train[:90%]", "train[90%:]")),
        (("train", "val"), ("train[:90%]", "train[90%:]"), ("train", "val")),
        (("train", "val", "test"), ("train", "val"), ("train+val", "test")),
        (("training", "validation", "test"), ("training", "validation"), ("training+validation", "test")),
    ],
)
def test_splits_of_a_folder_are_found_by_their_usual_names(tmp_path, splits, choose, final):
    folder = make_folder(
        tmp_path, *(f"{split}/{name}/{i}" for split in splits for name in ("cat", "dog") for i in "12345")
    )
    assert transfer_task(folder).splits == {"choose": choose, "final": final}


def test_splits_of_other_names_can_be_named(tmp_path):
    folder = make_folder(
        tmp_path, *(f"{split}/{name}/1" for split in ("fit", "held_out", "val") for name in ("cat", "dog"))
    )
    with pytest.raises(UserError, match=r"has the splits fit, held_out, val.*,train=<split>,test=<split>$"):
        transfer_task(folder)
    task = transfer_task(folder, train="fit", test="held_out")
    assert task.splits == {"choose": ("fit", "val"), "final": ("fit+val", "held_out")}
    with pytest.raises(UserError, match="use tfds:cifar10 instead to choose others"):
        transfer_task("cifar10", train="fit")


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (("cat/1", "dog/1"), "has 2 images, too few to hold out a tenth"),
        (("a/cat/1", "b/cat/1"), "None of them is called train or training; name the splits"),
        (("train/cat/1", "extra/cat/1"), "None of them is called test or testing.*,train=train,test=<split>"),
        (("train/cat/1", "test/cat/1"), r"has a single class \(cat\)"),
        ((), "has no folders; images should be in"),
    ],
)
def test_a_folder_without_what_is_needed_is_reported(tmp_path, places, message):
    with pytest.raises(UserError, match=message):
        transfer_task(make_folder(tmp_path, *places))


def test_an_unreadable_image_is_left_for_training_to_report(tmp_path):
    folder = make_folder(tmp_path, *(f"{name}/{i}" for name in ("cat", "dog") for i in range(5)))
    (tmp_path / "cat" / "0.png").write_bytes(b"")
    assert transfer_task(folder).small_images


@pytest.mark.parametrize(("side", "small"), [(95, True), (96, False)])
def test_images_under_96x96_are_small_to_bits_rule(tmp_path, side, small):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(10):
            PIL.Image.new("RGB", (side, side)).save(tmp_path / name / f"{number}.png")
    assert transfer_task(str(tmp_path)).small_images is small


class Counted:
    """A source of a number of unreadable images of two classes."""

    num_classes = 2

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        raise UserError("not an image")


@pytest.mark.parametrize(("count", "steps"), [(22_000, 500), (22_400, 10_000)])  # nine tenths are 19,800 and 20,160
def test_length_goes_by_the_images_that_are_trained_on_in_the_end(tmp_path, monkeypatch, count, steps):
    monkeypatch.setattr(transfer_tasks, "open_source", lambda *_: Counted(count))
    assert transfer_task(make_folder(tmp_path, "cat/1", "dog/1")).steps == steps


@pytest.mark.parametrize(("dataset", "warmup"), [("cifar10", 500), ("imagenet2012", 500), ("pets", 100)])
def test_fine_tuning_warms_up_over_500_steps_or_as_bit_in_short_runs(dataset, warmup):
    config = run_of(f"transfer.py:dataset={dataset}")
    assert config.optimizer.warmup_steps == warmup
    assert not config.checkpoint.keep_best  # on a test set nothing is chosen


@pytest.mark.parametrize(
    ("model", "more", "rates"),
    [
        ("R50x1", "", [("vit", 0.003), ("vit", 0.01), ("vit", 0.03), ("vit", 0.06), ("bit", 0.003)]),
        ("R50+ViT-B/16", ",rule=vit", [0.003, 0.01, 0.03, 0.06]),
        ("R50x1", ",rule=bit", [0.003]),
        ("ViT-B/16", "", [0.003, 0.01, 0.03]),
    ],
)
def test_resnets_even_from_runs_try_a_higher_learning_rate_and_bits_rule(tmp_path, model, more, rates):
    (tmp_path / "starts.jsonl").touch()
    for file in ("config.json", "model.json"):
        (tmp_path / file).write_text(json.dumps({"name": model}))
    sweep = load(ROOT / "configs" / "transfer.py").get_sweep(f"dataset=imagenet2012,weights={tmp_path}{more}")
    rules_and_rates = [tuple(each.values()) for each in sweep.combinations()]
    assert rules_and_rates == [rate if isinstance(rate, tuple) else (rate,) for rate in rates]


def test_hyper_rule_clips_nothing_and_keeps_its_momentum_whole():
    config = run_of("transfer.py:dataset=cifar10,rule=bit,steps=400")
    assert (config.optimizer.clip_norm, config.optimizer.momentum_dtype) == (None, "float32")
    assert config.mixup_alpha == 0.1  # by the size of the data set, whatever the length


def test_a_mistyped_task_is_reported_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'cifar100'"):
        transfer_task("cifar1000")


def test_digits_are_a_task_too():
    assert transfer_task("digits").splits["final"] == ("train", "test")
