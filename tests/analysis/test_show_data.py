import itertools
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg

from configs import quickstart
from tests.conftest import ROOT
from tests.data.test_prepare_input import photo
from vit_jax.analysis import show_data
from vit_jax.errors import UserError
from vit_jax.experiment import build


@pytest.fixture
def config():
    config = quickstart.get_config()
    config.data.image_size = 8
    return config


def drawn(part):
    """Images of a part of a figure, and their captions."""
    axes = [axis for axis in part.axes if axis.images]
    return [np.asarray(axis.images[0].get_array()) for axis in axes], [axis.texts[0].get_text() for axis in axes]


def test_training_images_are_those_that_the_run_sees_first(config):
    training, _ = show_data.draw_batches(config, count=5).subfigs
    images, labels = drawn(training)
    batch = next(build.build(config).make_train_batches())
    np.testing.assert_array_equal(images, batch["image"][:5])
    assert labels == [str(label) for label in batch["label"][:5]]


def test_evaluation_images_are_spread_over_the_split(config):
    _, evaluation = show_data.draw_batches(config, count=20).subfigs
    images, labels = drawn(evaluation)
    assert len(images) == 20
    assert len(set(labels)) > 4


def test_mixed_images_name_their_sources(config):
    (plain, _), config.mixup_alpha = show_data.draw_batches(config, count=6).subfigs, 0.8
    (mixed, _) = show_data.draw_batches(config, count=6).subfigs
    (images, _), (mixed_images, captions) = drawn(plain), drawn(mixed)
    for i, caption in enumerate(captions):
        share = float(caption.split()[0])
        expected = share * images[i].astype(float) + (1 - share) * images[i - 1]
        np.testing.assert_allclose(mixed_images[i], expected, atol=2)


def test_classes_show_an_image_of_each(config):
    (part,) = show_data.draw_classes(config).subfigs
    images, labels = drawn(part)
    assert labels == [f"{i}: {i}" for i in range(10)]
    assert images[0].shape == (96, 96, 3)


def test_classes_are_drawn_whatever_the_split_for_evaluation(config):
    config.data.eval_split = "there is none"
    (part,) = show_data.draw_classes(config).subfigs
    assert len(drawn(part)[1]) == 10


def test_classes_of_images_without_labels_are_refused(config, tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.jpg").write_bytes(b"")
    config.data.update(dataset=str(tmp_path), eval_split=None)
    with pytest.raises(UserError, match=r"none of 1 images of .* has a label"):
        show_data.draw_classes(config)


def test_image_that_cannot_be_read_is_reported_and_the_others_are_drawn(config, tmp_path, capsys):
    for number, content in enumerate((b"", simplejpeg.encode_jpeg(np.full((8, 8, 3), 200, np.uint8)))):
        path = tmp_path / "train" / "cat" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    config.data.update(dataset=str(tmp_path), eval_split=None)
    (part,) = show_data.draw_batches(config, count=2).subfigs
    images, labels = drawn(part)
    assert sorted(int(image.max()) > 150 for image in images) == [False, True]
    assert sorted(labels) == ["cat", "no label"]
    assert "0.jpg" in capsys.readouterr().err


def test_command_writes_a_picture_and_reports_mistakes_in_one_line(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "vit_jax.data.show", "--config=configs/quickstart.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    output = tmp_path / "new" / "data.png"
    process = run(f"--output={output}", "--images=8")
    assert process.returncode == 0, process.stderr
    assert output.read_bytes().startswith(b"\x89PNG")
    process = run(f"--output={tmp_path / 'none.png'}", "--config.data.crop_min_area=2")
    assert process.returncode == 1
    assert process.stderr.startswith("error: data.crop_min_area must be more than 0 and at most 1")
    assert not (tmp_path / "none.png").exists()


def test_missing_data_say_how_to_prepare_them(config):
    config.data.update(dataset="/nowhere", how_to_prepare="ask the librarian")
    with pytest.raises(UserError, match="ask the librarian"):
        show_data.draw_batches(config)
    config.data.dataset = "digit"
    with pytest.raises(UserError, match="data set 'digit' not found"):
        show_data.draw_batches(config)


def test_photos_are_drawn_as_the_run_sees_them(config, tmp_path):
    for split, name in itertools.product(("train", "test"), ("cat", "dog")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "0.jpg").write_bytes(photo(name == "cat", 3))
    config.data.dataset, config.data.inception_crop, config.data.flip = str(tmp_path), False, False
    upright = show_data.draw_batches(config, count=2).subfigs
    config.data.exif_orientation = False
    stored = show_data.draw_batches(config, count=2).subfigs
    assert "EXIF orientation ignored" in stored[0].get_suptitle()
    for part, other in zip(upright, stored, strict=True):
        for image, turned in zip(drawn(part)[0], drawn(other)[0], strict=True):
            np.testing.assert_allclose(image.astype(int), turned[::-1, ::-1], atol=1)
    (classes,) = show_data.draw_classes(config).subfigs
    config.data.exif_orientation = None
    (others,) = show_data.draw_classes(config).subfigs
    np.testing.assert_allclose(drawn(classes)[0][0].astype(int), drawn(others)[0][0][::-1, ::-1], atol=1)
