import concurrent.futures
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import simplejpeg
import sklearn.datasets

from tests.conftest import ROOT, data_file
from tests.data.record_files import WRITERS, write_shards
from vit_jax.data.sources import BadRecordError, ImageFolderSource, MissingDataError, find_path, open_source
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


def zipped(folder, compression=zipfile.ZIP_STORED):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture(params=["folder", "zip", "deflated zip"])
def dataset(folder, request):
    if request.param == "folder":
        return folder
    return zipped(folder, zipfile.ZIP_DEFLATED if "deflated" in request.param else zipfile.ZIP_STORED)


def grey(example):
    return int(simplejpeg.decode_jpeg(example["image"])[0, 0, 0])


def examples_of(source):
    return [source[i] for i in range(len(source))]


def test_digits_are_split_without_overlap_and_cover_all_classes():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    for source in (train, test):
        assert {source[i]["label"] for i in range(len(source))} == set(range(10))
    seen = {train[i]["image"].tobytes() for i in range(len(train))}
    assert sum(test[i]["image"].tobytes() in seen for i in range(len(test))) == 0
    assert train[0]["image"].shape == (8, 8, 3)
    assert max(train[i]["image"].max() for i in range(len(train))) == 255
    with pytest.raises(UserError, match="Did you mean 'test'"):
        open_source("digits", "tests")


def test_digits_are_those_of_scikit_learn():
    digits, test = sklearn.datasets.load_digits(), open_source("digits", "test")
    np.testing.assert_array_equal([each["label"] for each in examples_of(test)], digits.target[::5])
    images = [each["image"][..., 0] for each in examples_of(test)]
    np.testing.assert_array_equal(images, np.round(digits.images[::5] * (255 / 16)))


def test_folder_and_zip_give_the_same_examples_in_order_of_names(dataset, folder):
    source = ImageFolderSource(dataset, "train")
    assert (source.split, source.splits, source.max_labels) == ("train", ["test", "train"], 1)
    assert (source.class_names, source.num_classes) == (["cat", "dog"], 2)
    examples = examples_of(source)
    assert examples[4]["image"] == (folder / "train" / "dog" / "20.jpg").read_bytes()
    assert [example["label"] for example in examples] == [0, 0, 0, 1, 1, 1]
    assert [grey(example) for example in examples] == [10, 20, 30, 11, 21, 31]
    assert [example["file_name"] for example in examples] == ["10.jpg", "20.jpg", "30.jpg"] * 2
    assert len(ImageFolderSource(dataset, "test")) == 2
    assert source[-1] == source[5]
    with pytest.raises(IndexError):
        source[6]


def test_place_of_an_image_is_its_path(folder):
    assert ImageFolderSource(folder, "train").where(4) == str(folder / "train" / "dog" / "20.jpg")
    path = zipped(folder)
    assert ImageFolderSource(path, "train").where(4) == f"'train/dog/20.jpg' in {path}"


def test_pickled_sources_read_the_same_in_another_process(folder, tmp_path):
    sources = [ImageFolderSource(folder, "train"), open_source(str(zipped(folder)), "train[1:]")]
    sources += [open_source(write_shards(tmp_path / word, file_format=word), "all") for word in WRITERS]
    expected = [examples_of(source) for source in sources]  # pickled with their files open
    script = (
        "import pickle, sys; sources = pickle.load(sys.stdin.buffer); "
        "pickle.dump([[source[i] for i in range(len(source))] for source in sources], sys.stdout.buffer)"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, input=pickle.dumps(sources), capture_output=True, check=True
    )
    assert pickle.loads(process.stdout) == expected


def test_many_threads_read_the_same_as_one(dataset):
    source = ImageFolderSource(dataset, "train")
    expected = examples_of(source)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for index, example in zip(
            list(range(6)) * 100, pool.map(source.__getitem__, list(range(6)) * 100), strict=True
        ):
            assert example == expected[index]


def test_unknown_split_is_refused_with_the_nearest(dataset):
    with pytest.raises(UserError, match="Did you mean 'train'"):
        ImageFolderSource(dataset, "trian")


