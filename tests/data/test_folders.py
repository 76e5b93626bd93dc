"""Folders and zip files of images as people make them; the same rules apply to both."""

import logging
import os
import pathlib
import random
import socket
import unicodedata
import warnings
import zipfile

import numpy as np
import pytest
import simplejpeg

from vit_jax.config import base_config
from vit_jax.data.sources import BadRecordError, ImageFolderSource, open_source, trees
from vit_jax.data.sources.folders import list_splits
from vit_jax.data.transfer_tasks import transfer_task
from vit_jax.errors import UserError
from vit_jax.experiment import evaluations
from vit_jax.experiment.data import open_sources

JPEG = simplejpeg.encode_jpeg(np.full((8, 8, 3), 100, np.uint8))
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def images(*folders, count=3, suffix=".jpg"):
    return {f"{folder}/{number}{suffix}": JPEG for folder in folders for number in range(count)}


def write_files(folder, files):
    """Writes files by their names; names that end with "/" are empty folders."""
    for name, content in files.items():
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(content)
    return str(folder)


@pytest.fixture(params=["folder", "zip"])
def build(request, tmp_path):
    """Makes a folder or a zip file of files by their names; names that end with "/" are empty folders."""

    def make(files, name="pets"):
        if request.param == "folder":
            return write_files(tmp_path / name, files)
        order = list(files)
        random.Random(0).shuffle(order)  # what is first in the file must not matter
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for place in order:
                archive.writestr(place, files[place])
        return f"{tmp_path}/{name}.zip"

    return make


LITTER = {
    **{f"{name}/desktop.ini": b"[.ShellClassInfo]" for name in ("cat", "dog")},
    "cat/thumbs.db": b"\xd0\xcf",
    "dog/Thumbs.db": b"\xd0\xcf",
    "cat/.DS_Store": b"",
    "cat/._0.jpg": b"\0\5\x16\7",
    "cat/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg": JPEG,
    "dog/.ipynb_checkpoints/0-checkpoint.jpg": JPEG,
    "$RECYCLE.BIN/a/0.jpg": JPEG,
    "System Volume Information/x/1.jpg": JPEG,
    "__MACOSX/cat/._0.jpg": b"\0\5\x16\7",
    "@eaDir/cat/0.jpg": JPEG,
    "README.md": b"pets",
    "LICENSE": b"free",
    "labels.csv": b"0,cat",
}


def test_litter_of_operating_systems_is_skipped(build):
    place = build(images("cat", "dog") | LITTER)
    assert list_splits(place) == ["all"]
    source = open_source(place, "all")
    assert (source.class_names, len(source)) == (["cat", "dog"], 6)


def test_files_beside_the_classes_of_a_split_are_skipped(build):
    place = build(
        images("train/cat", "train/dog", "test/cat", "test/dog") | {f"train/{k}": v for k, v in LITTER.items()}
    )
    assert list_splits(place) == ["test", "train"]
    assert len(open_source(place, "train")) == 6


def test_the_folder_around_classes_may_have_a_license(build):
    place = build(images("flowers/daisy", "flowers/rose") | {"flowers/LICENSE.txt": b"", "notes.txt": b""})
    assert list_splits(place) == ["flowers"]
    assert open_source(place, "all").class_names == ["daisy", "rose"]


def test_folders_of_classes_without_splits_are_one_split(build):
    place = build({f"{name}/{number}.jpg": JPEG + bytes([number]) for name in ("cat", "dog") for number in (0, 1)})
    source = open_source(place, "all")
    assert (source.splits, source.class_names, len(source)) == (["all"], ["cat", "dog"], 4)
    assert [source[i]["label"] for i in range(4)] == [0, 0, 1, 1]
    assert source[2]["image"] == JPEG + b"\0"
    assert source.where(3) == (f"'dog/1.jpg' in {place}" if place.endswith(".zip") else f"{place}/dog/1.jpg")
    parts = [open_source(place, spec) for spec in ("all[:75%]", "all[75%:]")]
    assert len({part.where(i) for part in parts for i in range(len(part))}) == 4
    with pytest.raises(
        UserError, match=r"has no split 'train': it has folders of classes \('cat', 'dog'\).*'all\[:90%\]'"
    ):
        open_source(place, "train")


def test_the_folder_around_the_splits_may_have_neighbours(build):
    place = build(images("pets/train/cat", "pets/test/cat") | {"docs/1.txt": b"", "tools/src/1.py": b""})
    assert list_splits(place) == ["test", "train"]
    assert len(open_source(place, "train")) == 3


