import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from tests.data.vtab import prepared
from tests.data.vtab.test_tasks import SCENIC, slices_of
from vit_jax.data.overlap import count_shared
from vit_jax.data.sources import MissingDataError, open_source
from vit_jax.data.vtab import TASKS, open_vtab
from vit_jax.errors import UserError


def places_of(name):
    """The first examples of train800 and val200 and the last of the test set, by split and number."""
    thousand, test = (slices_of(TASKS[name], spec) for spec in SCENIC[name])
    (_, (validation, start, _)), ((split, _, stop),) = thousand, test
    return [("train", 0), (validation, start), (split, stop - 1)]


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """The only folder of data sets."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("VIT_JAX_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "data"


def pieces_of(sizes, examples):
    """Files of splits with only some of the examples, by (split, number)."""
    pieces = {}
    for split, size in sizes.items():
        files, done = [], 0
        for number in sorted(number for each, number in examples if each == split):
            files += [number - done] * (number > done) + [[examples[split, number]]]
            done = number + 1
        pieces[split] = files + [size - done] * (size > done)
    return pieces


def sizes_of(task):
    return {split: sizes[0] for split, sizes in task.data.sizes.items()}


def prepare(data_dir, name, **records):
    """Prepares the data set of a task, with the first of train800 and of val200, and the last of test."""
    task = TASKS[name]
    features = prepared.features_of(task.data.name, data_dir)
    given = [records.get(split, {}) for split in ("train800", "val200", "test")]
    places = places_of(name)
    if task.data.name == "dsprites":
        given = [{"image": sprite(seed)} | fields for seed, fields in enumerate(given)]
    examples = {
        place: prepared.example(features, seed, **fields)
        for seed, (place, fields) in enumerate(zip(places, given, strict=True))
    }
    folder = prepared.write(data_dir, task.data.name, pieces_of(sizes_of(task), examples))
    return folder, [examples[place] for place in places]


def sprite(seed):
    """An image as dSprites has them, of zeros and ones."""
    return prepared.png(np.random.default_rng(seed).integers(0, 2, (64, 64, 1), np.uint8))


def three(name):
    """The three examples that `prepare` writes."""
    return [open_vtab(name, split)[0] for split in ("train800[:1]", "val200[:1]", "test[-1:]")]


@pytest.fixture(scope="module")
def all_prepared(tmp_path_factory):
    """A folder with all data sets, and the three examples of each by its name."""
    folder = tmp_path_factory.mktemp("all")
    names = {task.data.name: name for name, task in TASKS.items()}
    return folder, {data: prepare(folder, name)[1] for data, name in names.items()}


@pytest.fixture
def written(all_prepared, data_dir, monkeypatch):
    """The examples of `all_prepared`, which is the only folder of data sets."""
    folder, examples = all_prepared
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    return examples


def test_tasks_of_one_data_set_share_examples_and_splits_of_a_task_do_not(written):
    count = open_vtab("clevr_count", "train800[:1]+val200[:1]")
    for split, shared in (("train800[:1]", 1), ("val200[:1]", 1), ("test[-1:]", 0)):
        assert count_shared(open_vtab("clevr_distance", split), count) == shared
    assert count_shared(open_vtab("eurosat", "train800[:1]"), count) == 0
    train = open_source(f"tfds:{TASKS['eurosat'].data.name}", "train[:1]")
    assert [count_shared(open_vtab("eurosat", split), train) for split in ("train800[:1]", "test[-1:]")] == [1, 0]


# ---- Records with the real features.


@pytest.mark.parametrize("name", TASKS)
def test_split_gives_the_image_and_a_label_of_the_record_at_its_place(written, name):
    task = TASKS[name]
    for found, record in zip(three(name), written[task.data.name], strict=True):
        if task.data.pixels is None:
            assert found["image"] == record["image"]
        else:
            np.testing.assert_array_equal(found["image"], task.data.pixels(record["image"]))
        assert found["label"] in range(task.num_classes)
        if isinstance(task.label, str):
            assert found["label"] == record[task.label]


@pytest.mark.parametrize("name", TASKS)
def test_source_knows_its_task(written, name):
    source = open_vtab(name, "train800[:1]")
    assert (source.name, source.split, len(source)) == (f"vtab:{name}", "train800[:1]", 1)
    assert {"train", "validation", "test", "train800", "val200", "train800val200"} == set(source.splits)
    assert (source.num_classes, source.max_labels) == (TASKS[name].num_classes, 1)
    assert source.class_names is None or len(source.class_names) == source.num_classes


def objects(kind, distances, key):
    """Objects of CLEVR or KITTI as TFDS wants them, with their distances."""
    return [prepared.example(kind, 0, **{key: np.array([1.0, 2.0, distance], np.float32)}) for distance in distances]


def test_labels_of_clevr_follow_from_its_objects(data_dir):
    kind = prepared.features_of("clevr", data_dir)["objects"].feature
    prepare(
        data_dir,
        "clevr_count",
        train800={"objects": objects(kind, [12.5, 9.0, 11.0], "pixel_coords")},
        val200={"objects": objects(kind, [12.5] * 9 + [8.1], "pixel_coords")},
        test={"objects": objects(kind, [10.5] * 6, "pixel_coords")},
    )
    assert [example["label"] for example in three("clevr_count")] == [0, 7, 3]
    assert [example["label"] for example in three("clevr_distance")] == [2, 1, 5]


def test_labels_of_kitti_follow_from_its_vehicles(data_dir):
    kind = prepared.features_of("kitti", data_dir)["objects"].feature
    near, far = (objects(kind, [z], "location")[0] for z in (5.0, 20.5))
    prepare(
        data_dir,
        "kitti_distance",
        train800={"objects": [near | {"type": "Pedestrian"}, far | {"type": "Truck"}]},
        val200={"objects": []},
        test={"objects": [far | {"type": "Car"}, near | {"type": "Van"}]},
    )
    assert [example["label"] for example in three("kitti_distance")] == [2, 3, 0]


def test_labels_of_smallnorb_are_its_angles(data_dir):
    # Azimuth is 0 to 340 degrees by 20, stored as 0, 2, ..., 34, which TFDS halves; elevation is 30 to 70 by 5, stored
    # as 0 to 8: https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/
    degrees = [(azimuth, elevation) for azimuth in range(0, 360, 20) for elevation in range(30, 75, 5)]
    features = prepared.features_of("smallnorb", data_dir)
    records = [
        prepared.example(features, i, label_azimuth=azimuth // 10 // 2, label_elevation=(elevation - 30) // 5)
        for i, (azimuth, elevation) in enumerate(degrees)
    ]
    prepared.write(data_dir, "smallnorb", {"train": [records, 24_300 - len(records)], "test": [24_300]})
    azimuths, elevations = (
        [source[i]["label"] for i in range(len(degrees))]
        for source in (open_vtab(f"smallnorb_{angle}", "train800[:162]") for angle in ("azimuth", "elevation"))
    )
    assert [(20 * a, 30 + 5 * e) for a, e in zip(azimuths, elevations, strict=True)] == degrees
    assert set(azimuths) == set(range(18))
    assert set(elevations) == set(range(9))


def test_image_of_smallnorb_is_from_the_first_camera(data_dir):
    _, written = prepare(data_dir, "smallnorb_azimuth")
    assert three("smallnorb_azimuth")[0]["image"] == written[0]["image"] != written[0]["image2"]


def test_dsprites_is_black_and_white_and_labelled_by_its_grid(data_dir):
    pixels = np.zeros((64, 64, 1), np.uint8)
    pixels[10:20, 30:40] = 1
    prepare(
        data_dir,
        "dsprites_location",
        train800={"image": prepared.png(pixels), "label_x_position": 31, "label_orientation": 7},
    )
    location, orientation = (open_vtab(f"dsprites_{what}", "train800[:1]")[0] for what in ("location", "orientation"))
    assert (location["label"], orientation["label"]) == (15, 2)
    np.testing.assert_array_equal(location["image"], np.repeat(255 * pixels, 3, axis=-1))


# ---- Splits.


def test_thousand_are_the_800_and_the_200(data_dir):
    features = prepared.features_of("dtd", data_dir)
    wanted = {("train", 0): 1, ("train", 799): 2, ("validation", 0): 3, ("validation", 199): 4}
    records = {place: prepared.example(features, 0, label=label) for place, label in wanted.items()}
    prepared.write(data_dir, "dtd", pieces_of(sizes_of(TASKS["dtd"]), records))
    assert [open_vtab("dtd", f"train800val200[{i}:{i + 1}]")[0]["label"] for i in (0, 799, 800, 999)] == [1, 2, 3, 4]
    for split in ("train800val200[799:801]", "train800[-1:]+val200[:1]"):
        source = open_vtab("dtd", split)
        assert [source[i]["label"] for i in range(len(source))] == [2, 3]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("val2000", r"unknown split of vtab:pets 'val2000'. Did you mean 'val200'"),
        ("all", r"vtab:pets has no split 'all': its splits overlap. Take one of train, validation, test, train800, "),
        ("train800[800:]", r"split 'train800\[800:\]' of vtab:pets is empty"),
    ],
)
def test_split_that_does_not_exist_is_refused(written, split, message):
    with pytest.raises(UserError, match=message):
        open_vtab("pets", split)


def test_source_can_be_sent_to_another_process(written):
    source = open_vtab("dsprites_location", "train800[:1]")
    copy = pickle.loads(pickle.dumps(source))
    assert copy[0]["label"] == source[0]["label"]
    np.testing.assert_array_equal(copy[0]["image"], source[0]["image"])


# ---- What may be missing or wrong.


@pytest.mark.parametrize("name", TASKS)
def test_task_that_is_not_prepared_says_how_to_prepare_it(data_dir, name):
    with pytest.raises(MissingDataError) as error:
        open_vtab(name, "train800")
    text, data = str(error.value), TASKS[name].data
    assert f"tfds:{data.name} is not prepared in any of {data_dir}" in text
    assert f"python -m vit_jax.data.prepare tfds {data.name}" in text
    assert ("--manual_dir=<folder>\n" in text) == (name in ("resisc45", "retinopathy", "sun397"))
    assert "docs/vtab.md" in text


def test_data_set_that_is_not_prepared_is_not_mistaken_for_a_mistyped_one(data_dir):
    prepare(data_dir, "dmlab")
    with pytest.raises(
        MissingDataError, match=r"(?s)tfds:dtd is not prepared in any of .*data\.prepare tfds dtd\n"
    ) as error:
        open_vtab("dtd", "train800")
    assert "dmlab" not in str(error.value)


def change(folder, version):
    """Makes a copy of a prepared data set that says it is another version."""
    copy = shutil.copytree(folder, folder.parent / version)
    path = copy / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
    return copy


def test_version_that_vtab_used_is_preferred_to_a_newer_one(data_dir):
    folder, _ = prepare(data_dir, "pets")
    assert folder.name == "4.0.0"
    assert open_vtab("pets", "train800[:1]").where(0).split("/")[-2] == "4.0.0"
    change(folder, "3.2.0")
    assert open_vtab("pets", "train800[:1]").where(0).split("/")[-2] == "3.2.0"


def test_other_version_is_refused(data_dir):
    folder, _ = prepare(data_dir, "svhn")
    change(folder, "2.0.0")
    shutil.rmtree(folder)
    with pytest.raises(MissingDataError, match=r"VTAB uses version 3.\*.\* of tfds:svhn_cropped, not that of .*/2.0.0"):
        open_vtab("svhn", "train800")


@pytest.mark.parametrize("size", [1879, 1881])
def test_data_set_of_another_size_is_refused(data_dir, size):
    prepared.write(data_dir, "dtd", {"train": [size], "validation": [1880], "test": [1880]})
    with pytest.raises(UserError, match=rf"has {size:,} examples in 'train', but VTAB's has 1,880"):
        open_vtab("dtd", "train800")


def test_sun397_without_the_image_that_newer_tfds_leaves_out_is_accepted(data_dir):
    features = prepared.features_of("sun397/tfds", data_dir)
    record = prepared.example(features, 0)
    files = {"train": [[record], 76_126], "validation": [10_875], "test": [21_750]}
    prepared.write(data_dir, "sun397/tfds", files)
    assert open_vtab("sun397", "train[:1]")[0]["label"] == record["label"]


def test_other_number_of_classes_is_refused(written):
    task = dataclasses.replace(TASKS["dmlab"], num_classes=7)
    with pytest.raises(UserError, match=r"vtab:dmlab has 7 classes, but .*dmlab/2.0.1 has 6"):
        open_vtab(task, "train800[:1]")


def test_model_with_too_few_classes_is_refused(written):
    with pytest.raises(UserError, match="vtab:dmlab has 6 classes, more than 5"):
        open_source("vtab:dmlab", "train800[:1]", num_classes=5)


def test_label_that_cannot_be_derived_names_the_record(data_dir):
    prepare(data_dir, "clevr_count", train800={"objects": []})
    with pytest.raises(UserError, match=r"cannot derive a label for record 0 of .*clevr-train.*: it has 0 objects"):
        open_vtab("clevr_count", "train800[:1]")[0]


def test_missing_feature_of_a_label_is_named(written):
    task = dataclasses.replace(TASKS["dtd"], label=TASKS["clevr_count"].label)
    with pytest.raises(
        UserError, match=r"lacks the feature 'objects/size' that its label is derived from. It has file_name, image"
    ):
        open_vtab(task, "train800[:1]")[0]


@pytest.mark.parametrize("label", [-1, None])
def test_record_without_its_label_is_named(data_dir, label):
    features = prepared.features_of("dtd", data_dir)
    record = tf_example_pb2.Example.FromString(
        prepared.serialize(features, prepared.example(features, 0, **{"label": label} if label else {}))
    )
    if label is None:
        del record.features.feature["label"]
    files = pieces_of(sizes_of(TASKS["dtd"]), {("train", 0): record.SerializeToString()})
    prepared.write(data_dir, "dtd", files)
    with pytest.raises(UserError, match=r"record 0 of .*dtd-train.* has no label: its 'label' is missing, empty or -1"):
        open_vtab("dtd", "train800[:1]")[0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("clevr_count", "clevr_distance"),  # a function for each label
        ("dsprites_location", "dsprites_orientation"),
        ("smallnorb_azimuth", "smallnorb_elevation"),  # a feature for each label
    ],
)
def test_tasks_of_one_data_set_have_their_own_fingerprints(written, first, second):
    sources = [open_vtab(name, "train800[:1]") for name in (first, first, second)]
    same, again, other = (source.fingerprint() for source in sources)
    assert same == again != other


def test_pictures_of_one_data_set_have_their_own_fingerprints(written):
    one, other = (
        open_source("tfds:smallnorb", "train[:1]", image_key=key, label_key="label_azimuth").fingerprint()
        for key in ("image", "image2")
    )
    assert one != other
