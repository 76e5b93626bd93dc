"""Preparing image folders, lists of images, catalogue sets, and sets without near-duplicates."""

import json
import sys
import textwrap
import zipfile

import pytest

from tests.data.test_prepare import contents, examples, jpeg
from vit_jax.data.prepare import tfds_layout
from vit_jax.data.prepare.__main__ import main


def features(folder):
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder).info.features


# ---- Folders and zip files.


def write_folder(folder):
    for seed, (split, name) in enumerate((s, c) for s in ("train", "test") for c in ("cat", "dog")):
        (folder / split / name).mkdir(parents=True)
        for number in range(3):
            (folder / split / name / f"{number}.jpg").write_bytes(jpeg(10 * seed + number))
    return folder


def zip_of(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.jpg")):
            archive.write(file, f"pets/{file.relative_to(folder)}")
    return path


def test_a_folder_gives_its_splits_and_classes(tmp_path):
    folder = write_folder(tmp_path / "pets")
    assert main(["image_folder", str(folder), f"--out={tmp_path / 'out'}"]) == 0
    prepared = tmp_path / "out/pets/1.0.0"
    assert features(prepared)["label"].names == ["cat", "dog"]
    for split in ("train", "test"):
        found = {example["file_name"].decode(): example for example in examples(prepared, split)}
        assert {name: example["label"] for name, example in found.items()} == {
            f"{name}/{number}.jpg": label for label, name in enumerate(("cat", "dog")) for number in range(3)
        }
        assert found["dog/2.jpg"]["image"] == (folder / split / "dog/2.jpg").read_bytes()


def test_a_zip_file_gives_the_same_shards_as_the_folder_in_it(tmp_path):
    folder = write_folder(tmp_path / "pets")
    assert main(["image_folder", str(folder), f"--out={tmp_path / 'a'}"]) == 0
    assert main(["image_folder", str(zip_of(folder, tmp_path / "pets.zip")), f"--out={tmp_path / 'b'}"]) == 0
    a, b = (contents(tmp_path / out / "pets/1.0.0") for out in ("a", "b"))
    shards = [name for name in a if "array_record" in name]
    assert len(shards) == 2 and [a[name] for name in shards] == [b[name] for name in shards]


def test_only_the_classes_that_are_named_are_taken(tmp_path, capsys):
    folder = write_folder(tmp_path / "pets")
    assert main(["image_folder", str(folder), "--name=dogs", "--classes=dog", f"--out={tmp_path / 'out'}"]) == 0
    prepared = tmp_path / "out/dogs/1.0.0"
    assert features(prepared)["label"].names == ["dog"]
    assert len(examples(prepared, "train")) == len(examples(prepared, "test")) == 3
    assert main(["image_folder", str(folder), "--classes=dog,cow", f"--out={tmp_path / 'out'}"]) == 1
    assert f"unknown class of {folder} 'cow'" in capsys.readouterr().err


def test_an_image_that_disappears_after_the_scan_is_named(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "pets"
    write_folder(folder)
    lost, write_shard = sorted(folder.rglob("*.jpg"))[0], tfds_layout.write_shard

    def write(path, records):
        lost.unlink(missing_ok=True)
        return write_shard(path, records)

    monkeypatch.setattr(tfds_layout, "write_shard", write)
    assert main(["image_folder", str(folder), f"--out={tmp_path / 'out'}"]) == 1
    assert f"cannot read {lost}: No such file" in capsys.readouterr().err


def test_a_zip_file_with_a_path_out_of_the_folder_is_refused(tmp_path, capsys):
    archive = zip_of(write_folder(tmp_path / "pets"), tmp_path / "pets.zip")
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("pets/train/../../../evil.jpg", jpeg(1))
    assert main(["image_folder", str(archive), f"--out={tmp_path}"]) == 1
    assert "would leave the folder" in capsys.readouterr().err


def test_splits_with_different_classes_are_an_error(tmp_path, capsys):
    folder = write_folder(tmp_path / "pets")
    (folder / "test/dog").rename(folder / "test/dogs")
    assert main(["image_folder", str(folder), f"--out={tmp_path / 'out'}"]) == 1
    assert "different classes, so a label would not mean the same in both: 'test' has 'dogs'" in capsys.readouterr().err


def test_a_broken_image_of_a_folder_is_named_by_its_path(tmp_path):
    folder = write_folder(tmp_path / "pets")
    (folder / "train/cat/1.jpg").write_bytes(b"no picture")
    assert main(["image_folder", str(folder), f"--out={tmp_path / 'out'}"]) == 0
    (broken,) = json.loads((tmp_path / "out/pets/1.0.0/manifest.json").read_text())["broken"]
    assert broken["file_name"] == "cat/1.jpg"
    assert len(examples(tmp_path / "out/pets/1.0.0", "train")) == 5


def test_an_unreadable_image_is_reported_without_the_path_of_the_folder(tmp_path):
    archive = zip_of(write_folder(tmp_path / "pets"), tmp_path / "pets.zip")
    content = bytearray(archive.read_bytes())
    content[200] ^= 255  # amid the first image, whose checksum is wrong now
    archive.write_bytes(content)
    assert main(["image_folder", str(archive), f"--out={tmp_path}"]) == 0
    manifest = (tmp_path / "pets/1.0.0/manifest.json").read_text()
    (broken,) = json.loads(manifest)["broken"]
    assert broken["file_name"] == "cat/0.jpg" and "checksum" in broken["reason"]
    assert str(tmp_path) not in manifest


# ---- Lists.


def write_list(folder, rows, name="web.jsonl"):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(4):
        (folder / f"images/{number}.jpg").write_bytes(jpeg(number))
    (folder / "images/copy.jpg").write_bytes(jpeg(3))
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name, row_group_size=2)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def labels_of(folder):
    return {
        example["file_name"].decode(): [int(label) for label in example["labels"]]
        for example in examples(folder, "train")
    }


NUMBERED = [{"image": f"images/{number}.jpg", "labels": [number, 7][: 1 + number % 2]} for number in range(4)]


def test_another_list_of_the_same_name_is_not_mistaken_for_the_one_that_is_there(tmp_path, capsys):
    assert main(["manifest", str(write_list(tmp_path / "a", NUMBERED)), f"--out={tmp_path}"]) == 0
    assert main(["manifest", str(write_list(tmp_path / "b", NUMBERED[:2])), f"--out={tmp_path}"]) == 1
    assert "was made with other files (bytes was" in capsys.readouterr().err


def test_images_added_to_a_folder_are_noticed(tmp_path, capsys):
    folder = write_folder(tmp_path / "pets")
    assert main(["image_folder", str(folder), f"--out={tmp_path / 'out'}"]) == 0
    (folder / "train/cat/new.jpg").write_bytes(jpeg(99))
    assert main(["image_folder", str(folder), f"--out={tmp_path / 'out'}"]) == 1
    assert "images was 12, is 13" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["web.jsonl", "web.parquet"])