@pytest.mark.parametrize("stray", ["cat/notes.txt", "cat/a first one.tif", "dog/z.zip"])
def test_a_stray_file_in_a_class_is_named_and_decides_nothing_else(build, stray):
    place = build(images("cat", "dog", "emu") | {stray: b"II*\0 or some text"})
    assert list_splits(place) == ["all"]
    with pytest.raises(UserError, match=f"not images: '{stray}'"):
        open_source(place, "all")


@pytest.mark.parametrize("name", ["train", "test", "val", "Training"])
def test_a_class_may_be_called_as_a_split(build, name):
    place = build(images("bus", "car", name))
    assert list_splits(place) == ["all"]
    assert set(open_source(place, "all").class_names) == {"bus", "car", name}
    assert len(open_source(place, "all[:5]")) == 5
    task = transfer_task(place, train="all[:8]", test="all[8:]")
    assert task.splits["final"] == ("all[:8]", "all[8:]")
    with pytest.raises(UserError, match="folders of classes"):
        open_source(place, name)


def test_a_class_may_be_called_as_the_split_around_it(build):
    place = build(images("train/bus", "train/train", "test/bus", "test/train"))
    assert open_source(place, "train").class_names == ["bus", "train"]


def test_splits_without_classes_are_not_classes_unless_requested(build):
    place = build(images("train", "test"))
    assert list_splits(place) == ["test", "train"]
    with pytest.raises(UserError, match=r"has 'train/0.jpg'.*If these are classes, take 'all'"):
        open_source(place, "train")
    assert open_source(place, "all").class_names == ["test", "train"]


def test_a_test_split_without_classes_leaves_the_others_usable(build):
    place = build(images("train/cat", "train/dog", "test"))
    assert list_splits(place) == ["test", "train"]
    assert len(open_source(place, "train[:50%]")) == 3
    with pytest.raises(UserError, match=r"has 'test/0.jpg'"):
        open_source(place, "test")


def test_folders_without_images_are_not_splits(build):
    place = build(
        images("train/cat", "train/dog", "test/cat", "test/dog") | {"annotations/cat/0.xml": b"<a/>", "docs/": b""}
    )
    assert list_splits(place) == ["test", "train"]
    assert len(open_source(place, "all")) == 12


def test_an_empty_class_first_or_last_changes_nothing_but_the_error(build):
    place = build(images("cat", "dog") | {"ant/": b"", "zebra/": b""})
    assert list_splits(place) == ["all"]
    with pytest.raises(UserError, match="classes without images: 'ant', 'zebra'"):
        open_source(place, "all")


def test_a_class_in_subfolders_is_named(build):
    place = build(images("cat", "dog", "emu/adult", "emu/young"))
    with pytest.raises(UserError, match=r"right in it .* has 'emu/adult/', 'emu/young/'"):
        open_source(place, "all")


@pytest.mark.parametrize("files", [{"cat/0.tif": b"II*\0", "dog/1.heic": b"\0"}, {"train/cat/0.tif": b"II*\0"}])
def test_folder_without_readable_images_names_the_known_formats(build, files):
    place = build(files)
    for take in (list_splits, lambda place: open_source(place, "all")):
        with pytest.raises(UserError, match=r"no images that can be read.* Known images are \.jpg"):
            take(place)


@pytest.mark.parametrize(
    ("around", "names"),
    [
        ("", ("Train", "Test")),
        ("archive/", ("TRAIN", "TEST")),
        ("archive/pets/", ("training", "Testing")),
        ("my data/Pets v2/", ("train", "VALID")),
    ],
)
def test_names_of_splits_count_in_any_case(build, around, names):
    place = build(images(*(f"{around}{name}/{kind}" for name in names for kind in ("cat", "dog"))))
    task = transfer_task(place)
    assert task.splits["final"] == names
    assert len(open_source(place, names[0].lower())) == 6
    assert len(open_source(place, f"{names[0].upper()}[:50%]")) == 3


def test_exact_match_wins_among_splits_that_differ_in_case(build):
    place = build(images("train/cat", "train/dog") | images("TRAIN/cat", "TRAIN/dog", count=1))
    assert (len(open_source(place, "train")), len(open_source(place, "TRAIN"))) == (6, 2)
    with pytest.raises(UserError, match="several splits called 'Train': 'TRAIN', 'train'"):
        open_source(place, "Train")


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (("a", "b"), "train=<split>,test=<split>"),
        (("photos", "train"), "train=train,test=<split>"),
        (("test", "pool"), "train=<split>,test=test"),
    ],
)
def test_splits_without_a_usual_name_are_left_to_the_user(build, names, advice):
    place = build(images(*(f"{name}/{kind}" for name in names for kind in ("cat", "dog"))))
    with pytest.raises(UserError) as error:
        transfer_task(place)
    assert str(error.value).endswith(advice)


