"""Examples that two sources share: every kind of source, slices, sums, mixtures, links, aliases of one place."""

import ast
import os
import shutil
import zipfile

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.data.record_files import GOLDEN, write_shards
from vit_jax.data.overlap import check_disjoint, count_shared
from vit_jax.data.sources import open_source
from vit_jax.data.sources.mixture import Mixture
from vit_jax.data.sources.real_labels import RealLabels
from vit_jax.data.sources.splits import SlicedSource
from vit_jax.errors import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images with two splits of two classes, and a zip file of it. What is in the files does not matter."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            (root / "set" / split / name).mkdir(parents=True)
            for number in range(count):
                (root / "set" / split / name / f"{number}.jpg").write_bytes(b"x")
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for path in sorted((root / "set").rglob("*.jpg")):
            archive.write(path, path.relative_to(root / "set"))
    return root


def shared(dataset, tested, other, of=None):
    return count_shared(open_source(str(dataset), tested), open_source(str(of or dataset), other))


@pytest.mark.parametrize(
    ("tested", "other", "expected"),
    [
        ("test", "train", 0),
        ("train", "train", 1437),
        ("train[90%:]", "train[:90%]", 0),
        ("train[90%:]", "train", 144),
        ("train[100:200]", "train[150:180]", 30),
        ("train[100:200]+train[150:180]", "train[150:180]", 60),
        ("test[:10]", "all", 10),
        ("train[:5]+test[:7]", "test", 7),
        ("all", "test[3:5]", 2),
        ("train[5:]", "train[:4]+train[4:6]", 1),
    ],
)
def test_slices_and_sums_of_digits(tested, other, expected):
    assert shared("digits", tested, other) == expected


@pytest.mark.parametrize("place", ["set", "set.zip"])
@pytest.mark.parametrize(
    ("tested", "other", "expected"),
    [
        ("test", "train", 0),
        ("train[50%:]", "train[:50%]", 0),
        ("train[25%:]", "train[:50%]", 3),
        ("test", "all", 6),
        ("train[:9]+test[:3]", "test[3:]+train[9:]", 0),
    ],
)
def test_folders_and_zip_files(images, place, tested, other, expected):
    assert shared(images / place, tested, other) == expected


