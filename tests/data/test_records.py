import concurrent.futures
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import google_crc32c
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from tests.conftest import ROOT
from vit_jax.data.sources import NO_LABEL, BadRecordError, find_path, open_source
from vit_jax.data.sources.records import ArrayRecordFiles, TFRecordFiles, find_shards, tfrecord_index
from vit_jax.errors import UserError

GOLDEN = ROOT / "tests" / "golden" / "records"


def serialized(**features):
    example = tf_example_pb2.Example()
    for name, value in features.items():
        feature = example.features.feature[name.replace("__", "/")]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.extend(value)
    return example.SerializeToString()


def masked_crc(content):
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(record):
    length = struct.pack("<Q", len(record))
    return length + masked_crc(length) + record + masked_crc(record)


def write_tfrecord(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(framed, records)))
    return path


def write_array_record(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


WRITERS = {"tfrecord": write_tfrecord, "array_record": write_array_record}


def write_shards(folder, counts=(3, 2), file_format="tfrecord"):
    numbers = itertools.count()
    for shard, count in enumerate(counts):
        records = [
            serialized(image=b"image %d" % i, label=[i], file_name=b"%d.jpg" % i)
            for i in itertools.islice(numbers, count)
        ]
        WRITERS[file_format](folder / f"web.{file_format}-{shard:05d}-of-{len(counts):05d}", records)
    return f"{folder}/web*"


def numbers_of(source):
    return [int(source[i]["image"].removeprefix(b"image ")) for i in range(len(source))]


def index_of(path):
    return path.with_name(f".{path.name}.index")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VIT_JAX_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def shard(tmp_path):
    return write_tfrecord(
        tmp_path / "data" / "x.tfrecord", [serialized(image=b"image %d" % i, label=[i]) for i in range(5)]
    )


@pytest.fixture(params=["tfrecord", "array_record"])
def pattern(tmp_path, request):
    return write_shards(tmp_path / "data", file_format=request.param)


# ---- Reading.


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


def test_slices_of_shards_are_taken(pattern):
    assert numbers_of(open_source(pattern, "all[1:4]")) == [1, 2, 3]
    assert numbers_of(open_source(pattern, "all[:50%]")) == [0, 1]  # 2.5 rounds to the even number, as in TFDS
    assert numbers_of(open_source(pattern, "all[-1:]+all[:1shard]")) == [4, 0, 1, 2]


def test_source_ends_where_its_examples_do(pattern):
    source = open_source(pattern, "all[1:4]")
    with pytest.raises(IndexError):
        source[3]
    assert source[-1]["image"] == b"image 3"


def test_place_of_an_example_is_file_and_record(pattern):
    source = open_source(pattern, "all[1:]")
    assert source.where(2).startswith("record 0 ")
    assert "-00001-of-00002" in source.where(2)


def test_place_in_a_tfrecord_has_the_offset(shard):
    source = open_source(str(shard), "all")
    assert source.where(1) == f"record 1 (byte {len(framed(serialized(image=b'image 0', label=[0])))}) of {shard}"


def test_fingerprint_changes_with_files_and_slices_but_not_with_the_folder(tmp_path, pattern):
    before = open_source(pattern, "all").fingerprint()
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    assert open_source(f"{tmp_path}/moved/web*", "all").fingerprint() == before
    assert open_source(pattern, "all[:4]").fingerprint() != before
    assert open_source(f"{tmp_path}/moved/web*0-of*", "all").fingerprint() != before


def test_many_threads_read_the_same_as_one(pattern):
    source = open_source(pattern, "all")
    expected = [source[i] for i in range(5)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, list(range(5)) * 100)) == expected * 100


def test_pickled_sources_read_the_same_in_a_spawned_process(tmp_path):
    sources = [open_source(write_shards(tmp_path / word, file_format=word), "all") for word in WRITERS]
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for source in sources:
            source[0]  # with its files open
            assert pool.submit(numbers_of, source).result(timeout=60) == [0, 1, 2, 3, 4]


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


def test_more_tfrecord_files_than_may_be_open_are_read(tmp_path):
    pattern = write_shards(tmp_path / "data", counts=[1] * 90)
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); "
        "from vit_jax.data.sources import open_source; "
        f"source = open_source({pattern!r}, 'all'); print(sum(source[i]['label'] for i in range(90)))"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (process.stdout.strip(), process.returncode) == (str(sum(range(90))), 0), process.stderr


