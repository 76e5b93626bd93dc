"""Predicts the classes of images with any weights.

    python -m vit_jax.predict --weights=augreg_b16_i21k_in1k_384 cat.jpg holidays/ 'more/*.png'
    python -m vit_jax.predict --weights=runs/quickstart --json digits/ > predictions.jsonl

Images are files, folders (searched recursively) or patterns. Each gets a few lines, the likeliest class first, or with
--json one line of JSON: {"image": ..., "predictions": [{"label", "name", "probability"}]}. Unreadable images are
reported and skipped; the exit status is then 1.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vit_jax import sharding
from vit_jax.config import CHECKS
from vit_jax.console import Progress, num_cpus, print_any_text, run_command, show_name, show_names
from vit_jax.data.sources.trees import IMAGE_SUFFIXES, MAX_FILE_BYTES, FoundFiles, find_files, is_litter
from vit_jax.data.transforms import ImageError
from vit_jax.errors import UserError
from vit_jax.files import read_regular
from vit_jax.run.compilation_cache import use_compilation_cache
from vit_jax.weights import Preprocessing, Weights, load, transfer

PROBABILITIES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


class Predictor:
    """A model that predicts, compiled once for all batches.

        predictor = Predictor("augreg_b16_i21k_in1k_384")
        probabilities = predictor(predictor.preprocessing(image)[None])

    Attributes:
      weights: the model's weights.
      preprocessing: maps an image to the model's input.
      batch_size: images per batch, a multiple of the number of devices.
      probabilities: "softmax" or "sigmoid".
    """

    def __init__(
        self,
        weights: Weights | str | pathlib.Path,
        *,
        batch_size: int = 32,
        image_size: int | None = None,
        dtype: str = "float32",
        probabilities: str | None = None,
    ):
        """Places the parameters on all devices.

        Args:
          weights: from `vit_jax.weights.load`, or its argument: a name, path or address.
          batch_size: images per batch; rounded up to a multiple of the number of devices.
          image_size: side of the square input, in pixels; position embeddings are interpolated. None: the weights' own.
          dtype: dtype of the computation; "bfloat16" is faster on accelerators.
          probabilities: "softmax", or "sigmoid" for heads with independent classes; None: as the weights say (the loss
            of the run), or else softmax.

        Raises:
          UserError: the weights have no head, or do not fit the image size.
        """
        if not isinstance(weights, Weights):
            weights = load(weights)
        spec = weights.spec
        if not spec.num_classes:
            raise UserError(
                f"{weights.source or 'this'} ({spec}) has no head, so it predicts no classes. Use fine-tuned weights "
                "such as augreg_b16_i21k_in1k_384; `python -m vit_jax.weights list` shows all."
            )
        if not weights.arrays["head/kernel"].any():
            raise UserError(
                f"the head of {weights.source or 'these weights'} is all zeros (as released for ViT on ImageNet-21k), "
                "so all predictions would be the same. Use fine-tuned weights."
            )
        self.weights = weights
        self.preprocessing = weights.preprocessing if image_size is None else weights.preprocessing.at(image_size)
        mesh = sharding.make_mesh()
        devices = mesh.devices.size
        self.batch_size = -(-batch_size // devices) * devices
        self._sharding = sharding.batch_sharding(mesh)

        model = spec.create(dtype=dtype)
        params = params_at(weights, model, self.preprocessing.image_size)
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self.probabilities = probabilities or weights.probabilities or "softmax"
        to_probabilities, normalize = PROBABILITIES[self.probabilities], self.preprocessing.normalize

        def probabilities_of(params, images):
            return to_probabilities(model.apply({"params": params}, normalize(images))[0])

        self._probabilities = jax.jit(probabilities_of)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Maps images, uint8 `[at most batch_size, height, width, 3]`, to probabilities `[images, classes]`."""
        padding = self.batch_size - len(images)
        padded = np.concatenate([images, np.zeros((padding, *images.shape[1:]), images.dtype)])
        batch = sharding.global_batch({"image": padded}, self._sharding)["image"]
        return np.asarray(self._probabilities(self._params, batch))[: len(images)]