def test_a_list_gives_images_with_several_labels(tmp_path, name):
    assert main(["manifest", str(write_list(tmp_path, NUMBERED, name)), f"--out={tmp_path}"]) == 0
    assert labels_of(tmp_path / "web/1.0.0") == {
        "images/0.jpg": [0],
        "images/1.jpg": [1, 7],
        "images/2.jpg": [2],
        "images/3.jpg": [3, 7],
    }
    assert features(tmp_path / "web/1.0.0")["labels"].feature.num_classes == 8


def test_an_image_may_have_no_label(tmp_path):
    path = write_list(tmp_path, [{"image": "images/0.jpg", "labels": []}, {"image": "images/1.jpg", "label": 0}])
    assert main(["manifest", str(path), f"--out={tmp_path}"]) == 0
    assert labels_of(tmp_path / "web/1.0.0") == {"images/0.jpg": [], "images/1.jpg": [0]}


def test_names_are_numbered_as_the_file_of_classes_says(tmp_path):
    path = write_list(tmp_path, [{"image": "images/0.jpg", "label": "dog"}, {"image": "images/1.jpg", "label": 2}])
    (tmp_path / "classes.txt").write_text("zebra\ndog\ncat\n")
    assert main(["manifest", str(path), f"--out={tmp_path}", f"--classes={tmp_path / 'classes.txt'}"]) == 0
    assert labels_of(tmp_path / "web/1.0.0") == {"images/0.jpg": [1], "images/1.jpg": [2]}
    assert features(tmp_path / "web/1.0.0")["labels"].feature.names == ["zebra", "dog", "cat"]