def test_one_folder_by_several_names_is_one_folder(images, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(images / "set")
    monkeypatch.chdir(images)
    for name in ("set", "./set/", "set/../set", tmp_path / "link", images / "set" / "train" / ".."):
        assert shared(images / "set", "train", "train", name) == 12
    monkeypatch.setenv("VIT_JAX_DATA", str(images))
    monkeypatch.chdir(tmp_path)
    assert shared(images / "set", "train[:4]", "train", "set") == 4
    (tmp_path / "link.zip").symlink_to(images / "set.zip")
    assert shared(images / "set.zip", "train", "train", tmp_path / "link.zip") == 12


def test_a_split_opened_as_its_own_data_set_has_the_same_images(images):
    assert shared(images / "set" / "train", "all", "train", images / "set") == 12
    assert shared(images / "set" / "train", "all", "test", images / "set") == 0


def test_links_to_classes_and_to_images_are_followed(images, tmp_path):
    (tmp_path / "val" / "dog").mkdir(parents=True)
    (tmp_path / "val" / "cat").symlink_to(images / "set" / "train" / "cat")
    (tmp_path / "val" / "dog" / "a.jpg").symlink_to(images / "set" / "train" / "dog" / "4.jpg")
    (tmp_path / "val" / "dog" / "b.jpg").write_bytes(b"x")
    (tmp_path / "val" / "dog" / "c.jpg").symlink_to(images / "set" / "test" / "dog" / "1.jpg")
    assert shared(tmp_path, "val", "train", images / "set") == 7
    assert shared(images / "set", "test", "val", tmp_path) == 1


def test_copies_count_as_different_images(images, tmp_path):
    shutil.copytree(images / "set", tmp_path / "copy")
    assert shared(tmp_path / "copy", "train", "train", images / "set") == 0
    assert shared(images / "set.zip", "train", "train", images / "set") == 0


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_files_of_records_by_any_pattern_and_as_single_files(file_format, tmp_path):
    everything = write_shards(tmp_path / "web", (3, 3), file_format)
    first = tmp_path / "web" / f"web.{file_format}-00000-of-00002"
    assert shared(everything, "all[:4]", "all[4:]") == shared(everything, "all[4:]", "all[:4]") == 0
    assert shared(first, "all", "all[2:]", everything) == 1
    os.symlink(first, tmp_path / f"b.{file_format}")
    assert shared(tmp_path / f"b.{file_format}", "all[1:]", "all", everything) == 2


def test_data_sets_of_tfds_by_name_and_by_folder(tmp_path, monkeypatch):
    shutil.copytree(GOLDEN / "golden_animals", tmp_path / "golden_animals")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    train = open_source("tfds:golden_animals", "train")
    assert shared("tfds:golden_animals", "train[:50%]", "train[50%:]") == 0
    assert shared("tfds:golden_animals", "train[:2]", "train", tmp_path / "golden_animals") == 2
    others = [split for split in train.splits if split != "train"]
    assert shared("tfds:golden_animals", "train", "+".join(others)) == 0
    assert shared("tfds:golden_animals", "train", "all") == len(train)


def test_mixtures_relabelled_sources_and_nested_slices_are_resolved(images):
    parts = [open_source(str(images / name), split) for name, split in (("set", "train[:50%]"), ("set.zip", "test"))]
    mixture = Mixture(parts, [1.0, 3.0])
    assert shared(images / "set", "train", "train[:50%]") == 6
    for name, split, expected in (("set", "train", 6), ("set", "test", 0), ("set.zip", "test", 6), ("set", "all", 6)):
        assert count_shared(open_source(str(images / name), split), mixture) == expected
    inner = SlicedSource([(open_source("digits", "train[100:200]"), np.array([7, 3, 99]))], "drawn")
    assert count_shared(inner, open_source("digits", "train[103:104]+train[199:]")) == 2
    again = SlicedSource([(inner, range(1, 2))], "the second")
    assert count_shared(again, open_source("digits", "train[103:104]")) == 1
    relabelled = object.__new__(RealLabels)
    relabelled._source = open_source("digits", "train[3:]")
    assert count_shared(open_source("digits", "train[:5]"), relabelled) == 2


def test_every_source_says_where_its_examples_are():
    found = {}
    texts = (path.read_text() for path in (ROOT / "vit_jax").rglob("*.py"))
    for text in (text for text in texts if "def fingerprint" in text):
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                found[node.name] = methods | {base.id for base in node.bases if isinstance(base, ast.Name)}
    sources = {name: has for name, has in found.items() if {"__getitem__", "fingerprint"} <= has and name != "Source"}
    assert len(sources) >= 6
    assert [name for name, has in sources.items() if not has & {"parts", "extents", "SlicedSource"}] == []


class Plain:
    """A source of somebody else's, which says nothing of places."""

    name = "plain"

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return 9

    def fingerprint(self):
        return self.split


def test_sources_that_say_nothing_of_places_are_compared_whole():
    part = SlicedSource.__new__(SlicedSource)
    part._parts, part._ends = [(Plain("a"), range(2, 5))], [3]
    assert count_shared(Plain("a"), Plain("b")) == 0
    assert count_shared(Plain("a"), Plain("a")) == 9
    assert count_shared(part, Plain("a")) == 3


def test_error_says_how_many_of_which_are_shared():
    with pytest.raises(UserError, match=r"'test\[:10\]' of digits, to test on, shares 4 of its 10 .* 'test\[6:\]'"):
        check_disjoint(
            open_source("digits", "test[:10]"), "to test on", open_source("digits", "test[6:]"), "drawn from", "Mend."
        )
