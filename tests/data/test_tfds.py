import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds

from tests.conftest import ROOT
from tests.data.record_files import GOLDEN
from vit_jax.data.sources import NO_LABEL, MissingDataError, find_path, open_source
from vit_jax.errors import UserError

EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


class Prepared(tfds.core.GeneratorBasedBuilder):
    """A small data set, prepared without TensorFlow."""

    VERSION = tfds.core.Version("1.2.0")
    FEATURES = {  # noqa: RUF012
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
        "file_name": tfds.features.Text(),
    }

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.FEATURES))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(12)), "test": self._generate_examples(range(12, 15))}

    def _generate_examples(self, numbers):
        for i in numbers:
            image = simplejpeg.encode_jpeg(np.full((8, 8, 3), 10 * i, np.uint8))
            yield i, self._example(i, {"image": image, "label": i % 3, "file_name": f"{i}.jpg"})

    def _example(self, number, example):
        return example


class PreparedWithoutLabels(Prepared):
    """An image and something else."""

    FEATURES = {"picture": tfds.features.Image(), "title": tfds.features.Text()}  # noqa: RUF012

    def _example(self, number, example):
        return {"picture": example["image"], "title": f"image {number}"}


class PreparedWithTwoLabels(Prepared):
    """Two kinds of classes."""

    FEATURES = {  # noqa: RUF012
        "image": tfds.features.Image(),
        "kind": tfds.features.ClassLabel(num_classes=3),
        "place": tfds.features.ClassLabel(names=["here", "there"]),
    }

    def _example(self, number, example):
        return {"image": example["image"], "kind": -1 if number == 3 else number % 3, "place": number % 2}


class PreparedWithManyClasses(Prepared):
    """Any number of a thousand classes."""

    FEATURES = {  # noqa: RUF012
        "image": tfds.features.Image(),
        "labels": tfds.features.Sequence(tfds.features.ClassLabel(num_classes=1000)),
    }

    def _example(self, number, example):
        return {"image": example["image"], "labels": list(range(number))}


