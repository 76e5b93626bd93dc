"""Folders and zip files of images."""

import bisect
import copy
import dataclasses
import functools
import itertools
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from vit_jax.console import show_name, show_names
from vit_jax.data.sources.base import BadRecordError, Example, Extent, fingerprint_of
from vit_jax.data.sources.splits import ALL, for_testing, split_role
from vit_jax.data.sources.trees import (
    IMAGE_SUFFIXES,
    MAX_FILE_BYTES,
    Kind,
    Tree,
    ZipMembers,
    ZipTree,
    folders_in,
    holds_images,
    is_image,
    open_tree,
    unreadable,
)
from vit_jax.errors import UserError, unknown_name
from vit_jax.files import read_regular

_MOST_AROUND = 4  # folders around the splits that are looked through


class ImageFolderSource:
    """`<split>/<class>/<image>` in a folder or in a zip file, which need not be unpacked.

    Without splits, `<class>/<image>`, all is one split, "all". Classes and images are sorted by name, so labels and
    order are the same everywhere. A single folder around the splits is looked through. What systems leave lying about
    (`trees.is_litter`) and files beside the folders of classes are passed over.

    Names are compared in Unicode's composed form (NFC), and those of splits without regard to case. Class names are
    text that can be shown: bytes that are not UTF-8 are escaped (`console.show_name`).

    An image takes the bytes of its name and 5 more of memory, and 21 more in a zip file.
    """

    exif_orientation = True  # of all examples

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str,
        *,
        class_names: Sequence[str] | None = None,
        classes_may_be_empty: bool = False,
    ):
        """Lists the files of the split; reads none, unless a file's name does not say whether it is an image.

        Args:
          path: of the folder or zip file.
          split: its name, or "all" if there are folders of classes and no splits.
          class_names: what labels count, such as the classes of the training split. The split may lack some of them.
            None: the classes are the folders of the split.
          classes_may_be_empty: whether a class may have no image; always so with `class_names`, and in splits that by
            their name are for testing or validation.

        Raises:
          UserError: unknown split, an empty class, a class that is not among `class_names`, a file that is not an
            image, or a zip file that is encrypted or compressed otherwise than by "deflate".
        """
        self._root = pathlib.Path(path)
        self.name: str = show_name(str(path))
        self.split = split
        self.class_names: Sequence[str] = ()
        self._zip: ZipMembers | None = None
        self._names: list[str] = []  # by class, joined: names of files have no "/" in them
        self._with_links: set[str] = set()  # folders with files that are links
        try:
            tree = open_tree(self._root)
            layout = find_layout(tree, split, self.name)
            self._classes_at = layout.base  # the folder of the classes, from the root on
            self._base = layout.base.removeprefix(layout.around)  # from the splits on
            self.splits: Sequence[str] = layout.splits
            self._list(tree)
        except OSError as error:
            raise unreadable(self._root, error) from error
        empty = [self.class_names[number] for number, files in enumerate(self._names) if not files]
        if empty and class_names is None and not classes_may_be_empty and not for_testing(split):
            raise UserError(
                f"{self.name}, split {self.split!r}, has classes without images: {show_names(empty)}. Add images or "
                "remove the folders."
            )
        if isinstance(tree, ZipTree):
            self._zip = tree.pack([self._file(*self._locate(index)) for index in range(len(self))])
        self._labels: Sequence[int] = range(len(self._names))  # by class of the split
        self.num_classes, self.max_labels = len(self.class_names), 1
        if class_names is not None:
            self._relabel(class_names)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        number, name = self._locate(index)
        try:
            if self._zip is None:
                content = read_regular(f"{self._root}/{self._file(number, name)}", MAX_FILE_BYTES)
            else:
                content = self._zip.read(index)
        except Exception as error:  # whatever a damaged file does to zlib
            raise BadRecordError(f"cannot read {self.where(index)}: {error}.") from error
        return {
            "image": content,
            "label": self._labels[number],
            "file_name": show_name(name),
            "exif_orientation": self.exif_orientation,
        }

    def labels(self) -> np.ndarray:
        """The labels of all examples, int64 `[examples]`; reads none."""
        return np.repeat(np.asarray(self._labels, np.int64), np.diff(self._ends, prepend=0))

    def extents(self) -> list[Extent]:
        """The folders of the classes, where a file is known by its name; links are followed. Or the zip file."""
        if self._zip is not None:
            offsets = self._zip.offsets
            return [Extent(os.path.realpath(self._root), len(self), lambda: offsets)]
        extents = []
        for number, name in enumerate(self._folders):
            folder = os.path.realpath(self._root / self._classes_at / name)
            if name in self._with_links:
                paths = (os.path.realpath(f"{folder}/{file}") for file in self._names[number].split("/"))
                for place, group in itertools.groupby(map(os.path.split, paths), key=lambda path: path[0]):
                    numbers = np.array([hash(file) for _, file in group])
                    extents.append(Extent(place, len(numbers), functools.partial(np.asarray, numbers)))
            elif self._names[number]:
                size = self._ends[number] - (self._ends[number - 1] if number else 0)
                extents.append(Extent(folder, size, functools.partial(self._hashes, number)))
        return extents

    def _hashes(self, number: int) -> np.ndarray:
        names = self._names[number].split("/")
        return np.fromiter(map(hash, names), np.int64, len(names))

    def fingerprint(self) -> str:
        """Changes when the list of files does, or their labels."""
        folders = [f"{self._base}{name}/" for name in self._folders]
        files = [
            composed(folder + names.replace("/", f"\n{folder}"))
            for folder, names in zip(folders, self._names, strict=True)
            if names
        ]
        own_labels = list(self._labels) == list(range(len(folders)))
        return fingerprint_of(files if own_labels else [*files, self._labels])

    def where(self, index: int) -> str:
        """The path of the image, as it can be shown; from the splits on if it is in a zip file."""
        number, name = self._locate(range(len(self))[index])
        if self._zip is None:
            return show_name(str(self._root / self._file(number, name)))
        return f"'{show_name(f'{self._base}{self._folders[number]}/{name}')}' in {self.name}"

    def member(self, index: int) -> str:
        """`<class>/<image>`, as it can be shown."""
        number, name = self._locate(range(len(self))[index])
        return show_name(f"{composed(self._folders[number])}/{name}")

    def with_classes(self, class_names: Sequence[str]) -> "ImageFolderSource":
        """The same images with labels that count other classes, by name.

        Raises:
          UserError: an image is of none of them.
        """
        other = copy.copy(self)
        other._relabel(class_names)
        return other

    def _relabel(self, class_names: Sequence[str]) -> None:
        numbers = {composed(name): number for number, name in enumerate(class_names)}
        own = [show_name(composed(folder)) for folder in self._folders]
        filled = [name for name, files in zip(own, self._names, strict=True) if files]
        if unknown := [name for name in filled if name not in numbers]:
            raise UserError(
                f"{self.name}, split {self.split!r}, has different classes from those it is used with: it has "
                f"{show_names(unknown)}, and they are {show_names(list(class_names))}. Remove or rename the folders, "
                "or add the classes to the training images."
            )
        self._labels = [numbers.get(name, 0) for name in own]  # an empty folder has no labels
        self.class_names, self.num_classes = list(class_names), len(class_names)

    def _locate(self, index: int) -> tuple[int, str]:
        """Class of the split, by number, and name of an image."""
        number = bisect.bisect_right(self._ends, index)
        names, start = self._names[number], int(self._starts[index])
        end = names.find("/", start)
        return number, names[start:] if end < 0 else names[start:end]

    def _file(self, number: int, name: str) -> str:
        return f"{self._classes_at}{self._folders[number]}/{name}"

    def _list(self, tree: Tree) -> None:
        misplaced, strangers = [], []

        def files_of(name: str) -> list[str]:
            files, place = [], f"{self._classes_at}{name}/"
            for entry, kind in tree.entries(place):
                if kind is Kind.FOLDER:
                    misplaced.append(f"{self._base}{name}/{entry}/")
                elif kind.is_file and is_image(tree, f"{place}{entry}"):
                    files.append(entry)
                    if kind is Kind.LINK:
                        self._with_links.add(name)
                else:
                    strangers.append(f"{self._base}{name}/{entry}")
            return in_order(files)

        classes = []
        for entry, kind in tree.entries(self._classes_at):
            if kind is Kind.FOLDER:
                classes.append(entry)
            elif self._base and kind.is_file and is_image(tree, f"{self._classes_at}{entry}"):
                misplaced.append(f"{self._base}{entry}")
        self._keep(((name, files_of(name)) for name in in_order(classes)), misplaced)
        kept = {f"{self._base}{name}" for name in self._folders}
        if strangers := [place for place in strangers if place.rpartition("/")[0] in kept]:
            raise UserError(
                f"{self.name}, split {self.split!r}, has files that are not images: {show_names(sorted(strangers))}. "
                f"Remove them; known images are {', '.join(IMAGE_SUFFIXES)}."
            )

    def _keep(self, classes: Iterable[tuple[str, list[str]]], misplaced: list[str]) -> None:
        """Keeps the names of classes and of their files, both sorted, and checks that they are as they should be.

        Each class is joined to one string at once: lists of tens of millions of strings would take gigabytes.
        """
        self._folders: list[str] = []
        counts, starts = [], [np.zeros(0, np.uint32)]
        for name, files in classes:
            self._folders.append(name)
            self._names.append("/".join(files))
            counts.append(len(files))
            lengths = np.fromiter(map(len, files), np.uint32, len(files)) + 1  # with the "/"
            starts.append(np.cumsum(lengths, dtype=np.uint32) - lengths)
        self._starts = np.concatenate(starts)
        self._ends = list(itertools.accumulate(counts))
        self.class_names = [show_name(composed(name)) for name in self._folders]

        where = f"{self.name}, split {self.split!r},"
        if misplaced:
            nothing = "" if any(counts) else f" If these are classes, take {ALL!r} or parts of it, as 'all[:90%]'."
            raise UserError(
                f"{where} should hold a folder per class with the images right in it ({self._base}<class>/<image>), "
                f"but has {show_names(sorted(misplaced))}.{nothing}"
            )
        if not self._folders:
            raise UserError(f"{where} is empty; it should hold a folder per class.")
        for (one, folder), (other, other_folder) in itertools.pairwise(
            sorted(zip(self.class_names, self._folders, strict=True))
        ):
            if one == other:
                raise UserError(
                    f"{where} has two folders of the class {one!r}, {folder!a} and {other_folder!a}: their names look "
                    "alike and differ in Unicode form. Put their images into one."
                )


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the folders of a tree are.

    Attributes:
      base: the folder that holds the folders of classes; "" or ending with "/".
      around: the folder around the splits, likewise.
      splits: names of the splits; "all" alone where the folders are classes.
    """

    base: str
    around: str
    splits: list[str]


def find_layout(tree: Tree, split: str, name: str) -> Layout:
    """Finds the folders of classes of a split. What lies in the folders decides, not what they are called.

    Raises:
      UserError: there is no such split, or no image.
    """
    around, splits, are_classes = _judge(tree, split)
    if are_classes:
        if split != ALL:
            raise UserError(
                f"{name} has no split {split!r}: it has folders of classes ({show_names(splits)}) and no splits. Take "
                f"{ALL!r}, or parts of it such as 'all[:90%]' and 'all[90%:]'."
            )
        return Layout(around, around, [ALL])
    if not splits:
        raise UserError(f"{name} is empty; images should lie in <split>/<class>/, e.g. train/cat/1.jpg.")
    found = _match(split, splits, name) or _match(split, folders_in(tree, around), name)
    if found is None:
        _check_images(tree, around, splits, name)
        raise unknown_name(f"split of {name}", split, map(show_name, splits))
    return Layout(f"{around}{found}/", around, splits)


def list_splits(path: str | os.PathLike[str], *, for_all: bool = False) -> list[str]:
    """The splits of a folder or zip file of images, where no name of a split says what is one.

    If there are folders of classes instead of splits, "all" is the only split. Folders that all bear names of splits
    and hold images but no classes, `train/1.jpg` and `test/2.jpg`, are splits, and useless ones: nobody wants to tell
    training images from test images. They are classes only for those who ask for all images.

    Args:
      path: of the folder or zip file.
      for_all: whether the split "all" is asked for.

    Raises:
      UserError: the folder or zip file cannot be read.
    """
    try:
        tree = open_tree(pathlib.Path(path))
        around, splits, are_classes = _judge(tree, ALL if for_all else None)
        _check_images(tree, around, splits, show_name(str(path)))
    except OSError as error:
        raise unreadable(pathlib.Path(path), error) from error
    return [ALL] if are_classes else splits


def _judge(tree: Tree, split: str | None) -> tuple[str, list[str], bool]:
    """The folder around splits or classes, their names, and whether they are classes."""
    around = ""
    for _ in range(_MOST_AROUND):
        tops = folders_in(tree, around)
        # The split that is asked for is one if it has classes. No need to look at its neighbours, perhaps thousands.
        if split not in (None, ALL) and any(
            _holds_classes(tree, f"{around}{top}/") for top in tops if _key(top) == _key(split or "")
        ):
            return around, tops, False
        direct = [top for top in tops if holds_images(tree, f"{around}{top}/")]
        nested = [top for top in tops if top not in set(direct) and _holds_classes(tree, f"{around}{top}/")]
        if direct or nested:
            return around, *_splits_or_classes(tree, around, direct, nested, tops, split)
        inside = tops if len(tops) == 1 else [top for top in tops if _holds_splits(tree, f"{around}{top}/")]
        if len(inside) != 1 or _key(inside[0]) == _key(split or ""):
            break
        around += f"{inside[0]}/"
    return "", folders_in(tree, ""), False


def _splits_or_classes(
    tree: Tree, around: str, direct: list[str], nested: list[str], tops: list[str], split: str | None
) -> tuple[list[str], bool]:
    """Names of splits or classes, and which they are; of `tops`, some hold images, others folders with images."""
    named = [top for top in direct if split_role(top)]  # as splits are
    if nested and (len(named) == len(direct) or any(map(split_role, nested))):
        return sorted({*direct, *nested}), False
    if len(named) < len(direct) or split == ALL:
        return tops, True
    return direct, False


def _holds_classes(tree: Tree, place: str) -> bool:
    """Whether there are folders with images in a folder."""
    try:
        return any(holds_images(tree, f"{place}{name}/") for name in folders_in(tree, place))
    except OSError:  # of somebody else, such as lost+found
        return False


def _holds_splits(tree: Tree, place: str) -> bool:
    try:
        return any(_holds_classes(tree, f"{place}{name}/") for name in folders_in(tree, place))
    except OSError:
        return False


def _match(split: str, splits: Sequence[str], name: str) -> str | None:
    """The split of that name, in any case and Unicode form; an exact match is better than others."""
    if split in splits:
        return split
    matches = [each for each in splits if _key(each) == _key(split)]
    if len(matches) > 1:
        raise UserError(f"{name} has several splits called {split!r}: {show_names(matches)}. Name one exactly.")
    return matches[0] if matches else None


def _key(name: str) -> str:
    return composed(name).casefold()


def _check_images(tree: Tree, around: str, tops: list[str], name: str) -> None:
    """Raises `UserError` if there are folders, but no file in them is an image of a known kind."""
    if not tops or any(
        holds_images(tree, f"{around}{top}/") or _holds_classes(tree, f"{around}{top}/") for top in tops
    ):
        return
    for top in tops:
        for place in (f"{top}/", *(f"{top}/{inner}/" for inner in folders_in(tree, f"{around}{top}/"))):
            files = [each for each, kind in tree.entries(around + place) if kind.is_file]
            if files:
                raise UserError(
                    f"{name} has no images that can be read, but files such as '{show_name(place + min(files))}'. "
                    f"Known images are {', '.join(IMAGE_SUFFIXES)}; convert others."
                )
    raise UserError(f"{name} has no images. They should lie in <split>/<class>/ or <class>/, e.g. train/cat/1.jpg.")


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC). macOS writes the decomposed one, which looks the same."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def in_order(names: list[str]) -> list[str]:
    """Names sorted by their composed form, so that order and labels are the same on all systems."""
    return sorted(names) if "".join(names).isascii() else sorted(names, key=lambda name: (composed(name), name))
