import json
import zipfile

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds

from tests.conftest import ROOT
from vit_jax.data.class_names import wordnet_ids
from vit_jax.data.imagenet_test_sets import IMAGENET_TEST_SETS
from vit_jax.data.pipeline import BatchLoader
from vit_jax.data.sources import MissingDataError
from vit_jax.data.sources.imagenet_variants import open_variant
from vit_jax.data.transforms import EvalTransform, ImageError
from vit_jax.errors import UserError
from vit_jax.objectives.losses import is_correct

IDS = wordnet_ids("imagenet2012")
OBJECTNET = json.loads((ROOT / "tests" / "golden" / "objectnet.json").read_text())  # its "source" says whence
RENDITIONS = tuple(range(3, 1000, 5))  # as many classes as ImageNet-R has


def write(root, files):
    """Writes files that are not images, but say where they are."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())
    return root


def folder_of(source, index):
    return source.where(index).split("/")[-2]


@pytest.fixture(scope="module")
def renditions(tmp_path_factory):
    """200 folders of WordNet ids, with 1 to 3 images each, and a README as in the authors' archive."""
    files = [f"imagenet-r/{IDS[label]}/{kind}.jpg" for label in RENDITIONS for kind in range(1 + label % 3)]
    return write(tmp_path_factory.mktemp("r"), [*files, "imagenet-r/README.txt"]) / "imagenet-r"


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """ImageNet-V2: 1,000 folders called after the class."""
    return write(tmp_path_factory.mktemp("v2"), [f"imagenetv2/{label}/image.jpeg" for label in range(1000)])


def png(pixels):
    return cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()


def bordered(pixels, width=1):
    image = np.zeros([side + 2 * width for side in pixels.shape[:2]] + [3], np.uint8)
    image[..., 0] = 255
    image[width:-width, width:-width] = pixels
    return image


def random_pixels(seed, *size):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write_objectnet(root, objects=OBJECTNET["objects"], others=("air_freshener", "baking_sheet")):
    """ObjectNet with two images an object, and the authors' mapping files."""
    folders = {folder: label for folder, (label, *_) in objects.items()}
    for number, folder in enumerate([*objects, *others]):
        (root / "images" / folder).mkdir(parents=True)
        for image in range(2):
            name = f"{number:03d}{image}.png"
            (root / "images" / folder / name).write_bytes(png(bordered(random_pixels(number, 6, 9))))
    mappings = root / "mappings"
    mappings.mkdir()
    others = {folder: folder.replace("_", " ").capitalize() for folder in others}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(folders | others))
    overlap = {label: words for label, _, words in objects.values()}
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(overlap))
    (root / "README").write_text("about")
    return root


@pytest.fixture(scope="module")
def objectnet(tmp_path_factory):
    return write_objectnet(tmp_path_factory.mktemp("objectnet") / "objectnet-1.0")


class Renditions(tfds.core.GeneratorBasedBuilder):
    """Like TFDS's imagenet_r: labels are ImageNet's, and 200 of them occur."""

    VERSION = tfds.core.Version("1.0.0")
    LABELS = RENDITIONS
    NAMES = list(IDS)  # noqa: RUF012

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=self.NAMES)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"test": self._generate_examples()}

    def _generate_examples(self):
        image = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))
        for label in self.LABELS:
            yield label, {"image": image, "label": label}


class RenditionsCut(Renditions):
    """One of its classes is missing."""

    LABELS = RENDITIONS[1:]


class RenditionsOfTwo(Renditions):
    """Other classes."""

    LABELS = (0, 1)
    NAMES = ["cat", "dog"]  # noqa: RUF012


class RealPrepared(Renditions):
    """As TFDS's imagenet2012_real."""

    def _info(self):
        label = tfds.features.ClassLabel(names=self.NAMES)
        features = {
            "image": tfds.features.Image(),
            "original_label": label,
            "real_label": tfds.features.Sequence(label),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        image = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))
        for number, real in enumerate(([7, 8], [], [9])):
            yield number, {"image": image, "original_label": 0, "real_label": real}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    for builder in (Renditions, RenditionsCut, RenditionsOfTwo, RealPrepared):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture(autouse=True)