def test_more_array_record_files_than_may_be_open_are_refused(tmp_path):
    path = str(write_array_record(tmp_path / "x.array_record", [b"record"]))
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 300)); "
        "from vit_jax.data.sources.records import ArrayRecordFiles\n"
        f"ArrayRecordFiles([{path!r}] * 40, [1] * 40); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        f"ArrayRecordFiles([{path!r}] * 90, [1] * 90)"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.stdout.strip() == "296"
    assert "90 array_record files are read at once, but this system allows only 300 open files" in process.stderr


# ---- Which files.


def test_files_without_a_telling_name_are_known_by_their_content(tmp_path):
    for file_format, write in WRITERS.items():
        path = write(tmp_path / f"{file_format[0]}-data", [serialized(image=b"image 7", label=[1])])
        assert numbers_of(open_source(str(path), "all")) == [7]


def test_several_patterns_have_commas_between_them(tmp_path):
    write_shards(tmp_path / "a", counts=[2])
    write_shards(tmp_path / "b", counts=[1])
    assert len(open_source(f"{tmp_path}/b/web*, {tmp_path}/a/web*", "all")) == 3


def test_list_of_files_may_be_longer_than_a_name_can_be(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", counts=[2, 1])
    monkeypatch.chdir(tmp_path / "data")
    names = [path.name for path in (tmp_path / "data").glob("web*")]
    assert len(open_source(",".join(names * 20), "all")) == 3


def test_one_of_several_patterns_that_matches_nothing_is_named(tmp_path):
    (tmp_path / "a.tfrecord").touch()
    with pytest.raises(UserError, match=r"no file matches '\S*b\*' of"):
        find_shards(f"{tmp_path}/a*,{tmp_path}/b*")
    assert find_shards(f"{tmp_path}/c*,{tmp_path}/b*") == []


def test_relative_pattern_is_looked_for_in_the_data_folder(tmp_path, monkeypatch):
    write_shards(tmp_path / "data")
    monkeypatch.setenv("VIT_JAX_DATA", str(tmp_path))
    assert len(open_source("data/web*", "all")) == 5
    assert find_path("data/web*") == tmp_path / "data" / "web.tfrecord-00000-of-00002"
    assert find_path("data/nothing*") is None


def test_pattern_does_not_find_the_indices(tmp_path):
    pattern = write_shards(tmp_path / "data")
    open_source(pattern, "all")
    assert index_of(tmp_path / "data" / "web.tfrecord-00000-of-00002").exists()
    assert len(find_shards(f"{tmp_path}/data/*")) == 2


def test_missing_shard_is_named(tmp_path):
    pattern = write_shards(tmp_path / "data", counts=[1] * 4)
    (tmp_path / "data" / "web.tfrecord-00002-of-00004").unlink()
    with pytest.raises(UserError, match=r"1 of 4 files are missing, .*web.tfrecord-00002-of-00004"):
        open_source(pattern, "all")


def test_shards_that_were_chosen_need_not_be_all(tmp_path):
    write_shards(tmp_path / "data", counts=[1] * 4)
    (tmp_path / "data" / "web.tfrecord-00002-of-00004").unlink()
    assert len(open_source(f"{tmp_path}/data/web*-0000[01]-of-00004", "all")) == 2


def test_formats_mixed_are_refused(tmp_path):
    write_shards(tmp_path / "data", counts=[1])
    write_shards(tmp_path / "data", counts=[1], file_format="array_record")
    with pytest.raises(UserError, match="tfrecord and array_record mixed"):
        open_source(f"{tmp_path}/data/web*", "all")


def test_split_that_files_do_not_have_is_refused(pattern):
    with pytest.raises(UserError, match=r"unknown split of .* 'train'. Did you mean 'all'"):
        open_source(pattern, "train")


def test_folder_of_files_without_description_says_what_to_write(tmp_path):
    write_shards(tmp_path / "data")
    with pytest.raises(UserError, match=r"no dataset_info.json.*--config.data.dataset='.*/data/\*tfrecord\*'"):
        open_source(str(tmp_path / "data"), "all")


# ---- Features and labels.


def write_labels(tmp_path, *labels):
    records = [serialized(image=b"image 0", **({} if ids is None else {"label": ids})) for ids in labels]
    return str(write_tfrecord(tmp_path / "data" / "x.tfrecord", records))


def labels_of(source):
    return [source[i]["label"] for i in range(len(source))]


def test_single_labels_are_numbers_and_missing_ones_no_label(tmp_path):
    path = write_labels(tmp_path, [3], [], None, [-1])
    assert labels_of(open_source(path, "all")) == [3, NO_LABEL, NO_LABEL, NO_LABEL]


def test_several_labels_are_lists_without_repetition_and_missing_ones_empty(tmp_path):
    path = write_labels(tmp_path, [3, 1, 3], [2], [], None)
    source = open_source(path, "all", max_labels=2)
    assert labels_of(source) == [[3, 1], [2], [], []]
    assert source.max_labels == 2


def test_more_labels_than_expected_say_what_to_set(tmp_path):
    source = open_source(write_labels(tmp_path, [1], [1, 2, 3]), "all")
    with pytest.raises(UserError, match=r"record 1 .* has 3 labels, but data.max_labels is 1") as error:
        source[1]
    assert not isinstance(error.value, BadRecordError)


def test_manifest_beside_the_files_says_how_many_labels_there_are(tmp_path):
    path = write_labels(tmp_path, [1, 2])
    (tmp_path / "data" / "manifest.json").write_text('{"max_labels": 4}')
    assert open_source(path, "all").max_labels == 4
    assert open_source(path, "all", max_labels=2).max_labels == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"max_labels": "4"}', '{"max_labels": 0}'])