def params_at(weights: Weights, model: nn.Module, image_size: tuple[int, int]) -> dict[str, Any]:
    """Returns the parameters for images of another height and width, in pixels: position embeddings are interpolated.

    Raises:
      UserError: the model does not fit the image size, or its position embeddings cannot be interpolated.
    """
    if weights.spec.image_size in (None, image_size):
        return weights.params
    params, _ = transfer(weights, model, image_size, keep_head=True, keep_pre_logits=True)
    return params


# Photo formats that are not decoded. In a folder they are reported like damaged images, not like other files.
_OTHER_PHOTOS = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".tif", ".tiff", ".dng", ".cr2", ".cr3", ".nef", ".arw")


def find_images(places: Sequence[str | os.PathLike[str]]) -> FoundFiles:
    """Lists the images of files, folders and patterns, each once, and the other files in these folders.

    Raises:
      UserError: a place does not exist or has no images.
    """
    images, others, errors = dict[str, None](), dict[str, None](), dict[str, None]()
    for each in places:
        place = os.fspath(each)
        if not (matches := _existing(place)):
            raise UserError(f"no file or folder matches '{show_name(place)}'.")
        for match in sorted(matches):
            if not match.is_dir():
                images[str(match)] = None
                continue
            inside = find_files(match)
            if not inside.images:
                there = f" There are other files, such as '{show_name(inside.others[0])}'." if inside.others else ""
                there += "".join(f" Cannot list {show_name(error)}." for error in inside.errors[:1])
                known = ", ".join(IMAGE_SUFFIXES)
                raise UserError(f"there are no images ({known}) in {show_name(str(match))}.{there}")
            images |= dict.fromkeys(inside.images)
            others |= dict.fromkeys(inside.others)
            errors |= dict.fromkeys(inside.errors)
    return FoundFiles(list(images), [path for path in others if path not in images], list(errors))


def _existing(place: str) -> list[pathlib.Path]:
    """Returns the files and folders that a path or pattern names, perhaps none; of a pattern, no litter."""
    if not place:
        return []  # pathlib would take the current folder
    try:
        path = pathlib.Path(place).expanduser()
        if path.exists():
            return [path]
        # Unlike `glob.glob`, it does not follow loops of links.
        matches = pathlib.Path(path.anchor).glob(str(path.relative_to(path.anchor)))
        return [match for match in matches if not is_litter(match.name)]
    except (OSError, RuntimeError, ValueError):  # name too long, home folder unknown, or not a pattern, such as "a**b"
        return []


def read_images(
    paths: Sequence[str], preprocessing: Preprocessing, batch_size: int
) -> Iterator[tuple[list[str], np.ndarray, list[str]]]:
    """Reads images in batches on all cores, one batch ahead.

    Yields:
      paths of a batch's readable images, the images uint8 `[len(paths), height, width, 3]`, and messages about others.
    """

    def read(path: str) -> np.ndarray | str:
        try:
            return preprocessing(preprocessing.decode(read_regular(path, MAX_FILE_BYTES)))
        except ImageError as error:
            return f"{show_name(path)}: {error}"
        except OSError as error:
            return f"{show_name(path)}: {error.strerror or error}"

    with concurrent.futures.ThreadPoolExecutor(num_cpus()) as pool:
        starts = range(0, len(paths), batch_size)
        batches = [paths[start : start + batch_size] for start in starts]
        coming = [pool.submit(read, path) for path in batches[0]]
        for index, batch in enumerate(batches):
            results = [future.result() for future in coming]
            if index + 1 < len(batches):
                coming = [pool.submit(read, path) for path in batches[index + 1]]
            good = [(path, image) for path, image in zip(batch, results, strict=True) if not isinstance(image, str)]
            images = np.stack([image for _, image in good]) if good else np.zeros((0,), np.uint8)
            yield [path for path, _ in good], images, [result for result in results if isinstance(result, str)]


