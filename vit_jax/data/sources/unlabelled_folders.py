"""Folders and zip files of images without labels."""

import os
from collections.abc import Collection

import numpy as np

from vit_jax.console import show_names
from vit_jax.data.sources.base import NO_LABEL
from vit_jax.data.sources.folders import ImageFolderSource, in_order, inside, match_split
from vit_jax.data.sources.splits import ALL
from vit_jax.data.sources.trees import IMAGE_SUFFIXES, Kind, Tree, folders_in, is_image
from vit_jax.errors import UserError

_DEEPEST = 20  # nested folders, so that a loop of links ends


class UnlabelledFolderSource(ImageFolderSource):
    """All images in a folder or in a zip file, in folders of any names and depth.

    A split is a folder at the top; "all" is every image. Other files are ignored.
    """

    def __init__(self, path: str | os.PathLike[str], split: str):
        """Lists the files of the split.

        Args:
          path: of the folder or zip file.
          split: its name, or "all".

        Raises:
          UserError: unknown split, no images, or an unusable zip file; see `ImageFolderSource`.
        """
        super().__init__(path, split, classes_may_be_empty=True)
        self._labels = [NO_LABEL] * len(self._folders)
        self.class_names, self.num_classes = None, None

    def labels(self) -> np.ndarray:
        """`NO_LABEL` for each example, int64 `[examples]`."""
        return np.full(len(self), NO_LABEL, np.int64)

    def _find_split(self, tree: Tree) -> tuple[str, str, list[str]]:
        tops = folders_in(tree, "")
        if self.split == ALL:
            return "", "", [ALL]
        found = match_split(self.split, tops, self.name)
        if found is None:
            folders = f"its folders are {show_names(tops)}" if tops else "it has no folders"
            raise UserError(
                f"{self.name} has no split {self.split!r}: {folders}. Take {ALL!r}, or parts of it such as "
                "'all[:90%]' and 'all[90%:]', by --config.data.train_split and --config.data.eval_split."
            )
        return "", f"{found}/", tops

    def _list(self, tree: Tree, only: Collection[str] | None) -> None:
        images: dict[str, list[str]] = {}
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            for entry, kind in tree.entries(self._classes_at + inside(folder)):
                path = inside(folder) + entry
                if kind is Kind.FOLDER and folder.count("/") < _DEEPEST:
                    waiting.append(path)
                elif kind.is_file and is_image(tree, self._classes_at + path):
                    images.setdefault(folder, []).append(entry)
                    if kind is Kind.LINK:
                        self._with_links.add(folder)
        if not images:
            raise UserError(
                f"{self.name}, split {self.split!r}, has no images. Known images are {', '.join(IMAGE_SUFFIXES)}; "
                "convert others."
            )
        self._keep(in_order(list(images)), lambda folder: in_order(images[folder]))
