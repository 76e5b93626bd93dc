"""Folders and zip files of images."""

import bisect
import copy
import functools
import itertools
import os
import pathlib
import unicodedata
from collections.abc import Callable, Collection, Sequence

import numpy as np

from vit_jax.console import show_name, show_names
from vit_jax.data.sources.base import BadRecordError, Example, Extent, fingerprint_of
from vit_jax.data.sources.splits import ALL, check_no_class_is_empty, for_testing, split_role
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

_MOST_AROUND = 4  # nested folders above the splits to search


class ImageFolderSource:
    """`<split>/<class>/<image>` in a folder or in a zip file, which is not unpacked.

    Without splits, `<class>/<image>`, all images are one split, "all". Classes and images are sorted by name, so labels
    and order are the same everywhere. Splits may be in a nested folder. Litter (`trees.is_litter`) and files beside the
    class folders are ignored.

    Names are compared in Unicode's composed form (NFC), and split names in any case. Class names are printable text:
    bytes that are not UTF-8 are escaped (`console.show_name`).

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
        only: Collection[str] | None = None,
    ):
        """Lists the files of the split. Reads no file, except the first bytes of those without an image suffix.

        Args:
          path: of the folder or zip file.
          split: its name, or "all" if there are folders of classes and no splits.
          class_names: names by label, such as the classes of the training split. The split may lack some of them.
            None: the folders of the split.
          classes_may_be_empty: whether a class may have no image. Always true with `class_names`, and in splits that
            are named as for testing or validation.
          only: folders of classes to read; None: all.

        Raises:
          UserError: unknown split, an empty class, a class that is not in `class_names`, a file that is not an image,
            or a zip file that is encrypted or compressed by another method than "deflate".
        """
        self._root = pathlib.Path(path)
        self.name: str = show_name(str(path))
        self.split = split
        self.class_names: Sequence[str] | None = ()
        self._zip: ZipMembers | None = None
        self._names: list[str] = []  # file names of each class, joined by "/"
        self._with_links: set[str] = set()  # classes with files that are links
        try:
            tree = open_tree(self._root)
            around, inner, self.splits = self._find_split(tree)
            self._classes_at = around + inner  # the folder of the classes, relative to the root
            self._base = inner  # the same, relative to the folder of the splits
            self._list(tree, only)
        except OSError as error:
            raise unreadable(self._root, error) from error
        if isinstance(tree, ZipTree):
            self._zip = tree.pack([self._file(*self._locate(index)) for index in range(len(self))])
        self._labels: Sequence[int] = range(len(self._names))  # by folder
        self.num_classes: int | None = len(self._folders)
        self.max_labels = 1
        if class_names is None and not classes_may_be_empty and not for_testing(split):
            check_no_class_is_empty(self.labels(), self.class_names, f"{self.name}, split {self.split!r},")
        if class_names is not None:
            self._relabel(class_names)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        folder, name = self._locate(index)
        try:
            if self._zip is None:
                content = read_regular(f"{self._root}/{self._file(folder, name)}", MAX_FILE_BYTES)
            else:
                content = self._zip.read(index)
        except Exception as error:  # zlib raises many kinds of errors for damaged files
            raise BadRecordError(f"cannot read {self.where(index)}: {error}.") from error
        return {
            "image": content,
            "label": self._labels[folder],
            "file_name": show_name(name),
            "exif_orientation": self.exif_orientation,
        }

    def labels(self) -> np.ndarray:
        """The labels of all examples, int64 `[examples]`; reads nothing."""
        return np.repeat(np.asarray(self._labels, np.int64), np.diff(self._ends, prepend=0))

    def extents(self) -> list[Extent]:
        """The class folders, with links resolved and hashes of file names as numbers; or the zip file."""
        if self._zip is not None:
            offsets = self._zip.offsets
            return [Extent(os.path.realpath(self._root), len(self), lambda: offsets)]
        extents = []
        for folder, files in zip(self._folders, self._names, strict=True):
            place = os.path.realpath(self._root / self._classes_at / folder)
            names = files.split("/")
            if folder in self._with_links:
                paths = (os.path.split(os.path.realpath(f"{place}/{name}")) for name in names)
                for target, group in itertools.groupby(paths, key=lambda path: path[0]):
                    numbers = [hash(name) for _, name in group]
                    extents.append(Extent(target, len(numbers), functools.partial(np.array, numbers)))
            elif files:
                extents.append(Extent(place, len(names), functools.partial(_hash_names, files)))
        return extents

    def fingerprint(self) -> str:
        """Changes with the list of files and their labels."""
        folders = [f"{self._base}{inside(name)}" for name in self._folders]
        files = [
            composed(folder + names.replace("/", f"\n{folder}"))
            for folder, names in zip(folders, self._names, strict=True)
            if names
        ]
        own_labels = list(self._labels) == list(range(len(folders)))
        return fingerprint_of(files if own_labels else [*files, self._labels])

    def where(self, index: int) -> str:
        """The printable path of the image; in a zip file, relative to the splits."""
        folder, name = self._locate(range(len(self))[index])
        if self._zip is None:
            return show_name(str(self._root / self._file(folder, name)))
        return f"'{show_name(f'{self._base}{inside(self._folders[folder])}{name}')}' in {self.name}"

    def member(self, index: int) -> str:
        """`<class>/<image>`, printable."""
        folder, name = self._locate(range(len(self))[index])
        return show_name(f"{inside(composed(self._folders[folder]))}{name}")

    def with_classes(self, class_names: Sequence[str]) -> "ImageFolderSource":
        """Relabels the images by other class names; raises UserError if an image belongs to none of them."""
        other = copy.copy(self)
        other._relabel(class_names)
        return other

    def _relabel(self, class_names: Sequence[str]) -> None:
        labels = {composed(name): label for label, name in enumerate(class_names)}
        own = [show_name(composed(folder)) for folder in self._folders]
        if unknown := [name for name, files in zip(own, self._names, strict=True) if files and name not in labels]:
            raise UserError(
                f"{self.name}, split {self.split!r}, has different classes from those it is used with: it has "
                f"{show_names(unknown)}, and they are {show_names(list(class_names))}. Remove or rename the folders, "
                "or add the classes to the training images."
            )
        self._labels = [labels.get(name, 0) for name in own]  # no example has the label of an empty folder
        self.class_names, self.num_classes = list(class_names), len(class_names)

    def _locate(self, index: int) -> tuple[int, str]:
        """The number of the folder and the name of the file."""
        folder = bisect.bisect_right(self._ends, index)
        names, start = self._names[folder], int(self._starts[index])
        end = names.find("/", start)
        return folder, names[start:] if end < 0 else names[start:end]

    def _file(self, folder: int, name: str) -> str:
        return f"{self._classes_at}{inside(self._folders[folder])}{name}"

    def _find_split(self, tree: Tree) -> tuple[str, str, list[str]]:
        """Returns what `_find_classes` does."""
        return _find_classes(tree, self.split, self.name)

    def _keep(self, folders: list[str], files_of: Callable[[str], list[str]]) -> None:
        """Keeps the names of folders and of their files, both sorted."""
        self._folders = folders
        counts, starts = [], [np.zeros(0, np.uint32)]
        for files in map(files_of, folders):
            # Joined at once: lists of tens of millions of strings would take gigabytes.
            self._names.append("/".join(files))
            counts.append(len(files))
            lengths = np.fromiter(map(len, files), np.uint32, len(files)) + 1  # with the "/"
            starts.append(np.cumsum(lengths, dtype=np.uint32) - lengths)
        self._starts = np.concatenate(starts)
        self._ends = list(itertools.accumulate(counts))

    def _list(self, tree: Tree, only: Collection[str] | None) -> None:
        """Finds the classes and their files, and checks them."""
        misplaced, strangers = [], []

        def files_of(name: str) -> list[str]:
            files, folder = [], f"{self._classes_at}{name}/"
            for entry, kind in tree.entries(folder):
                if kind is Kind.FOLDER:
                    misplaced.append(f"{self._base}{name}/{entry}/")
                elif kind.is_file and is_image(tree, folder + entry):
                    files.append(entry)
                    if kind is Kind.LINK:
                        self._with_links.add(name)
                else:
                    strangers.append(f"{self._base}{name}/{entry}")
            return in_order(files)

        folders = []
        for entry, kind in tree.entries(self._classes_at):
            if kind is Kind.FOLDER and (only is None or entry in only):
                folders.append(entry)
            elif self._base and kind.is_file and is_image(tree, f"{self._classes_at}{entry}"):
                misplaced.append(f"{self._base}{entry}")
        self._keep(in_order(folders), files_of)
        self.class_names = [show_name(composed(name)) for name in self._folders]

        where = f"{self.name}, split {self.split!r},"
        if misplaced:
            advice = "" if len(self) else f" If these are classes, take {ALL!r} or parts of it, as 'all[:90%]'."
            raise UserError(
                f"{where} should have a folder for each class, with the images right in it "
                f"({self._base}<class>/<image>), but has {show_names(sorted(misplaced))}.{advice}"
            )
        if not self._folders:
            raise UserError(f"{where} is empty; it should have a folder for each class.")
        if strangers:
            raise UserError(
                f"{where} has files that are not images: {show_names(sorted(strangers))}. Remove them; known images "
                f"are {', '.join(IMAGE_SUFFIXES)}."
            )
        by_class = sorted(zip(self.class_names, self._folders, strict=True))
        for (one, folder), (other, other_folder) in itertools.pairwise(by_class):
            if one == other:
                raise UserError(
                    f"{where} has two folders of the class {one!r}, {folder!a} and {other_folder!a}: their names look "
                    "alike but differ in Unicode form. Put their images into one."
                )


def inside(folder: str) -> str:
    """The beginning of paths in a folder; "" is the folder of the splits."""
    return f"{folder}/" if folder else ""


def _hash_names(joined: str) -> np.ndarray:
    return np.array([hash(name) for name in joined.split("/")], np.int64)


# ---- The layout of a tree. The contents of folders determine it, not their names.


def _find_classes(tree: Tree, split: str, name: str) -> tuple[str, str, list[str]]:
    """Returns the folder around the splits, the split's folder in it ("": no splits), and the names of all splits."""
    around, tops, are_classes = _judge(tree, split)
    if are_classes:
        if split != ALL:
            raise UserError(
                f"{name} has no split {split!r}: it has folders of classes ({show_names(tops)}) and no splits. Take "
                f"{ALL!r}, or parts of it such as 'all[:90%]' and 'all[90%:]'."
            )
        return around, "", [ALL]
    if not tops:
        _check_images(tree, around, tops, name)
        raise UserError(f"{name} is empty; images should be in <split>/<class>/, e.g. train/cat/1.jpg.")
    found = match_split(split, tops, name) or match_split(split, folders_in(tree, around), name)
    if found is None:
        _check_images(tree, around, tops, name)
        raise unknown_name(f"split of {name}", split, map(show_name, tops))
    return around, f"{found}/", tops


