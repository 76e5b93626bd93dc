"""Prepares ImageNet-21k from the archives of image-net.org.

The authors of the released models merged copies of an image into one example with several labels, and held out the
first examples: test is `full[:25600]`, val is `full[25600:51200]`, train is the rest.
"""

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from vit_jax.console import show_name
from vit_jax.data.class_names import wordnet_ids
from vit_jax.data.prepare.archives import Mark, Member, find_archives, read_at, scan
from vit_jax.data.prepare.index import Row
from vit_jax.data.prepare.passes import Found, Origin, Passed
from vit_jax.data.sources.base import fingerprint_of
from vit_jax.data.sources.trees import IMAGE_SUFFIXES
from vit_jax.errors import UserError
from vit_jax.files import read_text_lines

SPLIT = "full"
SLICES: dict[str, tuple[int | None, int | None]] = {
    "test": (None, 25600),
    "val": (25600, 51200),
    "train": (51200, None),
}
"""Test, validation and training sets of the released models, as slices of the split."""

ONLY_RELEASED = ("n03931044", "n09859684")
"""The two classes of the released heads that the archive of fall 2011 lacks."""

_WORDNET_ID = re.compile(r"n\d{8}")


def list_classes(which: str) -> tuple[str, ...]:
    """Returns WordNet ids in the order of the labels.

    Args:
      which: "released", the 21,843 of the released heads; "fall11", the 21,841 of the archive of fall 2011; or the path
        of a text file with one id per line.

    Raises:
      UserError: the file does not exist or is not such a list.
    """
    if which in ("released", "fall11"):
        left_out = ONLY_RELEASED if which == "fall11" else ()
        return tuple(name for name in wordnet_ids("imagenet21k") if name not in left_out)
    try:
        lines = read_text_lines(pathlib.Path(which))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--classes must be released, fall11, archive or a text file of WordNet ids: {error}."
        ) from error
    names = tuple(line.split()[0] for line in lines if line.strip())
    wrong = next((name for name in names if not _WORDNET_ID.fullmatch(name)), None)
    if not names or wrong or len(set(names)) < len(names):
        reason = f"{wrong!r} is not" if wrong else "it is empty" if not names else "some are repeated"
        raise UserError(f"{which} must have one WordNet id such as n01440764 per line, but {reason}.")
    return names


def class_map(classes: Sequence[str], into: Sequence[str]) -> list[int]:
    """Maps classes to positions in another list, such as fall 2011's 21,841 to the released heads' 21,843.

    Returns:
      the position of each class, or -1 if the other list lacks it.
    """
    positions = {name: position for position, name in enumerate(into)}
    return [positions.get(name, -1) for name in classes]


class ImageNet21k(Origin):
    """The whole archive of winter 2021 or of fall 2011, or the tars of its classes."""

    homepage = "https://www.image-net.org"
    exif_orientation = False  # the released models ignored it

    def __init__(self, paths: Sequence[pathlib.Path], *, labels: Literal["multi", "single"] = "multi", classes: str):
        """Finds the archives without reading them.

        Args:
          paths: tars, or folders of tars.
          labels: "multi" merges copies of an image into one example with all their labels; "single" makes an example of
            each pair of image and class.
          classes: for `list_classes`; or "archive", the sorted ids that occur.

        Raises:
          UserError: an archive is missing or compressed, or there is no such list of classes.
        """
        self._archives = find_archives(paths)
        self._sizes = [path.stat().st_size for path in self._archives]
        self.class_names = None if classes == "archive" else list_classes(classes)
        self._known = set(self.class_names or ())
        self.settings = {
            "command": "imagenet21k",
            "labels": labels,
            "classes": fingerprint_of(self.class_names) if self.class_names else "archive",
            "files": [
                [path.name, size, path.stat().st_mtime_ns]
                for path, size in zip(self._archives, self._sizes, strict=True)
            ],
        }
        pairs = zip(self._archives, self._sizes, strict=True)
        self.facts = {"archives": [{"name": path.name, "bytes": size} for path, size in pairs]}
        self.extent = sum(self._sizes)
        self.least_bytes = self.extent * 4 // 5  # merging copies saves an eighth
        self.multi_label = labels == "multi"
        self.arrangement = "merged" if self.multi_label else "pairs"
        self.slices = SLICES
        self.description = (
            "ImageNet-21k (Deng et al., 2009), images as they were published. "
            + (
                "Copies of an image are merged into one example with the labels of all."
                if self.multi_label
                else "One example for each pair of image and class."
            )
            + " Held out for the released models: test full[:25600], val full[25600:51200]."
        )

    def scan(self, mark: Any) -> Iterator[Found | Passed]:
        """Finds images with their classes.

        Raises:
          UserError: an image has no class, or one that is not in the list.
        """
        before = [sum(self._sizes[:number]) for number in range(len(self._sizes) + 1)]
        for item in scan(self._archives, Mark(*mark) if mark else None):
            if isinstance(item, Mark):
                yield Passed(before[item.archive] + item.offset, [item.archive, item.offset])
                continue
            wnid = self._class_of(item)
            broken = f"{item.size:,} bytes are too many for an image" if item.content is None else None
            yield Found(
                split=SPLIT,
                file_name=show_name(pathlib.PurePosixPath(item.path[-1]).name),
                labels=(wnid,) if wnid else (),
                file=item.archive,
                offset=item.offset,
                done=before[item.archive] + item.offset,
                content=item.content,
                broken=broken if wnid else "neither an image nor in a class",
            )

    def read(self, row: Row | Found) -> bytes:
        """Reads an image from the middle of its archive."""
        return read_at(self._archives[row.file], row.offset, row.size)

    def place(self, row: Row | Found) -> str:
        """Returns archive, name and offset of the image."""
        return f"{self._archives[row.file]}:{row.file_name} (byte {row.offset:,})"

    def _class_of(self, member: Member) -> str | None:
        """Returns the class from the file's folder, tar or name; None for a file that is not an image."""
        path = pathlib.PurePosixPath(*member.path)
        parents = [pathlib.PurePath(part).stem for part in reversed(path.parts[:-1])]
        candidates = [*parents, self._archives[member.archive].stem, path.name[:9]]
        wnid = next((name for name in candidates if _WORDNET_ID.fullmatch(name)), None)
        where = show_name(f"{self._archives[member.archive]}:{'/'.join(member.path)}")
        if wnid is None and path.suffix.lower() not in IMAGE_SUFFIXES:
            return None  # a README must not end hours of work
        if wnid is None:
            raise UserError(
                f"no class for {where}: neither its folder, its tar nor its name is a WordNet id like n01440764."
            )
        if self.class_names is not None and wnid not in self._known:
            raise UserError(
                f"{where} has class {wnid}, which is not among the {len(self.class_names):,} of the list. Use the "
                "classes of the archive (--classes=archive) or your own list (--classes=FILE)."
            )
        return wnid