def test_training_on_the_test_split_is_reported(build, caplog):
    place = build(images("Train/cat", "Train/dog", "Test/cat", "Test/dog"))
    transfer_task(place, train="Test", test="Train")
    assert "trains on the split 'Test', which by its name is for testing" in caplog.text


def test_a_split_may_lack_classes_of_the_training_split(build, caplog):
    place = build(images("train/cat", "train/dog", "train/emu", "test/cat", "test/emu") | {"test/dog/": b""})
    train = open_source(place, "train")
    with caplog.at_level(logging.WARNING):
        test = open_source(place, "test", class_names=train.class_names)
    assert "has no images of 1 of 3 classes: 'dog'" in caplog.text
    assert (test.class_names, test.num_classes) == (["cat", "dog", "emu"], 3)
    assert test.labels().tolist() == [test[i]["label"] for i in range(6)] == [0, 0, 0, 2, 2, 2]
    part = open_source(place, "test[:50%]", class_names=train.class_names)
    assert {part[i]["label"] for i in range(len(part))} <= {0, 2}
    assert test.fingerprint() != open_source(place, "test", class_names=["dog", "cat", "emu"]).fingerprint()
    with pytest.raises(UserError, match="different classes from those it is used with: it has 'dog'"):
        open_source(place, "train", class_names=["cat", "emu"])


def test_runs_and_few_shot_evaluations_take_test_splits_that_lack_classes(build):
    place = build(images("train/cat", "train/dog", "train/emu", "test/emu", "val/dog") | {"test/cat/": b""})
    config = base_config()
    config.data.dataset, config.data.eval_split = place, "test"
    train, test = open_sources(config.data)
    assert (train.class_names, test.class_names) == (["cat", "dog", "emu"],) * 2
    assert {test[i]["label"] for i in range(len(test))} == {2}
    config.evals.fewshot.update(datasets=(place,), l2=(1.0, 2.0), validation_split="val")
    (fewshot,) = evaluations.open_evaluations(config, None)
    assert {fewshot.data.test[i]["label"] for i in range(3)} == {2}
    assert {fewshot.data.validation[i]["label"] for i in range(3)} == {1}
    config.data.train_split, config.data.eval_split = "test", "train[:5]"
    with pytest.raises(UserError, match=r"different classes from those"):
        open_sources(config.data)


@pytest.mark.parametrize("spec", ["train+val", "val+train", "val[:50%]+train[:50%]", "all"])
def test_splits_that_are_added_up_may_lack_classes_of_the_training_split(build, spec):
    place = build(images("train/cat", "train/dog", "val/dog") | {"val/cat/": b""})
    source = open_source(place, spec)
    assert source.class_names == ["cat", "dog"]
    for index in range(len(source)):
        assert f"/{source.class_names[source[index]['label']]}/" in source.where(index)


@pytest.mark.parametrize("split", ["test", "Val", "test[:2]", "test+Val"])
def test_a_split_for_testing_may_have_empty_classes(build, split, caplog):
    place = build(images("train/cat", "train/dog", "test/dog", "Val/dog") | {"test/cat/": b"", "Val/cat/": b""})
    source = open_source(place, split)
    assert source.class_names == ["cat", "dog"]
    assert set(source.labels().tolist()) == {1}
    assert "has no images of 1 of 2 classes: 'cat'" in caplog.text


def test_a_class_that_is_empty_in_all_added_splits_is_named(build):
    place = build(images("train/cat", "val/cat") | {"train/dog/": b"", "val/dog/": b""})
    with pytest.raises(UserError, match="classes without images: 'dog'"):
        open_source(place, "train+val")


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".pjpeg", "", ".dat"])
def test_an_image_is_one_by_its_suffix_or_by_its_first_bytes(build, suffix):
    place = build(images("cat", "dog", suffix=suffix) | images("dog", count=1))
    source = open_source(place, "all")
    assert len(source) == 7
    assert {source[i]["image"] for i in range(len(source))} == {JPEG}