def top_classes(probabilities: np.ndarray, k: int, names: Sequence[str] | None) -> list[dict[str, object]]:
    """Returns label, name (None if unknown) and probability of the k likeliest classes, in falling order."""
    labels = np.argsort(-probabilities, kind="stable")[:k]
    return [
        {"label": int(label), "name": names[label] if names else None, "probability": float(probabilities[label])}
        for label in labels
    ]


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or pattern such as 'photos/*.jpg'")
    parser.add_argument(
        "--weights",
        required=True,
        help="name of a released checkpoint (`python -m vit_jax.weights list`), a run's --workdir, or path or address "
        "of a .npz or .safetensors file, or of a folder with one",
    )
    parser.add_argument("--top", type=int, default=5, help="classes per image (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON per image")
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch (default: 32)")
    parser.add_argument("--image_size", type=int, help="side of the input in pixels (default: the weights' own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument(
        "--probabilities",
        choices=tuple(PROBABILITIES),
        help="sigmoid for heads trained with the sigmoid loss (default: as the weights say, or else softmax)",
    )
    parser.add_argument("--model", help="model of the weights, such as ViT-B/16 (default: as the file says)")
    return parser


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    args = make_parser().parse_args(arguments)
    print_any_text()
    try:
        if args.top < 1 or args.batch_size < 1:
            raise UserError("--top and --batch_size must be at least 1.")
        size = CHECKS["data.image_size"]
        if args.image_size is not None and not size.accepts(args.image_size):
            raise UserError(
                f"--image_size must be {size.expected}, got {args.image_size}. Omit it for the weights' own size."
            )
        found = find_images(args.images)
        use_compilation_cache()
        predictor = Predictor(
            load(args.weights, model=args.model),
            batch_size=min(args.batch_size, len(found.images)),
            image_size=args.image_size,
            dtype=args.dtype,
            probabilities=args.probabilities,
        )
        return _predict(predictor, found, args.top, args.json)
    except BrokenPipeError:  # for `run_command`
        raise
    except (UserError, OSError) as error:  # such as a full disk
        print(f"error: {error}", file=sys.stderr)
        return 1


def report_other_files(found: FoundFiles) -> int:
    """Prints the files that are not images, and photos that cannot be decoded; returns the number of the latter."""
    photos = [path for path in found.others if path.lower().endswith(_OTHER_PHOTOS)]
    unsupported = [f"{path}: {pathlib.Path(path).suffix} is not supported; convert it" for path in photos]
    for message in (*found.errors, *unsupported):
        print(f"cannot read {show_name(message)}", file=sys.stderr)
    if others := [path for path in found.others if path not in photos]:
        print(f"note: skipped {len(others):,} files that are not images: {show_names(others, 3)}", file=sys.stderr)
    return len(found.errors) + len(photos)


def _predict(predictor: Predictor, found: FoundFiles, top: int, as_json: bool) -> int:
    names, paths = predictor.weights.class_names, found.images
    for note in predictor.weights.notes:
        print(f"note: {note}", file=sys.stderr)
    not_opened = unreadable = report_other_files(found)
    # No bar among results on the same terminal.
    with Progress("predict", len(paths), bar=not sys.stdout.isatty(), every_seconds=10) as progress:
        for good, images, messages in read_images(paths, predictor.preprocessing, predictor.batch_size):
            for path, probabilities in zip(good, predictor(images) if good else (), strict=True):
                predictions = top_classes(probabilities, top, names)
                if as_json:
                    print(json.dumps({"image": path, "predictions": predictions}))
                    continue
                print(show_name(path))
                for row in predictions:
                    name = show_name(str(row["name"] or "class"))
                    print(f"  {100 * float(str(row['probability'])):6.2f} %  {name} ({row['label']})")
            sys.stdout.flush()
            for message in messages:
                print(f"cannot read {message}", file=sys.stderr)
            unreadable += len(messages)
            progress.add(len(good) + len(messages))
    if unreadable:
        print(f"{unreadable} of {len(paths) + not_opened} images could not be read.", file=sys.stderr)
    return 1 if unreadable else 0


if __name__ == "__main__":
    run_command(main)
