"""Examples in files of records, of both formats."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import resource
import shutil

import pytest

from tests.data.record_files import (
    GOLDEN,
    WRITERS,
    framed,
    numbers_of,
    serialized,
    write_array_record,
    write_shards,
    write_tfrecord,
)
from vit_jax.data.sources import NO_LABEL, BadRecordError, open_source
from vit_jax.data.sources.base import fingerprint_of
from vit_jax.data.sources.records import FORMATS, ExampleKeys, RecordSource
from vit_jax.errors import UserError


@pytest.fixture(params=FORMATS)
def pattern(tmp_path, request):
    return write_shards(tmp_path / "data", file_format=request.param)


def test_tfrecord_gives_what_tensorflow_wrote_in_the_order_it_reads_it(tmp_path):
    shutil.copytree(GOLDEN / "web", tmp_path / "web")
    source = open_source(f"{tmp_path}/web/web-*", "all", max_labels=3)
    read = [
        {**example, "image": hashlib.sha256(example["image"]).hexdigest()}
        for example in (source[i] for i in range(len(source)))
    ]
    assert read == json.loads((GOLDEN / "expected.json").read_text())["web"]


def test_shards_are_read_one_after_the_other(pattern):
    source = open_source(pattern, "all", num_classes=10)
    assert numbers_of(source) == [0, 1, 2, 3, 4]
    assert source[3] == {"image": b"image 3", "label": 3, "file_name": "3.jpg"}
    assert (source.split, source.splits, source.num_classes, source.max_labels) == ("all", ["all"], 10, 1)


def test_slices_of_shards_are_resolved(pattern):
    source = open_source(pattern, "all[1:4]")
    assert numbers_of(source) == [1, 2, 3]
    assert source[-1]["image"] == b"image 3"
    with pytest.raises(IndexError):
        source[3]
    assert numbers_of(open_source(pattern, "all[:50%]")) == [0, 1]  # 2.5 rounds to the even number, as in TFDS
    assert numbers_of(open_source(pattern, "all[-1:]+all[:1shard]")) == [4, 0, 1, 2]


def test_place_of_an_example_is_record_and_file_with_the_offset_of_tfrecord(tmp_path, pattern):
    where = open_source(pattern, "all[1:]").where(2)
    assert where.startswith("record 0 ")
    assert "-00001-of-00002" in where
    records = [serialized(image=b"image 0", label=[0]), serialized(image=b"image 1", label=[0])]
    path = write_tfrecord(tmp_path / "x.tfrecord", records)
    assert open_source(str(path), "all").where(1) == f"record 1 (byte {len(framed(records[0]))}) of {path}"


def test_fingerprint_changes_with_files_and_slices_but_not_with_the_folder(tmp_path, pattern):
    before = open_source(pattern, "all").fingerprint()
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    assert open_source(f"{tmp_path}/moved/web*", "all").fingerprint() == before
    slices = ("all", "all[:4]", "all[1:]", "all[:2]+all[2:]", "all[2:]+all[:2]")
    assert len({open_source(pattern, split).fingerprint() for split in slices}) == len(slices)
    assert open_source(f"{tmp_path}/moved/web*0-of*", "all").fingerprint() != before


@pytest.mark.parametrize(
    ("file_format", "expected"), [("tfrecord", "bf15db9619da6713"), ("array_record", "3170c9dddd2a25ef")]
)
def test_fingerprint_matches_earlier_versions(tmp_path, file_format, expected):
    # Runs compare it with the one in their checkpoints.
    pattern = write_shards(tmp_path, (7, 5), file_format)
    assert open_source(pattern, "all[2:9]").fingerprint() == expected


def first_label(features):
    return features["label"][0]


def test_fingerprint_has_the_name_of_the_rule_that_derives_a_label(tmp_path):
    path = write_tfrecord(tmp_path / "x.tfrecord", [serialized(image=b"image 0", label=[7])])
    source = RecordSource(
        FORMATS["tfrecord"]([str(path)]),
        [(str(path), 0, 1)],
        ExampleKeys("image", first_label, None),
        name="x",
        split="all",
        splits=["all"],
        class_names=None,
        num_classes=10,
        max_labels=1,
    )
    assert source[0]["label"] == 7
    expected = [f"x.tfrecord {path.stat().st_size} [0:1]", "image", None, "first_label", None]
    assert source.fingerprint() == fingerprint_of(expected)  # as in earlier versions


def test_many_threads_read_the_same_as_one(pattern):
    source = open_source(pattern, "all")
    expected = [source[i] for i in range(5)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, list(range(5)) * 100)) == expected * 100


# ---- Processes and their limits.


def _read_in_child(source, queue):
    try:
        queue.put(numbers_of(source))
    except UserError as error:
        queue.put(str(error))


def read_after_fork(source):
    source[0]  # with its files open
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(source, queue))
    child.start()
    child.join(timeout=30)
    assert child.exitcode == 0
    return queue.get()


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_tfrecord_is_read_after_a_fork_and_array_record_says_why_not(tmp_path):
    tfrecord = open_source(write_shards(tmp_path / "tf"), "all")
    array_record = open_source(write_shards(tmp_path / "array", file_format="array_record"), "all")
    assert read_after_fork(tfrecord) == [0, 1, 2, 3, 4]
    assert "forked process. Start worker processes with the method 'spawn'" in read_after_fork(array_record)


def test_limit_of_open_files_is_raised_for_array_record_files_as_far_as_may_be(tmp_path, monkeypatch):
    path, raised = str(write_array_record(tmp_path / "x.array_record", [b"record"])), []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 300))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    FORMATS["array_record"]([path] * 40, [1] * 40)
    assert raised == [(296, 300)]
    with pytest.raises(UserError, match=r"90 array_record files are read at once, but .* only 300 open files"):
        FORMATS["array_record"]([path] * 90, [1] * 90)


# ---- Labels.


@pytest.fixture
def write_labels(tmp_path):
    """Writes an example for each list of labels; None: without the feature. Returns the file."""

    def write(*labels):
        records = [serialized(image=b"image 0", **({} if ids is None else {"label": ids})) for ids in labels]
        return str(write_tfrecord(tmp_path / "x.tfrecord", records))

    return write


def labels_of(source):
    return [source[i]["label"] for i in range(len(source))]


def test_single_labels_are_numbers_and_missing_ones_no_label(write_labels):
    source = open_source(write_labels([3], [], None, [-1]), "all")
    assert labels_of(source) == [3, NO_LABEL, NO_LABEL, NO_LABEL]


def test_several_labels_are_lists_without_repetition_and_missing_ones_empty(write_labels):
    source = open_source(write_labels([3, 1, 3], [2], [], None), "all", max_labels=2)
    assert labels_of(source) == [[3, 1], [2], [], []]
    assert source.max_labels == 2


def test_more_labels_than_expected_say_what_to_set(write_labels):
    source = open_source(write_labels([1], [1, 2, 3]), "all")
    with pytest.raises(UserError, match=r"record 1 .* has 3 labels, but data.max_labels is 1") as error:
        source[1]
    assert not isinstance(error.value, BadRecordError)


@pytest.mark.parametrize("label", [2, -2])
def test_label_that_is_not_a_class_is_refused(write_labels, label):
    source = open_source(write_labels([1], [label]), "all", num_classes=2)
    with pytest.raises(UserError, match=rf"record 1 .* has label {label}, but labels of 2 classes count from 0"):
        source[1]


# ---- Damage.


def test_example_without_image_is_named_when_it_is_read(tmp_path):
    records = [serialized(image=b"image 0", label=[1]), serialized(label=[1])]
    source = open_source(str(write_tfrecord(tmp_path / "x.tfrecord", records)), "all")
    with pytest.raises(BadRecordError, match=r"cannot read record 1 .*no bytes under 'image'; .* label"):
        source[1]


@pytest.mark.parametrize("file_format", FORMATS)
def test_damaged_record_is_named_when_it_is_read_and_others_are_read(tmp_path, file_format):
    images = [b"image %d " % i + os.urandom(200) for i in range(5)]
    records = [serialized(image=image, label=[0]) for image in images]
    path = WRITERS[file_format](tmp_path / f"x.{file_format}", records)
    content = bytearray(path.read_bytes())
    content[content.index(images[3][10:60])] ^= 1
    path.write_bytes(content)
    source = open_source(str(path), "all")
    with pytest.raises(BadRecordError, match=rf"cannot read record 3 .*of .*x.{file_format}: "):
        source[3]
    assert [source[i]["image"] for i in (0, 1, 2, 4)] == [images[i] for i in (0, 1, 2, 4)]


@pytest.mark.parametrize("file_format", FORMATS)
def test_file_that_is_something_else_is_refused(tmp_path, file_format):
    path = tmp_path / f"x.{file_format}"
    path.write_bytes(b"something else " * 10_000)
    with pytest.raises(UserError, match=rf"x.{file_format}.* (is not a|as) {file_format}"):
        open_source(str(path), "all")


def test_truncated_array_record_is_refused(tmp_path):
    path = write_array_record(tmp_path / "x.array_record", [os.urandom(1000)] * 200)
    path.write_bytes(path.read_bytes()[:70_000])
    with pytest.raises(UserError, match=r"cannot read .*x.array_record as array_record"):
        open_source(str(path), "all")


@pytest.mark.parametrize("file_format", FORMATS)
def test_missing_file_is_named(tmp_path, file_format):
    with pytest.raises(UserError, match=r"cannot read .*nowhere: No such file"):
        FORMATS[file_format]([str(tmp_path / "nowhere")])