def test_names_without_a_file_of_classes_are_sorted(tmp_path):
    path = write_list(
        tmp_path, [{"image": f"images/{i}.jpg", "label": name} for i, name in enumerate(("z", "a", "#1"))]
    )
    assert main(["manifest", str(path), f"--out={tmp_path}"]) == 0
    assert features(tmp_path / "web/1.0.0")["labels"].feature.names == ["#1", "a", "z"]


def test_single_label_lists_have_one_label(tmp_path):
    path = write_list(tmp_path, [{"image": "images/1.jpg", "label": 3}])
    assert main(["manifest", str(path), f"--out={tmp_path}", "--single_label", "--num_classes=10"]) == 0
    (example,) = examples(tmp_path / "web/1.0.0", "train")
    assert example["label"] == 3
    assert features(tmp_path / "web/1.0.0")["label"].num_classes == 10


def test_copies_in_a_list_merge_where_wanted(tmp_path):
    path = write_list(tmp_path, [{"image": "images/3.jpg", "label": 5}, {"image": "images/copy.jpg", "label": 2}])
    assert main(["manifest", str(path), f"--out={tmp_path}", "--merge"]) == 0
    assert labels_of(tmp_path / "web/1.0.0") == {"images/3.jpg": [2, 5]}


def test_a_missing_image_is_left_out_and_named(tmp_path):
    path = write_list(tmp_path, [*NUMBERED, {"image": "images/nowhere.jpg", "label": 1}])
    assert main(["manifest", str(path), f"--out={tmp_path}"]) == 0
    (broken,) = json.loads((tmp_path / "web/1.0.0/manifest.json").read_text())["broken"]
    assert (broken["file_name"], broken["reason"]) == ("images/nowhere.jpg", "No such file or directory")


@pytest.mark.parametrize(
    "image", ["../secret.jpg", "{folder}/secret.jpg", "images/../../secret.jpg", "images/link.jpg"]
)
def test_a_list_does_not_lead_out_of_its_folder(tmp_path, capsys, image):
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    path = write_list(tmp_path / "web", [{"image": image.format(folder=tmp_path), "label": 0}])
    (tmp_path / "web/images/link.jpg").symlink_to(tmp_path / "secret.jpg")
    assert main(["manifest", str(path), f"--out={tmp_path}"]) == 1
    assert "Refused" in capsys.readouterr().err


def test_a_list_whose_images_were_not_found_is_read_again(tmp_path, capsys):
    path = write_list(tmp_path, NUMBERED)
    (tmp_path / "elsewhere").mkdir()
    command = ["manifest", str(path), f"--out={tmp_path / 'out'}"]
    assert main([*command, f"--images_root={tmp_path / 'elsewhere'}"]) == 1
    assert "there are no images; 4 are broken" in capsys.readouterr().err
    assert main(command) == 0
    assert len(labels_of(tmp_path / "out/web/1.0.0")) == 4


def test_a_list_that_was_wrong_can_be_repaired(tmp_path, capsys):
    command = ["manifest", str(write_list(tmp_path, [*NUMBERED, {"image": "images/0.jpg"}])), f"--out={tmp_path}"]
    assert main(command) == 1
    write_list(tmp_path, NUMBERED)
    assert main(command) == 0


