import zipfile

import numpy as np
import pytest
import simplejpeg

from tests.conftest import data_file
from vit_jax.data.sources import ImageFolderSource, find_path, open_source
from vit_jax.errors import UserError


def write_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(simplejpeg.encode_jpeg(np.full((8, 8, 3), value, np.uint8), quality=100))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    for split, values in (("train", (10, 20, 30)), ("test", (40,))):
        for label, name in enumerate(("cat", "dog")):
            for value in values:
                write_image(root / split / name / f"{value}.jpg", value + label)
    (root / "train" / "cat" / ".DS_Store").write_bytes(b"left by the system")
    return root


def zipped(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture(params=["folder", "zip"])
def dataset(folder, request):
    return folder if request.param == "folder" else zipped(folder)


def test_digits_are_split_without_overlap_and_cover_all_classes():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    for source in (train, test):
        assert {source[i]["label"] for i in range(len(source))} == set(range(10))
    seen = {train[i]["image"].tobytes() for i in range(len(train))}
    assert sum(test[i]["image"].tobytes() in seen for i in range(len(test))) == 0
    assert train[0]["image"].shape == (8, 8, 3)
    assert max(train[i]["image"].max() for i in range(len(train))) == 255


def test_folder_and_zip_give_the_same_examples_in_order_of_names(dataset):
    source = ImageFolderSource(dataset, "train")
    assert source.class_names == ["cat", "dog"]
    examples = [source[i] for i in range(len(source))]
    assert [example["label"] for example in examples] == [0, 0, 0, 1, 1, 1]
    assert [int(example["image"][0, 0, 0]) for example in examples] == [10, 20, 30, 11, 21, 31]
    assert len(ImageFolderSource(dataset, "test")) == 2


def test_unknown_split_is_refused_with_the_nearest(dataset):
    with pytest.raises(UserError, match="Did you mean 'train'"):
        ImageFolderSource(dataset, "trian")


def test_unknown_split_of_digits_is_refused():
    with pytest.raises(UserError, match="Did you mean 'test'"):
        open_source("digits", "tests")


def test_empty_class_is_named(folder):
    (folder / "train" / "bird").mkdir()
    with pytest.raises(UserError, match="classes without images: 'bird'"):
        ImageFolderSource(folder, "train")
    with pytest.raises(UserError, match="classes without images: 'bird'"):
        ImageFolderSource(zipped(folder), "train")


def test_file_that_is_not_an_image_is_named(folder):
    (folder / "train" / "cat" / "notes.txt").write_text("cats")
    with pytest.raises(UserError, match=r"not images: 'train/cat/notes.txt'"):
        ImageFolderSource(folder, "train")
    with pytest.raises(UserError, match=r"not images: 'train/cat/notes.txt'"):
        ImageFolderSource(zipped(folder), "train")


def test_file_where_a_class_folder_should_be_is_named(folder):
    write_image(folder / "train" / "stray.jpg", 0)
    for dataset in (folder, zipped(folder)):
        with pytest.raises(UserError, match=r"<class>/<image>.*has 'train/stray.jpg'"):
            ImageFolderSource(dataset, "train")


def test_images_one_level_too_deep_are_named(folder):
    write_image(folder / "train" / "cat" / "tabby" / "1.jpg", 0)
    for dataset in (folder, zipped(folder)):
        with pytest.raises(UserError, match=r"right in it.*'train/cat/tabby/"):
            ImageFolderSource(dataset, "train")


def test_a_single_folder_around_the_splits_is_looked_through(folder):
    expected = [ImageFolderSource(folder, "train")[i]["label"] for i in range(6)]
    around = folder.parent / "around"
    around.mkdir()
    folder.rename(around / "data")
    for dataset in (around, zipped(around)):
        source = ImageFolderSource(dataset, "train")
        assert [source[i]["label"] for i in range(6)] == expected


def test_fingerprint_changes_with_the_list_of_files_and_is_the_same_for_folder_and_zip(folder):
    before = ImageFolderSource(folder, "train").fingerprint()
    assert ImageFolderSource(zipped(folder), "train").fingerprint() == before
    (folder / "train" / "cat" / "20.jpg").unlink()
    assert ImageFolderSource(folder, "train").fingerprint() != before


def test_truncated_image_is_named_when_it_is_read(folder):
    path = folder / "train" / "dog" / "20.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    for source in (ImageFolderSource(folder, "train"), ImageFolderSource(zipped(folder), "train")):
        with pytest.raises(UserError, match=r"cannot read image 'train/dog/20.jpg'.*not a whole JPEG"):
            source[4]


def test_damaged_zip_is_refused(tmp_path):
    path = tmp_path / "data.zip"
    path.write_bytes(b"PK\3\4 and then nothing")
    with pytest.raises(UserError, match=r"cannot read .* as a folder or zip file"):
        ImageFolderSource(path, "train")


def test_empty_folder_says_what_it_should_hold(tmp_path):
    with pytest.raises(UserError, match="<split>/<class>/"):
        ImageFolderSource(tmp_path, "train")


def test_missing_data_set_says_how_to_prepare_it(tmp_path):
    with pytest.raises(UserError, match=r"'.*nowhere' not found(.|\n)*fetch it from the shelf"):
        open_source(str(tmp_path / "nowhere"), "train", how_to_prepare="fetch it from the shelf")


def test_relative_data_set_is_looked_for_in_the_data_folder(folder, monkeypatch):
    monkeypatch.setenv("VIT_JAX_DATA", str(folder.parent))
    assert find_path("data") == folder
    assert len(open_source("data", "test")) == 2
    assert find_path("other") is None


def test_cifar10_zip_is_read_whole():
    path = data_file("cifar10_jpeg.zip")
    train, test = ImageFolderSource(path, "train"), ImageFolderSource(path, "test")
    assert (len(train), len(test), len(train.class_names)) == (50_000, 10_000, 10)
    assert (train[0]["label"], train[49_999]["label"]) == (0, 9)
    assert train[0]["image"].shape == (32, 32, 3)
    mean = np.mean([train[i]["image"].mean(axis=(0, 1)) for i in range(0, 50_000, 10)], axis=0)
    np.testing.assert_allclose(mean / 255, [0.491, 0.482, 0.447], atol=0.01)  # the known mean of CIFAR-10
