"""Prepares a folder or zip file of images, `<split>/<class>/<image>`; training reads these directly too."""

import pathlib
import sys
from collections.abc import Collection, Iterator
from typing import Any

from vit_jax.console import show_name, show_names
from vit_jax.data.prepare.index import Row
from vit_jax.data.prepare.passes import Found, Origin, Passed, check_split
from vit_jax.data.sources import ImageFolderSource
from vit_jax.data.sources.base import BadRecordError
from vit_jax.data.sources.folders import list_splits
from vit_jax.data.sources.splits import classes_without_images, same_classes
from vit_jax.errors import unknown_name


class ImageFolder(Origin):
    """All splits of a folder or zip file."""

    def __init__(self, path: pathlib.Path, *, classes: Collection[str] | None = None):
        """Lists the files without reading them.

        Args:
          path: of the folder or zip file.
          classes: names of the classes to take; None: all.

        Raises:
          UserError: it is not such a folder, a zip file has an unsafe path, a split has classes that the training split
            lacks, there is no such class, or TFDS does not accept a split's name.
        """
        self.description = f"The images of {show_name(path.resolve().name)}, as they were."
        splits = list_splits(path)
        for split in splits:
            check_split(split, show_name(str(path)))
        several = len(splits) > 1
        if classes is not None:
            known = ImageFolderSource(path, splits[0], classes_may_be_empty=several).class_names or ()
            for name in classes or [""]:
                if name not in known:
                    raise unknown_name(f"class of {show_name(str(path))}", name, known)
        opened = {split: ImageFolderSource(path, split, classes_may_be_empty=several, only=classes) for split in splits}
        if several:
            opened = same_classes(opened, show_name(str(path)))
        self._sources: dict[str, Any] = opened
        files = [[split, source.fingerprint(), len(source)] for split, source in opened.items()]
        self.settings = {"command": "image_folder", "files": files}
        if classes is not None:
            self.settings["classes"] = sorted(classes)
        self.extent = sum(map(len, opened.values()))
        self.facts = {"folder": show_name(path.resolve().name), "images": self.extent}
        self.class_names = names = list(opened[splits[0]].class_names or ())
        for split, source in self._sources.items():
            if missing := classes_without_images(source.labels(), names):
                print(
                    f"note: split {split!r} has no images of {len(missing)} of {len(names)} classes: "
                    f"{show_names(missing)}",
                    file=sys.stderr,
                )

    def scan(self, mark: Any) -> Iterator[Found | Passed]:
        """Finds all images, split after split."""
        number = 0
        for split_number, (split, source) in enumerate(self._sources.items()):
            for index, label in enumerate(source.labels()):
                number += 1
                if mark is None or number > mark:
                    labels = (source.class_names[label],)
                    yield Found(split, source.member(index), labels, split_number, index, number, mark=number)

    def read(self, row: Row | Found) -> bytes:
        """Reads one image."""
        try:
            return self._sources[row.split][row.offset]["image"]
        except BadRecordError as error:
            # The source's message has a path of this machine, which must not enter the manifest.
            cause = error.__cause__
            raise cause if isinstance(cause, OSError) else BadRecordError(f"cannot be read: {cause}") from error

    def place(self, row: Row | Found) -> str:
        """Returns the path of the image."""
        return self._sources[row.split].where(row.offset)