def no_other_data(tmp_path, monkeypatch):
    monkeypatch.delenv("VIT_JAX_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))


# ---- Folders of classes.


def test_folders_of_imagenet_v2_are_numbers_though_they_sort_as_text(numbered):
    variant = open_variant("imagenet_v2", str(numbered / "imagenetv2"))
    folders = [folder_of(variant.source, i) for i in range(1000)]
    assert folders[:4] == ["0", "1", "10", "100"]
    assert [variant.source[i]["label"] for i in range(1000)] == list(map(int, folders))
    assert variant.classes is None


def test_folders_of_wordnet_ids_get_imagenets_labels_and_only_their_classes_compete(renditions):
    variant = open_variant("imagenet_r", str(renditions))
    assert variant.classes == RENDITIONS
    assert len(variant.source) == sum(1 + label % 3 for label in RENDITIONS)
    for i in range(len(variant.source)):
        example = variant.source[i]
        assert IDS[example["label"]] == folder_of(variant.source, i)
        assert example["image"].decode() == f"imagenet-r/{folder_of(variant.source, i)}/{example['file_name']}"
    assert (variant.source.num_classes, variant.source.max_labels) == (1000, 1)
    assert variant.source.class_names == IDS


def test_folder_around_the_archives_folder_will_do(renditions):
    source = open_variant("imagenet_a", str(renditions.parent)).source
    assert source.fingerprint() == open_variant("imagenet_a", str(renditions)).source.fingerprint()


@pytest.mark.parametrize("around", ["sketch/", ""])
def test_zip_file_is_read_as_it_is(tmp_path, around):
    with zipfile.ZipFile(tmp_path / "sketch.zip", "w") as archive:
        for wordnet_id in reversed(IDS):
            archive.writestr(f"{around}{wordnet_id}/sketch_0.JPEG", wordnet_id)
    variant = open_variant("imagenet_sketch", str(tmp_path / "sketch.zip"))
    assert variant.classes is None
    for i in (0, 1, 500, 999):
        assert variant.source[i] == {"image": IDS[i].encode(), "label": i, "file_name": "sketch_0.JPEG"}


def test_fingerprint_changes_with_the_files(renditions, tmp_path):
    names = [f"imagenet-r/{IDS[label]}/0.jpg" for label in RENDITIONS]
    source = open_variant("imagenet_r", str(write(tmp_path, names))).source
    assert source.fingerprint() != open_variant("imagenet_r", str(renditions)).source.fingerprint()


def test_other_number_of_images_than_published_is_reported(renditions, caplog):
    open_variant("imagenet_r", str(renditions))
    assert "has 400 images, the published test set 30000" in caplog.text


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("imagenet_v2", ["x/0/a.jpg", "x/7/a.jpg"], "images of 2 classes; imagenet_v2 has 1000"),
        ("imagenet_v2", ["x/0/a.jpg", "x/1000/a.jpg"], r"should not be there: '1000'.*'0' to '999'"),
        ("imagenet_v2", [f"x/{IDS[0]}/a.jpg", f"x/{IDS[1]}/a.jpg"], "should not be there: 'n01440764'"),
        ("imagenet_sketch", [f"x/{IDS[0]}/a.jpg"], "images of 1 classes; .* 1000.*HaohanWang/ImageNet-Sketch"),
        ("imagenet_r", [f"x/{IDS[0]}/a.jpg", "x/cat/a.jpg"], r"should not be there: 'cat'.*WordNet ids"),
        ("imagenet_r", [f"x/{IDS[i]}/a.jpg" for i in range(199)], "images of 199 classes; imagenet_r has 200"),
        ("imagenet_a", [f"x/{IDS[0]}/sub/a.jpg"], r"images right in it .*'x/n01440764/sub/'"),
        ("imagenet_a", ["x/train/n01440764/a.jpg", "x/test/n01440764/a.jpg"], r"images right in it"),
        ("imagenet_a", ["train/n01440764/a.jpg", "test/n01440764/a.jpg"], "other folders than expected: 'test', 'tr"),
        ("imagenet_a", ["a.jpg"], "other folders than expected: none"),
    ],
)
def test_folder_with_wrong_content_is_refused(tmp_path, name, files, message):
    place = write(tmp_path / "data", files)
    with pytest.raises(UserError, match=message):
        open_variant(name, str(place))


def test_archive_that_is_not_unpacked_is_refused(tmp_path):
    (tmp_path / "imagenet-a.tar").write_bytes(b"an archive")
    with pytest.raises(UserError, match=r"imagenet-a.tar .* not a zip file. Unpack it: tar -xf"):
        open_variant("imagenet_a", str(tmp_path / "imagenet-a.tar"))


@pytest.mark.parametrize("name", IMAGENET_TEST_SETS)
def test_missing_place_says_where_to_get_it(name):
    with pytest.raises(MissingDataError, match=rf"{name} is not at 'nowhere'. It is from https://"):
        open_variant(name, "nowhere")


def test_unknown_name_is_refused():
    with pytest.raises(UserError, match="Did you mean 'imagenet_v2'"):
        open_variant("imagenet-v2", "somewhere")


# ---- Prepared by TFDS.


@pytest.mark.parametrize("form", ["name", "folder"])
def test_classes_of_a_prepared_set_match_its_records(prepared, monkeypatch, form):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    variant = open_variant("imagenet_r", "tfds:renditions" if form == "name" else str(prepared / "renditions"))
    assert variant.classes == RENDITIONS
    assert sorted(variant.source[i]["label"] for i in range(200)) == list(RENDITIONS)


