"""Files of examples by patterns: which files, which features, which classes."""

import os

import pytest

from tests.data.record_files import WRITERS, numbers_of, serialized, write_shards, write_tfrecord
from vit_jax.data.sources import NO_LABEL, find_path, open_source
from vit_jax.data.sources.shards import find_shards
from vit_jax.errors import UserError


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("VIT_JAX_DATA", raising=False)


# ---- Which files.


def test_files_without_a_telling_name_are_known_by_their_content(tmp_path):
    for file_format, write in WRITERS.items():
        path = write(tmp_path / f"{file_format[0]}-data", [serialized(image=b"image 7", label=[1])])
        assert numbers_of(open_source(str(path), "all")) == [7]
    (tmp_path / "b-data").write_bytes(b"something else")
    with pytest.raises(UserError, match="b-data is neither a tfrecord nor an array_record file"):
        open_source(f"{tmp_path}/b-dat?", "all")


def test_several_patterns_have_commas_between_them(tmp_path, monkeypatch):
    write_shards(tmp_path / "a", counts=[2, 1])
    write_shards(tmp_path / "b", counts=[1])
    assert len(open_source(f"{tmp_path}/b/web*, {tmp_path}/a/web*", "all")) == 4
    monkeypatch.chdir(tmp_path / "a")
    names = [path.name for path in (tmp_path / "a").glob("web*")]
    assert len(open_source(",".join(names * 20), "all")) == 3  # longer than the name of a file can be


def test_a_comma_may_belong_to_the_folder(tmp_path):
    for name in ("cats, dogs", "b"):
        write_tfrecord(tmp_path / name / "x.tfrecord", [serialized(image=b"a", label=[0])])
    assert len(open_source(f"{tmp_path}/cats, dogs/*.tfrecord", "all")) == 1
    assert len(open_source(f"{tmp_path}/b/*.tfrecord,{tmp_path}/*dogs/*", "all")) == 2


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


def test_pattern_does_not_match_the_indices(tmp_path):
    open_source(write_shards(tmp_path / "data"), "all")
    assert len(list((tmp_path / "data").iterdir())) == 4
    assert len(find_shards(f"{tmp_path}/data/*")) == 2


def test_missing_shard_is_named_unless_the_pattern_chooses(tmp_path):
    pattern = write_shards(tmp_path / "data", counts=[1] * 4)
    (tmp_path / "data" / "web.tfrecord-00002-of-00004").unlink()
    with pytest.raises(UserError, match=r"1 of 4 files are missing; .*web.tfrecord-00002-of-00004"):
        open_source(pattern, "all")
    assert len(open_source(f"{tmp_path}/data/web*-0000[01]-of-00004", "all")) == 2


def test_mixed_formats_are_refused(tmp_path):
    write_shards(tmp_path / "data", counts=[1])
    write_shards(tmp_path / "data", counts=[1], file_format="array_record")
    with pytest.raises(UserError, match="tfrecord and array_record mixed"):
        open_source(f"{tmp_path}/data/web*", "all")


def test_split_that_files_do_not_have_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"unknown split of .* 'train'. Did you mean 'all'"):
        open_source(write_shards(tmp_path), "train")


def test_folder_of_files_without_description_says_what_to_write(tmp_path):
    write_shards(tmp_path / "data")
    with pytest.raises(UserError, match=r"no dataset_info.json.*--config.data.dataset='.*/data/\*tfrecord\*'"):
        open_source(str(tmp_path / "data"), "all")


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_what_is_not_a_regular_file_is_not_opened(tmp_path, kind):
    def make(name):
        path = tmp_path / name
        os.mkfifo(path) if kind == "FIFO" else path.symlink_to("/dev/zero")
        return path

    for name in ("x.tfrecord", "x.array_record"):
        path = make(name)
        with pytest.raises(UserError, match=f"it is a {kind}"):
            open_source(str(path), "all")
        with pytest.raises(UserError, match="not found"):
            open_source(f"{tmp_path}/{name[:4]}*", "all")
        path.unlink()
    write_tfrecord(tmp_path / "y.tfrecord", [serialized(image=b"a", label=[0])])
    for name in ("classes.txt", "manifest.json"):
        path = make(name)
        with pytest.raises(UserError, match=f"cannot read .*{name}: it is"):
            open_source(str(tmp_path / "y.tfrecord"), "all")
        path.unlink()


# ---- Features and classes.


@pytest.fixture
def write(tmp_path):
    """Writes one example; returns its file."""
    return lambda **features: str(write_tfrecord(tmp_path / "x.tfrecord", [serialized(**features)]))


def test_features_are_found_by_usual_names(write):
    source = open_source(write(jpg=b"image 4", image__class__label=[2], __key__=b"0004"), "all")
    assert (source[0]["image"], source[0]["label"], source.num_classes) == (b"image 4", 2, None)


def test_features_are_found_by_given_names(write):
    path = write(image=b"other", label=[9], picture=b"image 4", topic=[2])
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
def test_unknown_feature_is_refused_with_the_nearest(write, keys, message):
    with pytest.raises(UserError, match=message):
        open_source(write(picture=b"image 4", topic=[2]), "all", **keys)


def test_data_without_labels_are_opened_with_a_warning(write, caplog):
    assert open_source(write(image=b"image 4", topic=[2]), "all")[0]["label"] == NO_LABEL
    assert "found no labels" in caplog.text
    assert "topic" in caplog.text


def test_records_that_are_not_examples_are_refused(tmp_path):
    path = write_tfrecord(tmp_path / "x.tfrecord", [b"\xff\xff\xff"])
    with pytest.raises(UserError, match=r"record 0 .*x.tfrecord as tf.train.Example"):
        open_source(str(path), "all")


def test_first_records_may_be_damaged_or_unlabelled(tmp_path):
    records = [b"\xff\xff\xff", serialized(image=b"image 1"), serialized(image=b"image 2", label=[2])]
    source = open_source(str(write_tfrecord(tmp_path / "x.tfrecord", records)), "all")
    assert [source[i]["label"] for i in (1, 2)] == [NO_LABEL, 2]


def test_classes_txt_names_the_classes(write, tmp_path):
    path = write(image=b"image 0", label=[1])
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    source = open_source(path, "all")
    assert (source.class_names, source.num_classes) == (["ant", "bee"], 2)
    with pytest.raises(UserError, match=r"has 2 classes, more than 1"):
        open_source(path, "all", num_classes=1)
    (tmp_path / "classes.txt").write_text("ant\n\nbee\n")
    with pytest.raises(UserError, match=r"classes.txt has an empty line"):
        open_source(path, "all")


def test_manifest_beside_the_files_has_the_number_of_labels(write, tmp_path):
    path = write(image=b"image 0", label=[1, 2])
    (tmp_path / "manifest.json").write_text('{"max_labels": 4}')
    assert open_source(path, "all").max_labels == 4
    assert open_source(path, "all", max_labels=2).max_labels == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"max_labels": "4"}', '{"max_labels": 0}'])
def test_damaged_manifest_is_named(write, tmp_path, content):
    path = write(image=b"image 0", label=[1])
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json"):
        open_source(path, "all")