def test_missing_split_of_a_data_set_with_one_split_names_that_one_and_not_its_classes(folder):
    shutil.rmtree(folder / "test")
    for dataset in (folder, zipped(folder)):
        with pytest.raises(UserError, match=r"unknown split .* 'test'\. .*Known: train\.$"):
            ImageFolderSource(dataset, "test")


def test_fingerprint_changes_with_the_list_of_files_and_is_the_same_for_folder_and_zip(folder):
    before = ImageFolderSource(folder, "train").fingerprint()
    assert ImageFolderSource(zipped(folder), "train").fingerprint() == before
    (folder / "train" / "cat" / "20.jpg").unlink()
    assert ImageFolderSource(folder, "train").fingerprint() != before


def test_image_that_has_gone_is_named_when_it_is_read(folder):
    source = ImageFolderSource(folder, "train")
    (folder / "train" / "dog" / "20.jpg").unlink()
    with pytest.raises(BadRecordError, match=r"cannot read .*train/dog/20.jpg: .*No such file"):
        source[4]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_member_of_a_zip_is_named_when_it_is_read_and_others_are_read(folder, compression):
    path = zipped(folder, compression)
    whole = examples_of(ImageFolderSource(path, "train"))
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("train/dog/20.jpg")
    content = bytearray(path.read_bytes())
    content[member.header_offset + 30 + len(member.filename) + member.compress_size // 2] ^= 1
    path.write_bytes(content)
    source = ImageFolderSource(path, "train")
    with pytest.raises(BadRecordError, match=r"cannot read 'train/dog/20.jpg' in .*data.zip"):
        source[4]
    assert [source[i] for i in (0, 1, 2, 3, 5)] == whole[:4] + whole[5:]


def test_zip_in_a_compression_that_is_not_read_says_how_to_zip(folder):
    with pytest.raises(UserError, match=r"'train/cat/10.jpg' .*not compressed by(.|\n)*zip -0"):
        ImageFolderSource(zipped(folder, zipfile.ZIP_LZMA), "train")


def test_zip_with_something_before_it_is_read(folder):
    path = zipped(folder)
    expected = examples_of(ImageFolderSource(path, "train"))
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    assert examples_of(ImageFolderSource(path, "train")) == expected


def test_zip_with_extra_fields_before_the_data_is_read(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("train/cat/10.jpg")
        info.extra = b"\x99\x99\x04\x00abcd"
        archive.writestr(info, (folder / "train" / "cat" / "10.jpg").read_bytes())
        with archive.open("train/cat/20.jpg", "w", force_zip64=True) as member:
            member.write((folder / "train" / "cat" / "20.jpg").read_bytes())
    assert [grey(example) for example in examples_of(ImageFolderSource(path, "train"))] == [10, 20]


def test_damaged_zip_is_refused(tmp_path):
    path = tmp_path / "data.zip"
    path.write_bytes(b"PK\3\4 and then nothing")
    with pytest.raises(UserError, match=r"cannot read .* as a folder or zip file"):
        ImageFolderSource(path, "train")


def test_empty_folder_says_what_it_should_hold(tmp_path):
    with pytest.raises(UserError, match="<split>/<class>/"):
        ImageFolderSource(tmp_path, "train")


def test_missing_data_set_says_how_to_prepare_it(tmp_path):
    with pytest.raises(MissingDataError, match=r"'.*nowhere' not found(.|\n)*fetch it from the shelf"):
        open_source(str(tmp_path / "nowhere"), "train", how_to_prepare="fetch it from the shelf")


def test_relative_data_set_is_looked_for_in_the_data_folder(folder, monkeypatch):
    monkeypatch.setenv("VIT_JAX_DATA", str(folder.parent))
    assert find_path("data") == folder
    assert len(open_source("data", "test")) == 2
    assert find_path("other") is None


def test_slices_of_folders_share_out_a_permutation_of_them(dataset):
    def greys(split):
        return [grey(example) for example in examples_of(open_source(str(dataset), split))]

    whole = greys("train[:2]") + greys("train[2:5]") + greys("train[-1:]")
    assert sorted(whole) == [10, 11, 20, 21, 30, 31]
    assert whole != sorted(whole, key=lambda value: (value % 10, value))  # not in the order of the classes
    assert greys("train[:50%]") == whole[:3]
    assert greys("train[-1:]+test") == [whole[-1], 40, 41]
    assert greys("train") == [10, 20, 30, 11, 21, 31]
    assert sorted(greys("all")) == [10, 11, 20, 21, 30, 31, 40, 41]


def test_slices_of_a_folder_have_all_classes(tmp_path):
    for name in ("ant", "bee", "cat", "dog"):
        for number in range(50):
            path = tmp_path / "train" / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"not read here")
    held_out, kept = open_source(str(tmp_path), "train[:20%]"), open_source(str(tmp_path), "train[20%:]")
    counts = np.bincount([held_out[i]["label"] for i in range(len(held_out))], minlength=4)
    assert (counts >= 4).all()
    places = [source.where(i) for source in (held_out, kept) for i in range(len(source))]
    assert len(set(places)) == 200


def test_slice_keeps_names_places_and_classes(folder):
    source = open_source(str(folder), "train[2:4]")
    assert (len(source), source.split, source.splits) == (2, "train[2:4]", ["test", "train"])
    assert (source.class_names, source.num_classes, source.max_labels) == (["cat", "dog"], 2, 1)
    for i in range(2):
        label, value = source[i]["label"], grey(source[i])
        assert source.where(i) == str(folder / "train" / ("cat", "dog")[label] / f"{value - label}.jpg")
    with pytest.raises(IndexError):
        source[2]


def test_fingerprint_changes_with_the_slice(folder):
    splits = ("train", "train[:5]", "train[1:]", "train[:1]+train[1:]", "test")
    assert len({open_source(str(folder), split).fingerprint() for split in splits}) == len(splits)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[3:3]", r"'train\[3:3\]' of .* is empty"),
        ("train[:1%]", r"is empty: it is \[0:0\]"),
        ("train[4:2]", "is empty"),
        ("train[:7]", r"\[:7\] incompatible with 6 examples"),
        ("train[:200%]", "percent slice boundaries"),
        ("train[2]", "only support slice syntax"),
        ("train[:9", r"'train\[:9' of .* Unrecognized split format"),
        ("trian[:90%]", "Did you mean 'train'"),
        ("train+tset", "Did you mean 'test'"),
        ("all[:90%]", r"'all' cannot be sliced or added.*test\[:90%\]\+train\[:90%\]"),
        ("", "unknown split"),
    ],
)
def test_invalid_slice_is_refused(folder, split, message):
    with pytest.raises(UserError, match=message):
        open_source(str(folder), split)