def test_prepared_set_that_lacks_a_class_is_refused(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    with pytest.raises(UserError, match="tfds:renditions_cut has images of 199 classes; imagenet_r has 200"):
        open_variant("imagenet_r", "tfds:renditions_cut")


def test_prepared_set_of_other_classes_is_refused(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    with pytest.raises(UserError, match=r"1,000 WordNet ids as its classes.*it has 2 classes, such as 'cat'"):
        open_variant("imagenet_a", "tfds:renditions_of_two")


def test_set_that_is_not_prepared_says_how():
    with pytest.raises(MissingDataError, match=r"data\.prepare tfds imagenet_v2/matched-frequency"):
        open_variant("imagenet_v2", "tfds:imagenet_v2/matched-frequency:3.0.0")


# ---- ReaL.


@pytest.fixture
def real_json(tmp_path):
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[5], [1, 2]] + [[]] * 49_998))
    return str(path)


def test_real_labels_belong_to_the_validation_images(real_json, tmp_path):
    names = [f"val/{wordnet_id}/ILSVRC2012_val_{i + 1:08d}.JPEG" for i, wordnet_id in enumerate(IDS)]
    place = write(tmp_path / "imagenet", names)
    variant = open_variant("real", real_json, validation=str(place), validation_split="val")
    assert [variant.source[i]["label"] for i in range(3)] == [[5], [1, 2], []]
    assert variant.classes is None


def test_real_labels_need_the_data_set_of_their_images(real_json):
    with pytest.raises(UserError, match="name the data set that has the images"):
        open_variant("real", real_json)


def test_real_labels_that_tfds_has_prepared_come_with_the_images(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    source = open_variant("real", "tfds:real_prepared").source
    assert sorted(source[i]["label"] for i in range(3)) == [[], [7, 8], [9]]


# ---- ObjectNet.


def test_objects_get_the_classes_that_the_authors_map_to_them(objectnet):
    variant = open_variant("objectnet", str(objectnet))
    source = variant.source
    assert len(source) == 2 * 113
    assert {folder_of(source, i) for i in range(len(source))} == set(OBJECTNET["objects"])
    for i in range(len(source)):
        number = OBJECTNET["objects"][folder_of(source, i)][1]
        expected = {int(c) for c, each in OBJECTNET["imagenet_to_objectnet"].items() if each == number}
        assert set(source[i]["label"]) == expected
    assert (variant.classes, source.max_labels, source.num_classes) == (None, 3, 1000)


def test_red_border_is_cut_off(objectnet):
    source = open_variant("objectnet", str(objectnet.parent)).source
    image = source[0]["image"]
    assert image.shape == (4, 7, 3)  # of 6 x 9 within a border of 1, of which 2 are cut
    np.testing.assert_array_equal(
        image, random_pixels(list(OBJECTNET["objects"]).index("alarm_clock"), 6, 9)[1:-1, 1:-1]
    )


def test_pipeline_sees_decoded_images_and_several_labels(objectnet):
    source = open_variant("objectnet", str(objectnet)).source
    indices = [0, len(source) - 1]
    batch, bad = BatchLoader(source, EvalTransform(4), num_threads=2).load(indices)
    assert not bad
    for row, index in enumerate(indices):
        labels = list(source[index]["label"])
        assert batch["label"][row].tolist() == labels + [-1] * (3 - len(labels))
        np.testing.assert_array_equal(batch["image"][row], EvalTransform(4)(source[index]["image"]))


def test_image_that_is_all_border_cannot_be_read(tmp_path):
    root = write_objectnet(tmp_path / "objectnet-1.0", others=())
    (root / "images" / "alarm_clock" / "0000.png").write_bytes(png(np.zeros((4, 9, 3), np.uint8)))
    with pytest.raises(ImageError, match="4 x 9 pixels is nothing but border"):
        open_variant("objectnet", str(root)).source[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, overlap: overlap.popitem(), "has 112 objects; 113 overlap with ImageNet"),
        (lambda folder, overlap: overlap.update(Wok="wok; walk"), "maps 'Wok' to 'walk', unknown in ImageNet"),
        (lambda folder, overlap: overlap.update(Wok="crane"), "maps 'Wok' to 'crane', unknown in ImageNet"),
        (lambda folder, overlap: overlap.update(Unicorn="wok"), "has objects that .* does not have: 'Unicorn'"),
        (lambda folder, overlap: overlap.update(Wok=909), "should be a JSON object of names by names"),
        (lambda folder, overlap: folder.update(woks=folder.pop("wok")), "lacks 1 folders: 'woks'"),
    ],
    ids=["too few", "unknown words", "words of two classes", "unknown object", "numbers", "missing folder"],
)
def test_mapping_that_is_something_else_is_refused(tmp_path, change, message):
    root = tmp_path / "objectnet-1.0"
    for folder in OBJECTNET["objects"]:
        (root / "images" / folder).mkdir(parents=True)
    folders = {folder: label for folder, (label, *_) in OBJECTNET["objects"].items()}
    overlap = {label: words for label, _, words in OBJECTNET["objects"].values()}
    change(folders, overlap)
    (root / "mappings").mkdir()
    (root / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(folders))
    (root / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps(overlap))
    with pytest.raises(UserError, match=message):
        open_variant("objectnet", str(root))