def list_splits(path: str | os.PathLike[str], *, for_all: bool = False) -> list[str]:
    """Lists the splits of a folder or zip file of images; only "all" if it has class folders and no splits.

    Folders that are named like splits but have images instead of classes, `train/1.jpg` and `test/2.jpg`, count as
    unusable splits, because they are hardly meant as classes. With `for_all`, they do count as classes.

    Args:
      path: of the folder or zip file.
      for_all: whether the split "all" is requested.

    Raises:
      UserError: the folder or zip file cannot be read.
    """
    try:
        tree = open_tree(pathlib.Path(path))
        around, tops, are_classes = _judge(tree, ALL if for_all else "")
        _check_images(tree, around, tops, show_name(str(path)))
    except OSError as error:
        raise unreadable(pathlib.Path(path), error) from error
    return [ALL] if are_classes else tops


def _judge(tree: Tree, split: str) -> tuple[str, list[str], bool]:
    """Finds the folder of the splits or classes, their names, and whether they are classes; `split` may be ""."""
    around = ""
    for _ in range(_MOST_AROUND):
        tops = folders_in(tree, around)
        # A folder of the requested name that has classes is a split. Its neighbours, perhaps thousands, do not matter.
        if split != ALL and any(_key(top) == _key(split) and _holds_images(tree, f"{around}{top}/", 1) for top in tops):
            return around, tops, False
        with_images = [top for top in tops if holds_images(tree, f"{around}{top}/")]
        rest = sorted(set(tops) - set(with_images))
        with_classes = [top for top in rest if _holds_images(tree, f"{around}{top}/", 1)]
        if with_images or with_classes:
            return around, *_splits_or_classes(tops, with_images, with_classes, split)
        inside = tops if len(tops) == 1 else [top for top in tops if _holds_images(tree, f"{around}{top}/", 2)]
        if len(inside) != 1 or _key(inside[0]) == _key(split):
            break
        around += f"{inside[0]}/"
    return "", folders_in(tree, ""), False