def test_splits_with_different_classes_are_not_added_up(folder):
    write_image(folder / "test" / "bird" / "1.jpg", 1)
    with pytest.raises(UserError, match="different classes"):
        open_source(str(folder), "train+test")


def test_slices_of_digits_are_resolved():
    whole, part = open_source("digits", "train"), open_source("digits", "train[-10%:]")
    assert len(part) == 144  # of 1,437
    np.testing.assert_array_equal(part[0]["image"], whole[1437 - 144]["image"])
    assert len(open_source("digits", "all")) == 1797


def test_fewer_classes_than_the_data_set_has_are_refused(folder):
    assert open_source(str(folder), "train", num_classes=3).num_classes == 2
    with pytest.raises(UserError, match=r"has 2 classes, more than 1"):
        open_source(str(folder), "train", num_classes=1)


def test_address_is_refused_with_what_to_do():
    with pytest.raises(UserError, match=r"'gs://bucket/data' is an address. Copy"):
        open_source("gs://bucket/data", "train")


def test_cifar10_zip_is_read_whole():
    train = ImageFolderSource(data_file("cifar10_jpeg.zip"), "train")
    assert (len(train), train.splits, len(train.class_names)) == (50_000, ["test", "train"], 10)
    assert (train[0]["label"], train[49_999]["label"]) == (0, 9)
    images = np.array([simplejpeg.decode_jpeg(train[i]["image"]) for i in range(0, 50_000, 50)])
    assert images.shape == (1000, 32, 32, 3)
    mean = images.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(mean / 255, [0.491, 0.482, 0.447], atol=0.01)  # the known mean of CIFAR-10
