"""Folders of images without classes, for objectives that need no labels."""

import os
import shutil

import numpy as np
import pytest

from tests.data.test_sources import write_image
from vit_jax.data.sources import NO_LABEL, open_source
from vit_jax.errors import UserError


def unlabelled(path, split="all"):
    return open_source(str(path), split, labelled=False)


@pytest.fixture
def folder(tmp_path):
    """Images at any depth, and files that are none."""
    for number, name in enumerate(("b.jpg", "a.JPG", "train/2.jpg", "train/2019/may/3.jpg", "train/2019/june/4.jpg")):
        write_image(tmp_path / "images" / name, 10 * number)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / "train" / ".hidden.jpg").write_bytes(b"")
    return tmp_path / "images"


def names(source):
    return [source[index]["file_name"] for index in range(len(source))]


def test_all_images_are_found_at_any_depth_and_none_has_a_label(folder):
    source = unlabelled(folder)
    assert names(source) == ["a.JPG", "b.jpg", "2.jpg", "4.jpg", "3.jpg"]
    assert {source[index]["label"] for index in range(5)} == {NO_LABEL}
    assert (source.class_names, source.num_classes, source.max_labels) == (None, None, 1)
    assert [source.where(index)[len(str(folder)) :] for index in (0, 3)] == ["/a.JPG", "/train/2019/june/4.jpg"]
    assert source[3]["image"] == (folder / "train/2019/june/4.jpg").read_bytes()


def test_a_split_is_a_folder_at_the_top_and_slices_are_random_parts_that_share_no_image(folder):
    assert names(unlabelled(folder, "Train")) == ["2.jpg", "4.jpg", "3.jpg"]
    first, rest = unlabelled(folder, "all[:60%]"), unlabelled(folder, "all[60%:]")
    assert (len(first), len(rest)) == (3, 2)
    assert sorted(names(first) + names(rest)) == sorted(names(unlabelled(folder)))


def test_a_zip_file_has_the_images_of_its_folder(folder, tmp_path):
    zipped = unlabelled(shutil.make_archive(str(tmp_path / "zipped"), "zip", folder))
    source = unlabelled(folder)
    assert names(zipped) == names(source)
    assert [zipped[index]["image"] for index in range(5)] == [source[index]["image"] for index in range(5)]


def test_folders_of_classes_are_images_too(folder):
    shutil.rmtree(folder / "train" / "2019")
    (folder / "b.jpg").unlink()
    assert len(unlabelled(folder)) == 2


def test_another_list_of_images_is_noticed(folder):
    before = unlabelled(folder).fingerprint()
    assert unlabelled(folder).fingerprint() == before
    write_image(folder / "train" / "5.jpg", 50)
    assert unlabelled(folder).fingerprint() != before


def test_places_of_images_identify_them(folder):
    ((source, _),) = unlabelled(folder).parts()
    (extent, *others) = source.extents()
    assert extent.place == os.path.realpath(folder)
    assert np.array_equal(extent.numbers(), [hash("a.JPG"), hash("b.jpg")])
    assert sum(each.size for each in others) == 3


def test_a_loop_of_links_ends(folder):
    (folder / "train" / "again").symlink_to(folder / "train")
    assert len(unlabelled(folder)) >= 5


@pytest.mark.parametrize(("split", "message"), [("test", "no split 'test': its folders are .*train.*Take 'all'")])
def test_an_unknown_split_is_refused(folder, split, message):
    with pytest.raises(UserError, match=message):
        unlabelled(folder, split)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"has no images\. Known images are .jpg"):
        unlabelled(tmp_path)
    with pytest.raises(UserError, match=r"it has no folders\. Take 'all'"):
        unlabelled(tmp_path / "train", "train")


def test_where_labels_are_needed_a_folder_of_images_says_what_to_do(tmp_path):
    write_image(tmp_path / "1.jpg", 1)
    for split in ("train", "all"):
        with pytest.raises(UserError, match=r"has images but no folders.*<class>/.*objective=masked_patches"):
            open_source(str(tmp_path), split)