def _splits_or_classes(
    tops: list[str], with_images: list[str], with_classes: list[str], split: str
) -> tuple[list[str], bool]:
    """Returns the names of splits or classes, and whether they are classes."""
    named_as_splits = [top for top in with_images if split_role(top)]
    if with_classes and (len(named_as_splits) == len(with_images) or any(map(split_role, with_classes))):
        return sorted({*with_images, *with_classes}), False
    if len(named_as_splits) < len(with_images) or split == ALL:
        return tops, True
    return with_images, False


def _holds_images(tree: Tree, folder: str, depth: int) -> bool:
    """Whether there are images in the folders `depth` levels below a folder."""
    if depth == 0:
        return holds_images(tree, folder)
    try:
        return any(_holds_images(tree, f"{folder}{name}/", depth - 1) for name in folders_in(tree, folder))
    except OSError:  # such as lost+found, which only root can read
        return False


def match_split(split: str, splits: Sequence[str], name: str) -> str | None:
    """Finds a split by name in any case and Unicode form, preferring an exact match."""
    if split in splits:
        return split
    matches = [each for each in splits if _key(each) == _key(split)]
    if len(matches) > 1:
        raise UserError(f"{name} has several splits called {split!r}: {show_names(matches)}. Name one exactly.")
    return matches[0] if matches else None


def _key(name: str) -> str:
    return composed(name).casefold()


def _check_images(tree: Tree, around: str, tops: list[str], name: str) -> None:
    """Raises UserError if there are images but no folders, or folders but no images of a known kind in them."""
    if not tops and holds_images(tree, around):
        raise UserError(
            f"{name} has images but no folders. Where labels are needed, put the images of each class into "
            "<split>/<class>/. To train without labels, set --config.objective=masked_patches and "
            "--config.data.train_split=all."
        )
    if not tops or any(_holds_images(tree, f"{around}{top}/", depth) for top in tops for depth in (0, 1)):
        return
    raise UserError(
        f"{name} has no images that can be read. They should be in <split>/<class>/ or <class>/, e.g. train/cat/1.jpg. "
        f"Known images are {', '.join(IMAGE_SUFFIXES)}; convert others."
    )


def composed(name: str) -> str:
    """Converts a name to Unicode's composed form (NFC). macOS writes the decomposed form, which looks the same."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def in_order(names: list[str]) -> list[str]:
    """Sorts names by their composed form, so that order and labels are the same on all systems."""
    return sorted(names) if "".join(names).isascii() else sorted(names, key=lambda name: (composed(name), name))