def test_missing_mapping_says_where_to_get_it(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*folder_to_objectnet_label.json.*objectnet.dev/download.html"):
        open_variant("objectnet", str(tmp_path))


def test_place_without_objectnets_images_is_refused(tmp_path):
    (tmp_path / "objectnet-1.0.zip").write_bytes(b"")
    for place in (tmp_path, tmp_path / "objectnet-1.0.zip"):
        with pytest.raises(UserError, match=r"has no folder images/.*password.*unzip"):
            open_variant("objectnet", str(place))
    with pytest.raises(UserError, match="TFDS has no ObjectNet"):
        open_variant("objectnet", "tfds:objectnet")


# ---- The authors' protocols, once more in numpy, on random logits.


def random_logits(path, right):
    """Logits of an image, which are the same for both; half of the time one of the right classes is likely."""
    rng = np.random.default_rng(list(path.encode()))
    logits = rng.normal(size=1000)
    if rng.random() < 0.5:
        logits[rng.choice(sorted(right))] += 2.5
    return logits


def evaluated(variant, logits_of):
    """Top-1 and top-5 accuracy as `Accuracy` has them: other classes cannot win."""
    logits = np.stack(
        [logits_of("/".join(variant.source.where(i).split("/")[-2:])) for i in range(len(variant.source))]
    )
    if variant.classes is not None:
        logits[:, np.setdiff1d(np.arange(1000), variant.classes)] = -np.inf
    labels = [variant.source[i]["label"] for i in range(len(variant.source))]
    rows = [[each] if isinstance(each, int) else list(each) for each in labels]
    padded = jnp.array([row + [-1] * (3 - len(row)) for row in rows])
    top5 = np.argsort(-logits, axis=1)[:, :5]
    return float(is_correct(jnp.array(logits), padded).mean()), np.mean(
        [bool(set(row) & set(top.tolist())) for row, top in zip(rows, top5, strict=True)]
    )


def test_imagenet_r_accuracy_matches_its_authors_protocol(renditions):
    def logits_of(path):
        return random_logits(path, [IDS.index(path.split("/")[0])])

    # hendrycks/imagenet-r, eval.py: the columns of the classes that are there, in the order of WordNet ids; a target
    # is the number of its folder among the sorted folders.
    folders = sorted(path.name for path in renditions.iterdir() if path.is_dir())
    mask = np.isin(IDS, folders)
    right = []
    for target, folder in enumerate(folders):
        for image in (renditions / folder).iterdir():
            right.append(np.argsort(-logits_of(f"{folder}/{image.name}")[mask])[:5] == target)
    top1, top5 = evaluated(open_variant("imagenet_r", str(renditions)), logits_of)
    assert top1 == pytest.approx(np.mean([each[0] for each in right]))
    assert top5 == pytest.approx(np.mean([each.any() for each in right]))
    assert 0.1 < top1 < top5 < 0.9  # neither all nor nothing


def test_objectnet_accuracy_matches_its_authors_protocol(objectnet):
    to_objectnet = {int(label): number for label, number in OBJECTNET["imagenet_to_objectnet"].items()}
    numbers = {folder: number for folder, (_, number, _) in OBJECTNET["objects"].items()}

    def logits_of(path):
        number = numbers[path.split("/")[0]]
        return random_logits(path, [label for label, each in to_objectnet.items() if each == number])

    # abarbu/objectnet-template-pytorch, objectnet_eval.py and validate_and_score.py: the five likeliest of all 1,000
    # classes, turned into numbers of objects, -1 where a class is none; right is the object's own number.
    first, among_five = [], []
    for folder, number in numbers.items():
        for image in (objectnet / "images" / folder).iterdir():
            predicted = [to_objectnet.get(int(c), -1) for c in np.argsort(-logits_of(f"{folder}/{image.name}"))[:5]]
            first.append(predicted[0] == number)
            among_five.append(number in predicted)
    top1, top5 = evaluated(open_variant("objectnet", str(objectnet)), logits_of)
    assert (top1, top5) == pytest.approx((np.mean(first), np.mean(among_five)))
    assert 0.05 < top1 < top5 < 0.9
