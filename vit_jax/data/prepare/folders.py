"""A folder or zip file of images, `<split>/<class>/<image>`, as it is read without preparation too."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from vit_jax.data.prepare.index import Arrangement, Row
from vit_jax.data.prepare.run import Found, Passed, check_split
from vit_jax.data.sources import Example, ImageFolderSource
from vit_jax.data.sources.base import BadRecordError
from vit_jax.data.sources.folders import list_splits
from vit_jax.errors import UserError


class ImageFolder:
    """All splits of a folder or zip file. See `run.Origin`."""

    homepage = ""
    arrangement: Arrangement = "each"
    multi_label = False

    def __init__(self, path: pathlib.Path):
        """Lists the files; reads none.

        Raises:
          UserError: it is no such folder; a zip has paths that would leave the folder it were unpacked in; the splits
            have different classes; or a split has a name that TFDS cannot ask for.
        """
        self._path = path
        self.slices: dict[str, dict[str, tuple[int | None, int | None]]] = {}
        self.description = f"The images of {path.resolve().name}, as they were."
        _refuse_unsafe(path)
        splits = list_splits(path)
        for split in splits:
            check_split(split, str(path))
        self._sources = {split: ImageFolderSource(path, split) for split in splits}
        classes = {split: list(source.class_names or ()) for split, source in self._sources.items()}
        self._classes = sorted(set().union(*classes.values()))
        for split, names in classes.items():
            if missing := sorted(set(self._classes) - set(names)):
                others = ", ".join(sorted(set(splits) - {split}))
                raise UserError(
                    f"{path}: split {split!r} has no class {missing[0]!r} ({len(missing)} are missing), which {others} "
                    "has. Are the names of the class folders the same in all splits?"
                )

    def settings(self) -> dict[str, Any]:
        """What decides the result."""
        files = [[split, source.fingerprint(), len(source)] for split, source in self._sources.items()]
        return {"command": "image_folder", "files": files}

    def facts(self) -> dict[str, Any]:
        """The name of the folder or zip file, and how many images it has."""
        return {"folder": self._path.resolve().name, "images": self.extent()}

    def extent(self) -> int:
        """Number of images."""
        return sum(map(len, self._sources.values()))

    def least_bytes(self) -> int:
        """Nothing is known before the images are read."""
        return 0

    def scan(self, mark: Any) -> Iterator[Found | Passed]:
        """Finds all images, split after split."""
        number = 0
        for split_number, (split, source) in enumerate(self._sources.items()):
            for index in range(len(source)):
                number += 1
                if mark is None or number > mark:
                    yield Found(split, _name(source, index), (), (split_number, index, 0), number, mark=number)

    def load(self, found: Found) -> Found:
        """Reads one image, and finds out its name and class."""
        source = self._sources[found.split]
        try:
            example = source[found.place[1]]
        except BadRecordError as error:
            # The manifest must not show where the images lie on this machine, which the source's message does.
            cause = error.__cause__
            raise cause if isinstance(cause, OSError) else BadRecordError(f"cannot be read: {cause}") from error
        label = (source.class_names or ())[int(example["label"])]  # type: ignore[arg-type]
        name = f"{label}/{example.get('file_name', '')}"
        return dataclasses.replace(found, file_name=name, labels=(label,), content=_encoded(example))

    def read(self, row: Row) -> bytes:
        """Reads one image."""
        return _encoded(self._sources[row.split][row.offset])

    def place(self, row: Row) -> str:
        """The path of the image."""
        return self._sources[row.split].where(row.offset)

    def classes(self, names: Sequence[str]) -> tuple[dict[str, int], Sequence[str] | int]:
        """The folders' names, sorted."""
        return {name: number for number, name in enumerate(self._classes)}, self._classes


def _name(source: ImageFolderSource, index: int) -> str:
    """`<class>/<image>`, without reading the image."""
    path = source.where(index).removesuffix(f" in {source.name}").strip("'\"")  # in quotes where it is in a zip
    return "/".join(path.split("/")[-2:])


def _encoded(example: Example) -> bytes:
    image = example["image"]
    if not isinstance(image, bytes):
        raise TypeError("folders give encoded images")
    return image


def _refuse_unsafe(path: pathlib.Path) -> None:
    """Nothing is unpacked, but a zip that tries to leave its folder is not what it says."""
    if path.is_dir():
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} as a folder or zip file of images: {error}.") from error
    for name in names:
        if name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
            raise UserError(f"{path} has a path that would leave the folder it is unpacked in: {name!r}. Refused.")