def test_images_root_widens_what_a_list_may_name(tmp_path):
    path = write_list(tmp_path / "web", [{"image": "web/images/1.jpg", "label": 0}])
    assert main(["manifest", str(path), f"--out={tmp_path / 'out'}", f"--images_root={tmp_path}"]) == 0
    assert labels_of(tmp_path / "out/web/1.0.0") == {"web/images/1.jpg": [0]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"image": "images/0.jpg"}', "has no label"),
        ('{"label": 1}', "has no image"),
        ('{"image": "images/0.jpg", "label": 1.5}', "no label that is a number or a name"),
        ('{"image": "images/0.jpg", "label": true}', "no label that is a number or a name"),
        ('{"image": "images/0.jpg", "label": -1}', "has label -1"),
        ('{"image": "images/0.jpg", "label": 20000000}', "If it is a name"),
        ('{"image": "images/0.jpg", "label": "\\ud800"}', "half a Unicode character"),
        ('{"image": "images/\\u00000.jpg", "label": 1}', "has the invalid path"),
        ("[1, 2]", "has no image"),
        ("{", "not JSON"),
    ],
)
def test_a_row_that_is_wrong_is_named_by_its_place(tmp_path, capsys, row, words):
    path = write_list(tmp_path, NUMBERED[:1])
    with path.open("a") as file:
        file.write(row)
    assert main(["manifest", str(path), f"--out={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert words in error and "web.jsonl, line at byte 41" in error


@pytest.mark.parametrize("more", [["--num_classes=3"], ["--single_label"], ["--single_label", "--merge"]])
def test_labels_that_do_not_fit_the_options_are_an_error(tmp_path, more):
    path = write_list(tmp_path, [{"image": "images/0.jpg", "labels": [3, 4]}])
    assert main(["manifest", str(path), f"--out={tmp_path}", *more]) == 1


@pytest.mark.parametrize("more", [["--num_classes=0"], ["--split=a b"]])
def test_impossible_options_of_a_list_are_one_message(tmp_path, capsys, more):
    assert main(["manifest", str(write_list(tmp_path, NUMBERED)), f"--out={tmp_path}", *more]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_at_least_one(tmp_path, capsys, threads):
    assert main(["image_folder", str(tmp_path), f"--threads={threads}"]) == 1
    assert f"must be at least 1, got {threads}" in capsys.readouterr().err


def test_numbers_and_names_do_not_mix(tmp_path, capsys):
    path = write_list(tmp_path, [{"image": "images/0.jpg", "label": 1}, {"image": "images/1.jpg", "label": "cat"}])
    assert main(["manifest", str(path), f"--out={tmp_path}"]) == 1
    assert "Use one kind" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["web.jsonl", "web.parquet"])
def test_a_scan_of_a_list_resumes_from_any_mark(tmp_path, name):
    from vit_jax.data.prepare.image_lists import ImageList

    origin = ImageList(write_list(tmp_path, NUMBERED, name))
    everything = list(origin.scan(None))
    for place, found in enumerate(everything):
        assert list(origin.scan(found.mark)) == everything[place + 1 :]


# ---- The TFDS catalogue.

BUILDER = """
import pathlib
import numpy as np
import tensorflow_datasets as tfds

class {name}(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=["a", "b"])
        features = {{"image": tfds.features.Image(), "label": label, "number": np.int64}}
        features = tfds.features.FeaturesDict(features)
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {{"train": self._generate_examples()}}

    def _generate_examples(self):
        for i in range(40):
            yield {keys}, {{"image": {image}, "label": i % 2, "number": i}}
"""


@pytest.fixture
def builder(tmp_path, monkeypatch):
    """Writes a builder as a package of its own; returns its name."""

    def write(name, image, keys="i"):
        package = tmp_path / "code" / name
        package.mkdir(parents=True)
        (package / "picture.jpg").write_bytes(jpeg(1))
        class_name = "".join(word.capitalize() for word in name.split("_"))
        (package / "__init__.py").write_text(textwrap.dedent(BUILDER.format(name=class_name, image=image, keys=keys)))
        monkeypatch.syspath_prepend(str(tmp_path / "code"))
        return name

    return write


def test_a_builder_of_ones_own_is_prepared_by_tfds(tmp_path, builder):
    name = builder("own_birds", "pathlib.Path(__file__).with_name('picture.jpg').open('rb')")
    for _ in range(2):  # the second finds it finished
        assert main(["tfds", name, f"--import={name}", f"--out={tmp_path}"]) == 0
    assert [example["image"] for example in examples(tmp_path / name / "1.0.0", "train")] == 40 * [jpeg(1)]
    assert main(["check", str(tmp_path / name / "1.0.0")]) == 0


def test_tfds_itself_writes_the_same_examples_in_the_same_order(tmp_path, builder):
    name = builder("own_order", "pathlib.Path(__file__).with_name('picture.jpg').open('rb')", keys="f'{i}.jpg'")
    assert main(["tfds", name, f"--import={name}", f"--out={tmp_path}"]) == 0
    theirs = [int(example["number"]) for example in examples(tmp_path / name / "1.0.0", "train")]
    rows = []
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
        rows.append(json.dumps({"image": f"{number}.jpg", "label": number}))
    (tmp_path / "ours.jsonl").write_text("\n".join(rows))
    assert main(["manifest", str(tmp_path / "ours.jsonl"), f"--out={tmp_path}", "--single_label"]) == 0
    ours = [int(example["label"]) for example in examples(tmp_path / "ours/1.0.0", "train")]
    assert ours == theirs


def test_a_set_that_needs_tensorflow_says_what_to_install(tmp_path, builder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # where it is installed, too
    name = builder("array_birds", "np.zeros((8, 8, 3), np.uint8)")
    assert main(["tfds", name, f"--import={name}", f"--out={tmp_path}"]) == 1
    assert "pip install --editable '.[prepare]'" in capsys.readouterr().err


def test_an_unknown_catalogue_set_names_the_nearest(tmp_path, capsys):
    assert main(["tfds", "cifar11", f"--out={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "cifar11" in error and "cifar10" in error


def test_an_unknown_version_is_one_message(tmp_path, capsys):
    assert main(["tfds", "cifar10:9.9.9", f"--out={tmp_path}"]) == 1
    assert "9.9.9" in capsys.readouterr().err


def test_a_module_that_is_not_there_is_one_message(tmp_path, capsys):
    assert main(["tfds", "birds", "--import=no.such.module", f"--out={tmp_path}"]) == 1
    assert "No module named 'no'" in capsys.readouterr().err


def test_a_disk_that_does_not_answer_is_not_mistaken_for_a_broken_image(tmp_path, capsys):
    images = tmp_path / "pets" / "train" / "cat"
    images.mkdir(parents=True)
    whole = jpeg(1)
    (images / "1.jpg").write_bytes(whole)
    (images / "2.jpg").symlink_to("/proc/self/mem")  # whose first byte cannot be read: an input/output error
    arguments = ["image_folder", str(tmp_path / "pets"), f"--out={tmp_path / 'out'}"]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "2.jpg: Input/output error. The image may be whole" in message
    (images / "2.jpg").unlink()
    (images / "2.jpg").write_bytes(whole)
    assert main(arguments) == 0
    manifest = json.loads((tmp_path / "out" / "pets" / "1.0.0" / "manifest.json").read_text())
    assert (manifest["counts"]["images"], manifest["counts"]["broken"]) == (2, 0)


def test_a_result_among_the_images_is_refused(tmp_path, capsys):
    images = tmp_path / "pets" / "train" / "cat"
    images.mkdir(parents=True)
    (images / "1.jpg").write_bytes(jpeg(1))
    assert main(["image_folder", str(tmp_path / "pets"), f"--out={tmp_path}"]) == 1
    assert "would be among the images" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "pets").iterdir()] == ["train"]
