"""Opens ImageNet's other test sets, with labels among ImageNet's 1,000 classes (docs/imagenet_variants.md).

Reads them as their authors publish them or as TFDS prepares them, and compares their classes with the published ones: a
test set that lacks a class would give a plausible but wrong number.
"""

import concurrent.futures
import dataclasses
import logging
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import cast

from vit_jax.console import num_cpus, show_names
from vit_jax.data import transforms
from vit_jax.data.class_names import class_names, wordnet_ids
from vit_jax.data.imagenet_test_sets import IMAGENET_TEST_SETS, NUM_CLASSES
from vit_jax.data.sources import find_path, open_source
from vit_jax.data.sources.base import Example, MissingDataError, Numbers, Source, fingerprint_of
from vit_jax.data.sources.folders import ImageFolderSource
from vit_jax.data.sources.real_labels import RealLabels, load_real_labels
from vit_jax.data.sources.splits import ALL
from vit_jax.data.sources.tfds import prepared_folder
from vit_jax.data.sources.trees import folders_in, open_tree
from vit_jax.errors import UserError, unknown_name
from vit_jax.json_files import read_object

logger = logging.getLogger(__name__)

_TFDS = "tfds:"
_IMAGENET = "imagenet2012"

# ObjectNet's images have a red border, a sign that they must not be trained on. The licence says "1 pixel" (quoted on
# the card of timm/objectnet on huggingface.co); the authors' loader cuts 2 (abarbu/objectnet-template-pytorch,
# objectnet_pytorch_dataloader.py), as do other evaluations.
OBJECTNET_BORDER = 2


@dataclasses.dataclass(frozen=True)
class VariantData:
    """A test set for models with ImageNet's 1,000 classes.

    Attributes:
      source: its images, labelled with ImageNet's classes. Any of an image's labels is right.
      classes: the classes to choose among, ascending; None: all 1,000.
    """

    source: Source
    classes: tuple[int, ...] | None


def open_variant(
    name: str, place: str, *, validation: str | None = None, validation_split: str = "validation"
) -> VariantData:
    """Opens one of ImageNet's other test sets. Nothing is downloaded or unpacked.

    Args:
      name: one of `IMAGENET_TEST_SETS`.
      place: its location, one of
        - "tfds:<name>[/<config>][:<version>]", or a folder that TFDS has prepared; TFDS has no ObjectNet;
        - the folder that the authors' archive unpacks to, or the one around it; or a zip file, except of ObjectNet;
        - for "real", `real.json`, or "tfds:imagenet2012_real", which has the images as well.
        A relative path that does not exist is also searched for in `$VIT_JAX_DATA`.
      validation: for "real" with `real.json`: the data set that the labels are for; see `open_source`.
      validation_split: its split.

    Returns:
      the test set. Warns if the number of images is not the published one.

    Raises:
      MissingDataError: it is missing.
      UserError: the name is unknown, or the data are incomplete or another data set.
    """
    if name not in IMAGENET_TEST_SETS:
        raise unknown_name("variant of ImageNet", name, IMAGENET_TEST_SETS)
    classes: tuple[int, ...] | None = None
    source: Source
    if name == "real":
        source = _open_real(place, validation, validation_split)
    elif name == "objectnet":
        source = _open_objectnet(place)
    else:
        if _is_prepared(place):
            source = _open_prepared(name, place)
            occurring = _labels_that_occur(source)
        else:
            source = _open_folders(name, place)
            occurring = source.occurring
        published = IMAGENET_TEST_SETS[name]
        if len(occurring) != published.num_folders:
            raise UserError(
                f"{place} has images of {len(occurring)} classes; {name} has {published.num_folders}. Copy or unpack "
                f"all of it; it is from {published.url}."
            )
        # With all 1,000 logits a prediction may be a class that no image has. The authors leave those out: eval.py of
        # hendrycks/imagenet-r (imagenet_r_mask) and of hendrycks/natural-adv-examples (indices_in_1k).
        classes = occurring if len(occurring) < NUM_CLASSES else None
    expected = IMAGENET_TEST_SETS[name].num_images
    if len(source) != expected:
        logger.warning(
            "%s: %s has %d images, the published test set %d. Numbers of the two cannot be compared.",
            *(name, place, len(source), expected),
        )
    return VariantData(source, classes)


# ---- Prepared by TFDS.


def _is_prepared(place: str) -> bool:
    if place.startswith(_TFDS):
        return True
    path = find_path(place)
    return path is not None and prepared_folder(path) is not None