def test_manifest_that_cannot_be_understood_is_named(tmp_path, content):
    path = write_labels(tmp_path, [1])
    (tmp_path / "data" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json"):
        open_source(path, "all")


@pytest.mark.parametrize("label", [2, -2])
def test_label_that_is_no_class_is_refused(tmp_path, label):
    source = open_source(write_labels(tmp_path, [1], [label]), "all", num_classes=2)
    with pytest.raises(UserError, match=rf"record 1 .* has label {label}, but labels of 2 classes count from 0"):
        source[1]


def test_classes_txt_names_the_classes(tmp_path):
    path = write_labels(tmp_path, [1])
    (tmp_path / "data" / "classes.txt").write_text("ant\nbee\n")
    source = open_source(path, "all")
    assert (source.class_names, source.num_classes) == (["ant", "bee"], 2)
    with pytest.raises(UserError, match=r"classes.txt names 2 classes, more than 1"):
        open_source(path, "all", num_classes=1)


def test_number_of_classes_may_be_unknown(tmp_path):
    assert open_source(write_labels(tmp_path, [1]), "all").num_classes is None


def test_features_are_found_by_usual_names(tmp_path):
    record = serialized(jpg=b"image 4", image__class__label=[2], __key__=b"0004")
    source = open_source(str(write_tfrecord(tmp_path / "x.tfrecord", [record])), "all")
    assert source[0]["image"] == b"image 4"
    assert source[0]["label"] == 2


def test_features_are_found_by_given_names(tmp_path):
    record = serialized(image=b"other", label=[9], picture=b"image 4", topic=[2])
    path = str(write_tfrecord(tmp_path / "x.tfrecord", [record]))
    example = open_source(path, "all", image_key="picture", label_key="topic")[0]
    assert (example["image"], example["label"]) == (b"image 4", 2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_key": "pictrue"}, r"data.image_key\) of .* 'pictrue'. Did you mean 'picture'"),
        ({"image_key": "topic"}, r"Known: picture"),
        ({"image_key": "picture", "label_key": "topics"}, r"data.label_key\) of .* 'topics'. Did you mean 'topic'"),
        ({"image_key": "picture", "label_key": "picture"}, r"Known: topic"),
        ({}, r"data.image_key\) of .* 'image'. Did you mean 'picture'"),
    ],
)
def test_unknown_feature_is_refused_with_the_nearest(tmp_path, keys, message):
    path = write_tfrecord(tmp_path / "x.tfrecord", [serialized(picture=b"image 4", topic=[2])])
    with pytest.raises(UserError, match=message):
        open_source(str(path), "all", **keys)