def test_names_that_differ_in_unicode_form_are_the_same_class(build):
    place = build(images(f"train/{NFC}", "train/the", f"test/{NFD}", "test/the"))
    train = open_source(place, "train")
    test = open_source(place, "test", class_names=train.class_names)
    assert train.class_names == test.class_names == [NFC, "the"]
    assert [test[i]["image"] for i in range(6)] == [JPEG] * 6
    assert open_source(place, "train+test").num_classes == 2
    assert open_source(place, "test", class_names=["the", NFD]).labels().tolist() == [1] * 3 + [0] * 3


def test_order_and_fingerprint_do_not_depend_on_the_unicode_form(build):
    sources = [
        open_source(build(images(f"train/{name}", "train/cafz") | {f"train/cafz/{name}.jpg": JPEG}, form), "train")
        for name, form in ((NFC, "composed"), (NFD, "decomposed"))
    ]
    assert sources[0].class_names == sources[1].class_names == ["cafz", NFC]
    assert sources[0].fingerprint() == sources[1].fingerprint()


def test_two_folders_of_one_class_are_refused(build):
    place = build(images(NFC, NFD, "dog"))
    with pytest.raises(UserError, match=r"two folders of the class 'café'.*Unicode form"):
        open_source(place, "all")


def test_names_that_are_not_text_are_escaped(tmp_path):
    for name, shown in ((b"d\xf6g", r"d\xf6g"), (b"a\nb", r"a\nb"), ("größe".encode(), "größe")):
        folder = os.path.join(os.fsencode(tmp_path), b"p\xe9ts", name)
        os.makedirs(folder)
        for file in (b"caf\xe9.jpg", b"1.jpg"):
            pathlib.Path(os.fsdecode(os.path.join(folder, file))).write_bytes(JPEG)
        source = open_source(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"p\xe9ts")), "all")
        assert shown in source.class_names
    assert [source[i]["image"] for i in range(6)] == [JPEG] * 6
    assert {source[i]["file_name"] for i in range(6)} == {r"caf\xe9.jpg", "1.jpg"}
    assert len(source.fingerprint()) == 16
    text = "\n".join([source.name, *source.class_names, *map(source.where, range(6))])
    assert text.encode() and rf"{tmp_path}/p\xe9ts/d\xf6g/caf\xe9.jpg" in text


def zip_of(path, files, compression=zipfile.ZIP_STORED, system=0):
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for place, content in files.items():
            info = zipfile.ZipInfo(place)
            info.filename, info.create_system, info.compress_type = place, system, compression
            archive.writestr(info, content)
    return str(path)


@pytest.mark.parametrize("system", [0, 3])
def test_backslashes_of_windows_zips_are_slashes(tmp_path, system):
    files = {name.replace("/", "\\"): content for name, content in images("train/cat", "train/dog").items()}
    place = zip_of(tmp_path / "win.zip", files | {"train\\": b"", "train\\cat\\": b""}, system=system)
    source = open_source(place, "train")
    assert (source.class_names, len(source)) == (["cat", "dog"], 6)
    assert source[5]["image"] == JPEG
    assert source.where(0) == f"'train/cat/0.jpg' in {place}"


@pytest.mark.parametrize("name", ["../../etc/cat/0.jpg", "/cat/0.jpg", "..\\cat\\0.jpg", "C:\\pets\\cat\\0.jpg"])
def test_paths_out_of_a_zip_are_refused(tmp_path, name):
    place = zip_of(tmp_path / "a.zip", {"cat/1.jpg": JPEG, name: JPEG})
    with pytest.raises(UserError, match="would leave the folder"):
        open_source(place, "all")


def test_folders_without_end_in_a_zip_take_little_memory(tmp_path):
    place = zip_of(tmp_path / "a.zip", images("cat", "dog") | {"x/" * 30_000 + "0.jpg": JPEG})
    assert len(trees.ZipTree(pathlib.Path(place))._folders) < 20


def changed_size(place, size):
    """Writes another uncompressed size into the table of contents of a zip file."""
    content = bytearray(pathlib.Path(place).read_bytes())
    at = content.index(b"PK\1\2") + 24
    content[at : at + 4] = size.to_bytes(4, "little")
    pathlib.Path(place).write_bytes(content)


def test_a_member_that_inflates_without_end_is_stopped_at_the_size_it_claims(tmp_path, monkeypatch):
    bomb = {"cat/0.jpg": bytes(20 * 2**20)}
    place = zip_of(tmp_path / "a.zip", bomb, zipfile.ZIP_DEFLATED)
    changed_size(place, 1000)
    asked = []
    real = trees.zlib.decompressobj

    class Watched:
        def __init__(self, *arguments):
            self._real = real(*arguments)

        def decompress(self, content, most):
            asked.append(len(result := self._real.decompress(content, most)))
            return result

    monkeypatch.setattr(trees.zlib, "decompressobj", Watched)
    with pytest.raises(BadRecordError, match="does not have the 1,000 bytes"):
        open_source(place, "all")[0]
    assert max(asked) == 1001