def _open_prepared(name: str, place: str, split: str = "test", label_key: str | None = None) -> Source:
    how = f"It is prepared by: python -m vit_jax.data.prepare tfds {place.removeprefix(_TFDS).partition(':')[0]}"
    source = open_source(place, split, how, label_key=label_key)
    # Labels are ImageNet's numbers in all of them: the builders in tensorflow/datasets share imagenet2012's list of
    # names, which are WordNet ids.
    if list(source.class_names or ()) != list(wordnet_ids(_IMAGENET)):
        raise UserError(
            f"{place} should have ImageNet's 1,000 WordNet ids as its classes, as TFDS's {name} has; it has "
            f"{source.num_classes} classes{f', such as {source.class_names[0]!r}' if source.class_names else ''}."
        )
    return source


def _labels_that_occur(source: Source) -> tuple[int, ...]:
    """Reads all records, because TFDS's file names do not tell the classes; decodes no image."""
    with concurrent.futures.ThreadPoolExecutor(num_cpus()) as pool:
        labels = pool.map(lambda index: source[index]["label"], range(len(source)))
        return tuple(sorted({cast(int, label) for label in labels}))


# ---- As the authors publish them.


class _ImageNetLabels:
    """Images in folders, labelled with ImageNet's classes."""

    exif_orientation = False  # the published numbers are of images as they are stored

    def __init__(
        self, folders: ImageFolderSource, classes: Mapping[str, tuple[int, ...]], *, name: str, border: int = 0
    ):
        """Takes ImageNet's classes by folder. Pixels of a border are cut off at each side, which decodes the images."""
        self._folders, self._border = folders, border
        self._labels = [classes[folder] for folder in folders.class_names or ()]
        self.name, self.split, self.splits = name, "test", ["test"]
        self.class_names, self.num_classes = wordnet_ids(_IMAGENET), NUM_CLASSES
        self.max_labels = max(map(len, self._labels))
        self.occurring = tuple(sorted({label for labels in self._labels for label in labels}))

    def __len__(self) -> int:
        return len(self._folders)

    def __getitem__(self, index: int) -> Example:
        example = self._folders[index]
        del example["exif_orientation"]
        labels = self._labels[cast(int, example["label"])]
        if border := self._border:
            image = transforms.decode(cast(bytes, example["image"]))
            if min(image.shape[:2]) <= 2 * border:
                height, width, _ = image.shape
                raise transforms.ImageError(f"an image of {height} x {width} pixels is nothing but border")
            example["image"] = image[border:-border, border:-border]
        example["label"] = labels if self.max_labels > 1 else labels[0]
        return example

    def parts(self) -> list[tuple[Source, Numbers]]:
        """The images in the folders."""
        return [(self._folders, range(len(self)))]

    def fingerprint(self) -> str:
        """Changes with the list of files and with their labels."""
        return fingerprint_of([self._folders.fingerprint(), self._labels, self._border])

    def where(self, index: int) -> str:
        """The path of the image."""
        return self._folders.where(index)


def _open_folders(name: str, place: str) -> _ImageNetLabels:
    path, published = _existing(name, place), IMAGENET_TEST_SETS[name]
    ids = wordnet_ids(_IMAGENET)
    if name == "imagenet_v2":
        # Folders are called 0 to 999 after the class; sorted as text, 10 comes before 2 (tensorflow/datasets,
        # imagenet_v2_dataset_builder.py).
        classes = {str(label): (label,) for label in range(NUM_CLASSES)}
        called = "after classes, '0' to '999'"
    else:
        classes = {wordnet_id: (label,) for label, wordnet_id in enumerate(ids)}
        called = f"after WordNet ids of ImageNet, such as {ids[0]!r}"
    expected = (
        f"{name} has {published.num_folders:,} folders called {called}, with the images right in them; it is from "
        f"{published.url}."
    )
    folders = ImageFolderSource(*_around_classes(path, classes, expected))
    if unknown := [folder for folder in folders.class_names or () if folder not in classes]:
        raise UserError(f"{path} has folders that should not be there: {show_names(unknown)}. {expected}")
    return _ImageNetLabels(folders, classes, name=str(path))


def _existing(name: str, place: str) -> pathlib.Path:
    path = find_path(place)
    if path is None:
        raise MissingDataError(f"{name} is not at {place!r}. It is from {IMAGENET_TEST_SETS[name].url}.")
    return pathlib.Path(os.path.abspath(path))  # a relative path may not contain the name of its last folder