def test_data_without_labels_are_opened_with_a_warning(tmp_path, caplog):
    path = write_tfrecord(tmp_path / "x.tfrecord", [serialized(image=b"image 4", topic=[2])])
    assert open_source(str(path), "all")[0]["label"] == NO_LABEL
    assert "no labels found" in caplog.text
    assert "topic" in caplog.text


def test_records_that_are_no_examples_are_refused(tmp_path):
    path = write_tfrecord(tmp_path / "x.tfrecord", [b"\xff\xff\xff"])
    with pytest.raises(UserError, match=r"record 0 .*x.tfrecord as tf.train.Example"):
        open_source(str(path), "all")


def test_example_without_image_is_named_when_it_is_read(tmp_path):
    records = [serialized(image=b"image 0", label=[1]), serialized(label=[1])]
    source = open_source(str(write_tfrecord(tmp_path / "x.tfrecord", records)), "all")
    with pytest.raises(BadRecordError, match=r"cannot read record 1 .*no bytes under 'image', but label"):
        source[1]


# ---- The index of tfrecord files.


def test_index_has_the_offsets_of_all_records(shard):
    sizes = [len(framed(serialized(image=b"image %d" % i, label=[i]))) for i in range(5)]
    np.testing.assert_array_equal(tfrecord_index(str(shard)), np.cumsum([0, *sizes]))


def test_index_is_kept_beside_the_file_and_used_again(shard):
    tfrecord_index(str(shard))
    times = shard.stat()
    shard.write_bytes(b"x" * times.st_size)  # could not be indexed again
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(tfrecord_index(str(shard))) == 6


def test_index_goes_to_the_cache_where_it_cannot_lie_beside_the_file(shard, cache):
    index_of(shard).mkdir()
    assert len(tfrecord_index(str(shard))) == 6
    assert [path.name.split("-")[0] for path in (cache / "indices").iterdir()] == ["x.tfrecord"]
    times = shard.stat()
    shard.write_bytes(b"x" * times.st_size)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(tfrecord_index(str(shard))) == 6


def test_files_of_the_same_name_have_indices_of_their_own_in_the_cache(tmp_path):
    for folder, count in (("a", 2), ("b", 3)):
        shard = write_tfrecord(tmp_path / folder / "x.tfrecord", [b"record"] * count)
        index_of(shard).mkdir()
    assert [len(tfrecord_index(str(tmp_path / folder / "x.tfrecord"))) for folder in ("a", "b", "a")] == [3, 4, 3]


def test_file_is_read_where_no_index_can_be_kept(shard, cache, caplog):
    index_of(shard).mkdir()
    cache.write_text("a file where the folder should be")
    assert len(tfrecord_index(str(shard))) == 6
    assert "the index could not be kept" in caplog.text


def test_changed_file_is_indexed_again(shard):
    tfrecord_index(str(shard))
    with shard.open("ab") as file:
        file.write(framed(b"one more"))
    assert len(tfrecord_index(str(shard))) == 7


def test_rewritten_file_of_the_same_size_is_indexed_again(tmp_path):
    shard = write_tfrecord(tmp_path / "x.tfrecord", [b"12345678", b"1"])
    tfrecord_index(str(shard))
    write_tfrecord(shard, [b"1", b"12345678"])
    os.utime(shard, ns=(1, 1))
    assert tfrecord_index(str(shard)).tolist() == [0, 17, 41]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other", "pickle", "claim", "FIFO"])