BUILDERS = (Prepared, PreparedWithoutLabels, PreparedWithTwoLabels, PreparedWithManyClasses)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of data sets in array_record."""
    folder = tmp_path_factory.mktemp("prepared")
    for builder in BUILDERS:
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def golden(tmp_path, monkeypatch):
    """A folder of data sets that TensorFlow has written as tfrecord."""
    for name in ("golden_animals", "golden_scenes"):
        shutil.copytree(GOLDEN / name, tmp_path / "data" / name)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("VIT_JAX_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "data"


def add_version(golden, version, config="", name="golden_animals"):
    """Another version of the data set, without other content."""
    folder = golden / name / config / version
    shutil.copytree(GOLDEN / "golden_animals" / "1.0.0", folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"version": version, "name": name} | ({"configName": config} if config else {})
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for file in folder.glob("golden_animals-*"):
        file.rename(folder / file.name.replace("golden_animals", name))
    return folder


def described(source):
    return [
        {**example, "image": hashlib.sha256(example["image"]).hexdigest()}
        for example in (source[i] for i in range(len(source)))
    ]


# ---- The same as TensorFlow and TFDS give.


@pytest.mark.parametrize("split", EXPECTED["golden_animals"])
def test_tfrecord_gives_the_examples_of_a_split_in_the_order_of_tensorflow(golden, split):
    assert described(open_source("tfds:golden_animals", split)) == EXPECTED["golden_animals"][split]


def test_several_labels_are_those_that_tensorflow_reads(golden):
    source = open_source("tfds:golden_scenes", "train")
    assert described(source) == EXPECTED["golden_scenes"]["train"]
    assert source.max_labels == 3


@pytest.mark.parametrize("split", ["train", "train[:40%]", "test+train[5:]"])
def test_array_record_gives_what_tfds_data_source_gives(prepared, split):
    source = open_source(str(prepared / "prepared" / "1.2.0"), split)
    theirs = tfds.builder_from_directory(prepared / "prepared" / "1.2.0").as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    assert [source[i] for i in range(len(source))] == [
        {"image": e["image"], "label": int(e["label"]), "file_name": e["file_name"].decode()} for e in theirs
    ]


# ---- What is known of it.


@pytest.mark.parametrize("split", ["train", "train[:10]", "train+test"])
def test_source_knows_its_classes_and_splits(prepared, split):
    source = open_source(str(prepared / "prepared"), split)
    assert (source.name, source.split) == ("tfds:prepared:1.2.0", split)
    assert sorted(source.splits) == ["test", "train"]
    assert (source.class_names, source.num_classes, source.max_labels) == (["ant", "bee", "cat"], 3, 1)


def test_classes_without_names_have_none(prepared):
    source = open_source(str(prepared / "prepared_with_two_labels"), "train", label_key="kind")
    assert (source.class_names, source.num_classes) == (None, 3)


def test_only_image_feature_is_used_and_data_without_classes_have_no_labels(prepared, caplog):
    source = open_source(str(prepared / "prepared_without_labels"), "train")
    assert source[0]["label"] == NO_LABEL
    assert simplejpeg.is_jpeg(source[0]["image"])
    assert "no feature has classes" in caplog.text


def test_most_labels_are_as_given_or_as_the_manifest_says_or_enough_for_most(prepared, tmp_path):
    folder = shutil.copytree(prepared / "prepared_with_many_classes" / "1.2.0", tmp_path / "1.2.0")
    assert open_source(str(folder), "train").max_labels == 32
    (folder / "manifest.json").write_text('{"max_labels": 11, "other": 1}')
    assert open_source(str(folder), "train").max_labels == 11
    assert open_source(str(folder), "train", max_labels=5).max_labels == 5


# ---- Where it is.


def test_data_set_is_found_by_name_config_and_version(golden):
    add_version(golden, "1.10.0")
    add_version(golden, "1.9.0")
    add_version(golden, "2.0.0", config="small", name="other")
    add_version(golden, "2.0.0", config="large", name="other")
    assert open_source("tfds:golden_animals", "train").name == "tfds:golden_animals:1.10.0"
    assert open_source("tfds:golden_animals:1.9.0", "train").name == "tfds:golden_animals:1.9.0"
    assert open_source("tfds:other/small", "train").name == "tfds:other/small:2.0.0"
    assert find_path("tfds:other/large:2.0.0") == golden / "other" / "large" / "2.0.0"


def test_config_must_be_given_if_there_are_several(golden):
    add_version(golden, "2.0.0", config="small", name="other")
    add_version(golden, "2.0.0", config="large", name="other")
    with pytest.raises(UserError, match=r"several configs in .*: large, small. Write tfds:other/<config>"):
        open_source("tfds:other", "train")


@pytest.mark.parametrize("variable", ["TFDS_DATA_DIR", "VIT_JAX_DATA", "HOME"])
def test_data_set_is_found_in_each_of_the_data_folders(golden, tmp_path, monkeypatch, variable):
    monkeypatch.delenv("TFDS_DATA_DIR")
    shutil.move(golden, tmp_path / "new" / "tensorflow_datasets")
    monkeypatch.setenv(variable, str(tmp_path / "new" / ("" if variable == "HOME" else "tensorflow_datasets")))
    assert len(open_source("tfds:golden_animals", "train")) == 20


@pytest.mark.parametrize("below", ["", "golden_animals", "golden_animals/1.0.0"])
def test_data_set_is_found_by_its_folder(golden, below):
    shutil.rmtree(golden / "golden_scenes")
    assert len(open_source(str(golden / below), "train")) == 20


def test_folder_of_several_data_sets_is_refused(golden):
    with pytest.raises(UserError, match=r"has several prepared data sets. Name one of .*golden_animals/1.0.0, "):
        open_source(str(golden), "train")


def test_data_set_that_is_not_prepared_says_how_to_prepare_it_and_what_is(golden):
    with pytest.raises(MissingDataError) as error:
        open_source("tfds:golden_animal", "train")
    assert str(golden) in str(error.value)
    assert str(error.value).endswith("python -m vit_jax.data.prepare tfds golden_animal")
    assert "Did you mean 'tfds:golden_animals'?" in str(error.value)
    with pytest.raises(MissingDataError, match=r"(?s)not prepared in any of (?!.*prepare tfds).*\nAsk the librarian"):
        open_source("tfds:golden_animal", "train", "Ask the librarian.")
    assert find_path("tfds:golden_animal") is None


def test_data_set_that_was_begun_and_not_finished_says_so(golden):
    (golden / "imagenet21k" / "1.0.0.incomplete").mkdir(parents=True)
    with pytest.raises(MissingDataError, match=r"imagenet21k/1.0.0.incomplete is unfinished. Rerun the command"):
        open_source("tfds:imagenet21k", "full")


@pytest.mark.parametrize("name", ["golden_animals:3.0.0", "golden_animals/small", ""])
def test_version_config_or_name_that_is_not_prepared_is_refused(golden, name):
    with pytest.raises(MissingDataError, match=f"tfds:{name} is not prepared"):
        open_source(f"tfds:{name}", "train")


# ---- What may be wrong with it.


def test_unknown_split_is_refused_with_the_nearest(golden):
    for split in ("trian", "trian[:10%]"):
        with pytest.raises(UserError, match=r"split of tfds:golden_animals:1.0.0 'trian'. Did you mean 'train'"):
            open_source("tfds:golden_animals", split)


@pytest.mark.parametrize(
    ("data_set", "keys", "message"),
    [
        ("prepared", {"label_key": "lable"}, r"data.label_key\) of .* 'lable'. Did you mean 'label'"),
        ("prepared", {"label_key": "file_name"}, r"Known: label\."),
        ("prepared", {"image_key": "imege"}, r"data.image_key\) of .* 'imege'. Did you mean 'image'"),
        ("prepared", {"num_classes": 2}, r"has 3 classes, more than 2"),
        ("prepared_with_two_labels", {}, r"several features with classes: kind, place. Set data.label_key"),
    ],
)
def test_missing_features_are_refused(prepared, data_set, keys, message):
    with pytest.raises(UserError, match=message):
        open_source(str(prepared / data_set), "train", **keys)


def test_missing_file_is_named(golden, prepared, tmp_path):
    shutil.copytree(prepared / "prepared", tmp_path / "prepared")
    for folder in (golden / "golden_animals" / "1.0.0", tmp_path / "prepared" / "1.2.0"):
        file = sorted(folder.glob("*-train*"))[-1]
        file.unlink()
        with pytest.raises(UserError, match=rf"cannot read .*{file.name}: No such file"):
            open_source(str(folder), "train")


def test_file_with_another_number_of_records_than_described_is_named(golden):
    path = golden / "golden_animals" / "1.0.0" / "dataset_info.json"
    path.write_text(path.read_text().replace('"6"', '"5"', 1))
    with pytest.raises(UserError, match=r"train.tfrecord-00001-of-00003 has 6 records, but .* says 5"):
        open_source("tfds:golden_animals", "train")


def test_files_outside_the_slice_are_not_needed(golden):
    (golden / "golden_animals" / "1.0.0" / "golden_animals-train.tfrecord-00002-of-00003").unlink()
    assert len(open_source("tfds:golden_animals", "train[:10]")) == 10


@pytest.mark.parametrize("content", ['{"name": ', "[" * 5000, '{"a":' * 5000, None])
@pytest.mark.parametrize("file", ["dataset_info.json", "features.json", "label.labels.txt"])
def test_damaged_description_is_refused(golden, file, content):
    path = golden / "golden_animals" / "1.0.0" / file
    if content is None or file == "label.labels.txt":  # a text that is no JSON is no damage
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_text(content)
    if file == "dataset_info.json" and content is None:
        with pytest.raises(UserError, match="is not prepared"):
            open_source("tfds:golden_animals", "train")
        return
    with pytest.raises(UserError, match=r"cannot read .*golden_animals/1.0.0 as a data set prepared by TFDS"):
        open_source("tfds:golden_animals", "train")


def test_other_formats_are_refused(golden):
    path = golden / "golden_animals" / "1.0.0" / "dataset_info.json"
    path.write_text(path.read_text().replace('"fileFormat": "tfrecord"', '"fileFormat": "riegeli"'))
    with pytest.raises(UserError, match=r"prepared as riegeli, but only array_record and tfrecord are read"):
        open_source("tfds:golden_animals", "train")


def test_sources_are_opened_without_tensorflow_and_torch_and_tfds_is_imported_late(golden, prepared, tmp_path):
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    (tmp_path / "pets" / "cat" / "1.jpg").write_bytes(b"")
    script = (
        "import sys; from vit_jax.data.sources import open_source\n"
        f"open_source('digits', 'train'); open_source('{tmp_path}/pets', 'all')\n"
        "print('tensorflow_datasets' in sys.modules)\n"
        "open_source('tfds:golden_animals', 'train[:50%]')[0]\n"
        f"open_source('{prepared}/prepared', 'train')[0]\n"
        "print([name for name in ('tensorflow', 'torch') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["False", "[]"]