def _around_classes(path: pathlib.Path, classes: Collection[str], expected: str) -> tuple[pathlib.Path, str]:
    """Finds the data set and split, for `ImageFolderSource`, whose folders are the classes."""
    try:
        folders = folders_in(open_tree(path), "")
    except (OSError, UserError) as error:
        advice = " Unpack it: tar -xf" if ".tar" in path.name or path.suffix == ".tgz" else ""
        raise UserError(f"{error}{advice} {expected}") from error
    if any(folder in classes for folder in folders):
        return (path.parent, path.name) if path.is_dir() else (path, ALL)
    if len(folders) != 1:
        raise UserError(f"{path} has other folders than expected: {show_names(folders) or 'none'}. {expected}")
    return path, folders[0]


# ---- ReaL.


def _open_real(place: str, validation: str | None, split: str) -> Source:
    if _is_prepared(place):
        return _open_prepared("imagenet2012_real", place, split, label_key="real_label")
    path = _existing("real", place)
    if validation is None:
        raise UserError(f"{place} has labels of ImageNet's validation images; name the data set that has the images.")
    return RealLabels(open_source(validation, split), load_real_labels(path))


# ---- ObjectNet.

_FOLDERS, _OVERLAP = "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"


def _open_objectnet(place: str) -> Source:
    published = IMAGENET_TEST_SETS["objectnet"]
    expected = (
        f"ObjectNet is a folder with images/<object>/<image>.png and mappings/, which has {_FOLDERS} and {_OVERLAP}. "
        f"Get it from {published.url}, which has the password for unpacking it: unzip objectnet-1.0.zip"
    )
    if place.startswith(_TFDS):
        raise UserError(f"TFDS has no ObjectNet. {expected}")
    path = _existing("objectnet", place)
    root = next((each for each in (path, path / "objectnet-1.0") if (each / "images").is_dir()), None)
    if root is None:
        raise UserError(f"{path} has no folder images/. {expected}")
    classes = _objectnet_classes(root / "mappings", expected)
    if missing := sorted(folder for folder in classes if not (root / "images" / folder).is_dir()):
        raise UserError(f"{root / 'images'} lacks {len(missing)} folders: {show_names(missing)}. {expected}")
    folders = ImageFolderSource(root, "images", only=classes)
    return _ImageNetLabels(folders, classes, name=str(root), border=OBJECTNET_BORDER)


def _objectnet_classes(mappings: pathlib.Path, expected: str) -> dict[str, tuple[int, ...]]:
    """Maps each ObjectNet folder that overlaps with ImageNet to ImageNet's classes."""
    # The first file names the object in each folder, the second the classes of an object by their words. These words
    # are unique and give the numbers of the authors' imagenet_pytorch_id_to_objectnet_id.json
    # (abarbu/objectnet-template-tensorflow, mapping_files).
    labels = _read_mapping(mappings / _FOLDERS, expected)
    overlap = _read_mapping(mappings / _OVERLAP, expected)
    folder_of = {label: folder for folder, label in labels.items()}
    if unknown := sorted(set(overlap) - set(folder_of)):
        raise UserError(f"{mappings / _OVERLAP} has objects that {_FOLDERS} does not have: {show_names(unknown)}.")
    words_of = class_names(_IMAGENET)
    number_of = {words: number for number, words in enumerate(words_of) if words_of.count(words) == 1}
    classes = {}
    for label, words in overlap.items():
        several = [each.strip() for each in words.split(";")]
        if unknown := [each for each in several if each not in number_of]:
            raise UserError(f"{mappings / _OVERLAP} maps {label!r} to {show_names(unknown)}, unknown in ImageNet.")
        classes[folder_of[label]] = tuple(number_of[each] for each in several)
    if len(classes) != (overlapping := IMAGENET_TEST_SETS["objectnet"].num_folders):
        raise UserError(
            f"{mappings / _OVERLAP} has {len(classes)} objects; {overlapping} overlap with ImageNet. {expected}"
        )
    return classes


def _read_mapping(path: pathlib.Path, expected: str) -> dict[str, str]:
    try:
        content = read_object(path)
    except UserError as error:
        raise UserError(f"{error} {expected}") from error
    if not all(isinstance(value, str) for value in content.values()):
        raise UserError(f"{path} should be a JSON object of names by names. {expected}")
    return content
