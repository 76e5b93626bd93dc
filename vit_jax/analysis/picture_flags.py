"""What the subcommands of `python -m vit_jax.analysis` share: flags, weights, files of images, the picture's file."""

import argparse
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from vit_jax.config import CHECKS
from vit_jax.console import Progress, show_name
from vit_jax.data.sources.trees import MAX_FILE_BYTES
from vit_jax.data.transforms import ImageError
from vit_jax.errors import UserError
from vit_jax.files import read_regular, write_figure
from vit_jax.predict import find_images, read_images, report_other_files
from vit_jax.weights import Preprocessing, Weights, load

_TITLE_LENGTH = 45  # of the weights' source


def add_weights(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Adds --weights and --model; `several` allows more than one --weights."""
    text = (
        "name of a released checkpoint (`python -m vit_jax.weights list`), a run's --workdir, or path or address of a "
        ".npz or .safetensors file, or of a folder with one"
    )
    more = "; give it several times to draw models beside each other" if several else ""
    parser.add_argument("--weights", required=True, action="append" if several else "store", help=text + more)
    parser.add_argument("--model", help="model of the weights, such as ViT-B/16 (default: as the file says)")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds the images, and the flags of the computation on them."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or pattern such as 'photos/*.jpg'")
    parser.add_argument("--max_images", type=int, help="take this many, evenly spread over those found (default: all)")
    text = "side of the input in pixels, or HEIGHTxWIDTH such as 224x336 (default: the weights' own)"
    parser.add_argument("--image_size", help=text)
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch at most (default: 32)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")


def load_weights(place: str, model: str | None, **options: Any) -> Weights:
    """Loads weights and prints their notes; `options` are those of `vit_jax.weights.load`."""
    weights = load(place, model=model, **options)
    for note in weights.notes:
        print(f"note: {note}", file=sys.stderr)
    return weights


def title_of(weights: Weights) -> str:
    """The model's name and the end of the weights' source, in one line."""
    source = show_name(weights.source)
    shown = source if len(source) <= _TITLE_LENGTH else "..." + source[3 - _TITLE_LENGTH :]
    return f"{weights.spec.name}, {shown}"


def parse_image_size(text: str | None) -> tuple[int, int] | None:
    """Parses "224" or "224x336" as height and width; None stays None.

    Raises:
      UserError: it is neither, or out of range.
    """
    if text is None:
        return None
    check, match = CHECKS["data.image_size"], re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text)
    sides = (int(match[1]), int(match[2] or match[1])) if match else ()
    if not sides or not all(check.accepts(side) for side in sides):
        raise UserError(
            f"--image_size must be {check.expected}, or HEIGHTxWIDTH such as 224x336, got {text!r}. Omit it for the "
            "weights' own size."
        )
    return sides


def model_options(args: argparse.Namespace, files: "ImageFiles") -> dict[str, Any]:
    """Options of `AttentionModel` from the flags of `add_images`."""
    batch_size = min(args.batch_size, len(files.paths))
    return {"batch_size": batch_size, "image_size": parse_image_size(args.image_size), "dtype": args.dtype}


def check_output(path: str) -> None:
    """Raises `UserError` unless a picture can have this path."""
    if not path.lower().endswith(".png") or pathlib.Path(path).is_dir():
        raise UserError(f"--output must be the path of a PNG file, such as picture.png, got {path!r}.")


def write_picture(path: str | pathlib.Path, figure: Any) -> None:
    """Writes a figure as PNG and prints its path."""
    write_figure(path, figure)
    print(path, flush=True)


class MeasuresImages(Protocol):
    """A model that maps images, uint8 `[images, height, width, 3]`, to an array with the same first axis."""

    preprocessing: Preprocessing
    batch_size: int

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Measures images."""


class ImageFiles:
    """The images that the flags of `add_images` name. Those that cannot be read are reported and skipped.

    Attributes:
      paths: of the images.
    """

    def __init__(self, args: argparse.Namespace):
        """Finds the images and reports other files.

        Raises:
          UserError: a place does not exist or has no images, or a flag is out of range.
        """
        for flag in ("max_images", "batch_size"):
            if (value := getattr(args, flag)) is not None and value < 1:
                raise UserError(f"--{flag} must be at least 1, got {value}.")
        parse_image_size(args.image_size)
        found = find_images(args.images)
        self.paths = found.images
        if args.max_images is not None and args.max_images < len(self.paths):
            self.paths = [self.paths[index * len(self.paths) // args.max_images] for index in range(args.max_images)]
        self._unreadable = dict[str, None]()
        self._num_unopened = report_other_files(found)

    def measure(self, model: MeasuresImages, what: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the path of each readable image and its measure, in order, with a progress bar.

        Raises:
          UserError: no image can be read.
        """
        num_read = 0
        with Progress(what, len(self.paths), every_seconds=10) as progress:
            for paths, images, messages in read_images(self.paths, model.preprocessing, model.batch_size):
                for message in messages:
                    if message not in self._unreadable:
                        print(f"cannot read {message}", file=sys.stderr)
                    self._unreadable[message] = None
                yield from zip(paths, model(images) if paths else (), strict=True)
                num_read += len(paths)
                progress.add(len(paths) + len(messages))
        if not num_read:
            raise UserError("none of the images can be read, so there is nothing to draw.")

    @staticmethod
    def read(path: str, preprocessing: Preprocessing) -> np.ndarray:
        """Decodes an image again, to uint8 `[height, width, 3]`; raises `UserError` if it has changed since."""
        try:
            return preprocessing.decode(read_regular(path, MAX_FILE_BYTES))
        except (ImageError, OSError) as error:
            raise UserError(f"cannot read {show_name(path)} any more: {error}. Run the same command again.") from error

    def exit_status(self) -> int:
        """Counts the images that could not be read on stderr; 1 if there are any, else 0."""
        count = len(self._unreadable) + self._num_unopened
        if count:
            print(f"{count} of {len(self.paths) + self._num_unopened} images could not be read.", file=sys.stderr)
        return 1 if count else 0