def test_damaged_index_is_made_anew(shard, damage):
    expected = tfrecord_index(str(shard)).tolist()
    index = index_of(shard)
    content = bytearray(index.read_bytes())
    if damage == "flip":
        content[-9] ^= 4
        index.write_bytes(content)
    elif damage == "pickle":
        with index.open("wb") as file:
            np.save(file, np.array([{"a": 1}] * 8, object), allow_pickle=True)
    elif damage == "claim":  # 8 TB
        header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
        index.write_bytes(b"\x93NUMPY\1\0\x76\0" + header + content[128:])
    elif damage == "FIFO":
        index.unlink()
        os.mkfifo(index)
    else:
        index.write_bytes({"truncate": content[:-8], "empty": b"", "other": b"something else"}[damage])
    assert tfrecord_index(str(shard)).tolist() == expected
    assert np.load(index)[4:].tolist() == expected


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_record_files_that_are_no_regular_files_are_not_opened(tmp_path, kind):
    for name in ("x.tfrecord", "x.array_record"):
        path = tmp_path / name
        os.mkfifo(path) if kind == "FIFO" else path.symlink_to("/dev/zero")
        with pytest.raises(UserError, match=f"it is a {kind}"):
            open_source(str(path), "all")
        with pytest.raises(UserError, match="not found"):
            open_source(f"{tmp_path}/{name[:4]}*", "all")
        path.unlink()
    write_tfrecord(tmp_path / "y.tfrecord", [serialized(image=b"a", label=[0])])
    for name in ("classes.txt", "manifest.json"):
        os.mkfifo(tmp_path / name) if kind == "FIFO" else (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(UserError, match=f"cannot read .*{name}: it is"):
            open_source(str(tmp_path / "y.tfrecord"), "all")
        (tmp_path / name).unlink()


def test_a_record_of_a_terabyte_is_not_read(tmp_path):
    path = write_tfrecord(tmp_path / "x.tfrecord", [serialized(image=b"a", label=[0])])
    length = struct.pack("<Q", 2**40)
    with path.open("ab") as file:
        file.write(length + masked_crc(length))
        file.truncate(file.tell() + 2**40 + 4)  # a hole, which takes no disk
    source = open_source(str(path), "all")
    assert source[0]["image"] == b"a"
    with pytest.raises(BadRecordError, match="1,099,511,627,776 bytes, more than"):
        source[1]


def test_a_comma_may_belong_to_the_folder(tmp_path):
    for name in ("cats, dogs", "b"):
        write_tfrecord(tmp_path / name / "x.tfrecord", [serialized(image=b"a", label=[0])])
    assert len(open_source(f"{tmp_path}/cats, dogs/*.tfrecord", "all")) == 1
    assert len(open_source(f"{tmp_path}/b/*.tfrecord,{tmp_path}/*dogs/*", "all")) == 2


def test_nothing_but_the_index_is_left_beside_the_file(shard):
    tfrecord_index(str(shard))
    assert sorted(path.name for path in shard.parent.iterdir()) == [".x.tfrecord.index", "x.tfrecord"]


# ---- Damage.


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_truncated_tfrecord_is_refused_with_the_place(shard, cut):
    begin = int(tfrecord_index(str(shard))[4])
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(UserError, match=rf"x.tfrecord is truncated: it ends within record 4, .* at byte {begin}"):
        open_source(str(shard), "all")


def test_damaged_length_is_refused_with_the_place(shard):
    begin = int(tfrecord_index(str(shard))[2])
    content = bytearray(shard.read_bytes())
    content[begin + 1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(1, 1))
    with pytest.raises(UserError, match=rf"x.tfrecord is damaged at byte {begin}, where record 2 should begin"):
        open_source(str(shard), "all")


def damage_record(path, record_bytes):
    content = bytearray(path.read_bytes())
    content[content.index(record_bytes)] ^= 1
    path.write_bytes(content)


def test_damaged_record_is_named_when_it_is_read_and_others_are_read(tmp_path):
    for file_format, write in WRITERS.items():
        images = [b"image %d " % i + os.urandom(200) for i in range(5)]
        path = write(tmp_path / f"x.{file_format}", [serialized(image=image, label=[0]) for image in images])
        damage_record(path, images[3][10:60])
        source = open_source(str(path), "all")
        with pytest.raises(BadRecordError, match=rf"cannot read record 3 .*of .*x.{file_format}: "):
            source[3]
        assert [source[i]["image"] for i in (0, 1, 2, 4)] == [images[i] for i in (0, 1, 2, 4)]


def test_file_that_shrinks_while_it_is_read_is_named(shard):
    source = open_source(str(shard), "all")
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(BadRecordError, match=r"cannot read record 4 .*the file ends at byte"):
        source[4]


def test_compressed_tfrecord_is_refused(shard):
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(UserError, match="is compressed"):
        open_source(str(shard), "all")


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
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


@pytest.mark.parametrize("files", [TFRecordFiles, ArrayRecordFiles])
def test_missing_file_is_named(tmp_path, files):
    with pytest.raises(UserError, match=r"cannot read .*nowhere: No such file"):
        files([str(pathlib.Path(tmp_path, "nowhere"))])
