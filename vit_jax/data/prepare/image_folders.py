"""Prepares a folder or zip file of images, `<split>/<class>/<image>`; training reads these directly too."""

import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from vit_jax.console import show_name, show_names
from vit_jax.data.prepare.index import Row
from vit_jax.data.prepare.passes import Found, Origin, Passed, check_split
from vit_jax.data.sources import ImageFolderSource
from vit_jax.data.sources.base import BadRecordError
from vit_jax.data.sources.folders import list_splits
from vit_jax.data.sources.splits import classes_without_images, same_classes


class ImageFolder(Origin):
    """All splits of a folder or zip file."""

    def __init__(self, path: pathlib.Path):
        """Lists the files without reading them.

        Raises:
          UserError: it is not such a folder, a zip file has an unsafe path, a split has classes that the training split
            lacks, or TFDS does not accept a split's name.
        """
        self.description = f"The images of {show_name(path.resolve().name)}, as they were."
        splits = list_splits(path)
        for split in splits:
            check_split(split, show_name(str(path)))
        opened = {split: ImageFolderSource(path, split, classes_may_be_empty=len(splits) > 1) for split in splits}
        if len(splits) > 1:
            opened = same_classes(opened, show_name(str(path)))
        self._sources: dict[str, Any] = opened
        files = [[split, source.fingerprint(), len(source)] for split, source in opened.items()]
        self.settings = {"command": "image_folder", "files": files}
        self.extent = sum(map(len, opened.values()))
        self.facts = {"folder": show_name(path.resolve().name), "images": self.extent}
        self.class_names = classes = list(opened[splits[0]].class_names or ())
        for split, source in self._sources.items():
            if missing := classes_without_images(source.labels(), classes):
                print(
                    f"note: split {split!r} has no images of {len(missing)} of {len(classes)} classes: "
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
