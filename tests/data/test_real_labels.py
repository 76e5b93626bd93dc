import json

import pytest
import simplejpeg

from tests.conftest import data_file
from tests.data.test_sources import write_image
from vit_jax.data.sources import ImageFolderSource, RealLabels, load_real_labels
from vit_jax.errors import UserError


@pytest.fixture
def validation(tmp_path):
    """Three images of two classes; ImageNet's names do not follow its classes."""
    for name, number in (("n01440764", 7), ("n01440764", 49_999), ("n01443537", 2)):
        write_image(tmp_path / "imagenet" / "val" / name / f"ILSVRC2012_val_{number:08d}.JPEG", number % 256)
    return tmp_path / "imagenet"


class ImageNetSource(ImageFolderSource):
    """As if there were a thousand classes."""

    def __init__(self, path):
        super().__init__(path, "val")
        self.num_classes = 1000


def labels_with(**by_number):
    labels = [[] for _ in range(50_000)]
    for number, classes in by_number.items():
        labels[int(number.removeprefix("image_")) - 1] = classes
    return labels


def test_labels_are_found_by_the_number_in_the_name(validation):
    labels = labels_with(image_2=[5], image_7=[1, 2, 3], image_49999=[])
    source = RealLabels(ImageNetSource(validation), labels)
    assert len(source) == 3
    assert {source[i]["file_name"]: source[i]["label"] for i in range(3)} == {
        "ILSVRC2012_val_00000002.JPEG": [5],
        "ILSVRC2012_val_00000007.JPEG": [1, 2, 3],
        "ILSVRC2012_val_00049999.JPEG": [],
    }
    assert source.max_labels == 3
    assert source.num_classes == 1000


def test_images_and_places_are_the_sources(validation):
    source = ImageNetSource(validation)
    real = RealLabels(source, labels_with(image_2=[5]))
    assert real[1]["image"] == source[1]["image"]
    assert simplejpeg.is_jpeg(real[1]["image"])
    assert real.where(1) == source.where(1)
    assert (real.split, real.splits) == ("val", ["val"])


def test_fingerprint_changes_with_the_labels(validation):
    source = ImageNetSource(validation)
    first, second = (RealLabels(source, labels_with(image_2=[c])).fingerprint() for c in (5, 6))
    assert len({first, second, source.fingerprint()}) == 3


def test_image_without_a_number_is_refused(validation):
    path = validation / "val" / "n01443537" / "ILSVRC2012_val_00000002.JPEG"
    path.rename(path.with_name("n01443537_2.JPEG"))
    source = RealLabels(ImageNetSource(validation), labels_with(image_2=[5]))
    with pytest.raises(UserError, match=r"n01443537_2.JPEG.*It needs the name it has in ImageNet"):
        source[2]


def test_image_with_a_number_that_is_too_large_is_refused(validation):
    path = validation / "val" / "n01440764" / "ILSVRC2012_val_00000007.JPEG"
    path.rename(path.with_name("ILSVRC2012_val_00000000.JPEG"))
    with pytest.raises(UserError, match="its ReaL label cannot be found"):
        RealLabels(ImageNetSource(validation), labels_with(image_2=[5]))


def test_source_without_file_names_is_refused_at_once(validation):
    class Nameless(ImageNetSource):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return {"image": example["image"], "label": example["label"]}

    with pytest.raises(UserError, match="has no file name, so its ReaL label cannot be found"):
        RealLabels(Nameless(validation), labels_with(image_2=[5]))


def test_source_with_other_classes_is_refused(validation):
    with pytest.raises(UserError, match=r"1000 classes of ImageNet; .*imagenet has 2"):
        RealLabels(ImageFolderSource(validation, "val"), labels_with(image_2=[5]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1], ", "cannot read the ReaL labels"),
        ("[[1], [2]]", "should be a JSON list of 50000 lists"),
        ('{"1": [2]}', "should be a JSON list of 50000 lists"),
        (json.dumps(labels_with(image_3=[1000])), r"entry 3 is \[1000\]"),
        (json.dumps(labels_with(image_4=[-1])), r"entry 4 is \[-1\]"),
        (json.dumps(labels_with(image_5=7)), "entry 5 is 7"),
        (json.dumps(labels_with(image_6=["cat"])), r"entry 6 is \['cat'\]"),
        (json.dumps(labels_with(image_6=[True])), r"entry 6 is \[True\]"),
    ],
    ids=["no JSON", "too few", "no list", "class too large", "class negative", "number", "name", "truth"],
)
def test_file_that_is_something_else_is_refused(tmp_path, content, message):
    path = tmp_path / "real.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_real_labels(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the ReaL labels in .*real.json"):
        load_real_labels(tmp_path / "real.json")


def test_published_labels_are_as_the_paper_says():
    labels = load_real_labels(data_file("real.json"))
    assert len(labels) == 50_000
    assert sum(not classes for classes in labels) == 3_163
    assert {c for classes in labels for c in classes} == set(range(1000))