@pytest.mark.parametrize("size", [2**28 + 1, 2**31, 2**32 - 2])
def test_a_member_that_claims_to_be_larger_than_any_image_is_refused(tmp_path, size):
    place = zip_of(tmp_path / "a.zip", images("cat", count=1), zipfile.ZIP_DEFLATED)
    changed_size(place, size)
    with pytest.raises(UserError, match=r"'cat/0.jpg' in .* says that it has [\d,]+ bytes"):
        open_source(place, "all")


def test_any_damage_of_the_table_of_contents_is_one_message(tmp_path):
    place = tmp_path / "a.zip"
    whole = pathlib.Path(zip_of(place, images("cat", "dog"))).read_bytes()
    start, rng = whole.index(b"PK\1\2"), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for at in rng.integers(start, len(whole), rng.integers(1, 4)):
            damaged[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        place.write_bytes(damaged)
        try:
            source = open_source(str(place), "all")
            [source[i] for i in range(len(source))]
        except UserError:
            refused += 1
    assert refused > 20


def special(path, kind):
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(os.path.relpath(path))


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket"])
def test_what_is_not_a_regular_file_is_never_opened(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, images("a/cat", "a/dog"))
    special(tmp_path / "it", kind)
    with pytest.raises(UserError, match=rf"cannot read .*/it as a folder or zip file .*it is a {kind}"):
        open_source(str(tmp_path / "it"), "all")
    with pytest.raises(UserError, match=rf"it is a {kind}"):
        list_splits(tmp_path / "it")
    special(tmp_path / "a" / "beside.jpg", kind)
    source = open_source(str(tmp_path / "a"), "all")
    special(tmp_path / "a" / "cat" / "0a.jpg", kind)
    with pytest.raises(UserError, match=r"not images: 'cat/0a.jpg'"):
        open_source(str(tmp_path / "a"), "all")
    (tmp_path / "a" / "cat" / "1.jpg").unlink()
    special(tmp_path / "a" / "cat" / "1.jpg", kind)  # after it was listed
    with pytest.raises(BadRecordError, match=rf"cat/1.jpg: it is a {kind}"):
        source[1]


def test_links_are_followed_and_loops_of_them_end(tmp_path):
    write_files(tmp_path, images("a/train/cat", "a/train/dog"))
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "b").symlink_to(tmp_path / "a" / "c")
    (tmp_path / "a" / "c").symlink_to(tmp_path / "a" / "b")
    (tmp_path / "around").mkdir()
    (tmp_path / "around" / "loop").symlink_to(tmp_path / "around")
    (tmp_path / "a" / "train" / "cat" / "9.jpg").symlink_to("9.jpg")
    (tmp_path / "a" / "train" / "cat" / "8.jpg").symlink_to("0.jpg")
    source = open_source(str(tmp_path / "a"), "train")
    assert len(source) == 8
    assert source[3]["image"] == JPEG
    with pytest.raises(BadRecordError, match=r"cat/9.jpg: .*symbolic links"):
        source[4]
    with pytest.raises(UserError, match="has no images"):
        list_splits(tmp_path / "around")


def test_a_file_larger_than_any_image_is_not_read(tmp_path):
    write_files(tmp_path, images("cat", "dog", count=1))
    os.truncate(tmp_path / "cat" / "0.jpg", 2**40)  # with a hole, which takes no disk
    with pytest.raises(BadRecordError, match="1,099,511,627,776 bytes, and at most 268,435,456"):
        open_source(str(tmp_path), "all")[0]


def test_the_folder_is_listed_in_any_order(tmp_path, monkeypatch):
    files = images("train/cat", "train/dog", "test/cat", "Extra") | {"train/a.txt": b"", "train/cat/desktop.ini": b""}
    write_files(tmp_path, files)
    found, listed = set(), trees.FolderTree.entries
    for seed in range(6):

        def shuffled(self, place, seed=seed):
            entries = list(listed(self, place))
            random.Random(seed).shuffle(entries)
            return iter(entries)

        monkeypatch.setattr(trees.FolderTree, "entries", shuffled)
        source = ImageFolderSource(tmp_path, "train")
        found.add((source.fingerprint(), *source.splits, *list_splits(tmp_path)))
    assert len(found) == 1
