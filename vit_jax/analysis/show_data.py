r"""Draws the input of a run: its first training images after augmentation, and evaluation images.

    python -m vit_jax.data.show --config=configs/cifar10.py --output=cifar10.png
    python -m vit_jax.data.show --config=configs/cifar10.py --classes --output=classes.png

Labels that are off by one, empty crops, swapped colours or too strong augmentation show at a glance here, but not in a
loss curve. The training images are exactly the run's first ones, except for mixup and CutMix, whose pairs depend on the
batch. Set fields as for training, with --config.<field>=<value>. --classes draws one unaugmented image of each class
instead.
"""

import pathlib
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from vit_jax import flags as common_flags
from vit_jax.config import check_fields
from vit_jax.data.pipeline import BatchLoader, IndexStream
from vit_jax.data.sources import NO_LABEL, BadRecordError, Source
from vit_jax.data.transforms import ImageError, TrainTransform
from vit_jax.errors import UserError
from vit_jax.experiment import data
from vit_jax.experiment.objective import needs_labels
from vit_jax.files import write_figure
from vit_jax.flags import define_config, report
from vit_jax.objectives.mixup import Mixing, neighbours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST_NAME = 40  # characters of a class name
_READS_PER_CLASS = 50  # images read per class to find one of each


def _name(label: int, source: Source) -> str:
    if label == NO_LABEL:
        return "no label"
    name = source.class_names[label] if source.class_names and label < len(source.class_names) else f"class {label}"
    return textwrap.shorten(name.replace("_", " "), _LONGEST_NAME, placeholder="…")


def _names(labels: np.ndarray | int, source: Source) -> str:
    """Returns the names of one label or of several."""
    given = [int(label) for label in np.atleast_1d(labels) if label != NO_LABEL]
    return ", ".join(_name(label, source) for label in given) or "no label"


def _draw_grid(figures: Sequence[tuple[str, np.ndarray | Sequence[np.ndarray], Sequence[str]]]) -> "Figure":
    """Draws parts below each other; each has a heading, images uint8 `[height, width, 3]` and their captions."""
    from matplotlib.figure import Figure

    columns = min(8, max(len(images) for _, images, _ in figures))
    heights = [-(-len(images) // columns) for _, images, _ in figures]
    figure = Figure(figsize=(1.7 * columns, 2.1 * sum(heights) + 0.5 * len(figures)), layout="constrained")
    subfigures = figure.subfigures(len(figures), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, rows, (heading, images, captions) in zip(subfigures, heights, figures, strict=True):
        part.suptitle(heading, fontsize=10, fontweight="bold", x=0.01, ha="left")
        axes = np.atleast_1d(part.subplots(rows, columns)).ravel()
        for axis in axes:
            axis.axis("off")
        for axis, image, caption in zip(axes, images, captions, strict=False):
            axis.imshow(image, interpolation="nearest" if max(image.shape) < 100 else "antialiased")
            axis.text(
                *(0.5, -0.03, textwrap.fill(caption, 24)), transform=axis.transAxes, ha="center", va="top", fontsize=7
            )
    return figure


def _mix(
    images: np.ndarray, labels: np.ndarray, mixing: Mixing, seed: int, source: Source
) -> tuple[np.ndarray, list[str]]:
    """Mixes a batch like a training step, but draws a share for each image to show more of them."""
    keys = jax.random.split(jax.random.key(seed), len(images))
    weights = np.stack([mixing.weights(key, *images.shape[1:3]) for key in keys])
    partners, partner_labels = (np.asarray(neighbours(jax.numpy.asarray(each))) for each in (images, labels))
    mixed = np.round(weights * images + (1 - weights) * partners)
    captions = [
        f"{share:.2f} {_names(label, source)} + {1 - share:.2f} {_names(partner, source)}"
        for share, label, partner in zip(weights.mean(axis=(1, 2, 3)), labels, partner_labels, strict=True)
    ]
    return np.asarray(mixed, np.uint8), captions


def _describe(transform: TrainTransform, mixing: Mixing) -> str:
    """Describes the augmentation in a few words."""
    words = ["whole images"]
    if transform.inception_crop:
        words = [f"crops of {100 * transform.min_area:.0f} to 100 % of the area"]
    elif transform.random_crop_from:
        words = [f"random crops from {transform.random_crop_from} pixels"]
    words += ["flip"] * transform.flip
    if transform.randaugment is not None:
        words.append(f"RandAugment {transform.randaugment.num_layers} x {transform.randaugment.magnitude:g}")
    if transform.exif_orientation is not None:
        words.append("EXIF orientation applied" if transform.exif_orientation else "EXIF orientation ignored")
    words += [f"mixup {mixing.mixup_alpha:g}"] * (mixing.mixup_alpha > 0)
    words += [f"CutMix {mixing.cutmix_alpha:g}"] * (mixing.cutmix_alpha > 0)
    return ", ".join(words)


def draw_batches(config: ConfigDict, count: int = 32) -> "Figure":
    """Draws the first `count` training images of a run and as many evaluation images, evenly spread."""
    labelled = needs_labels(config.objective)
    num_classes = config.model.num_classes if labelled else None
    train_source, eval_source = data.open_sources(config.data, labelled=labelled)
    transform, mixing = data.train_transform(config.data), Mixing(config.mixup_alpha, config.cutmix_alpha)
    loader = BatchLoader(train_source, transform, num_classes=num_classes)
    order = IndexStream(train_source, config.seed)
    batch, bad = loader.load([order[position] for position in range(count)], range(count), config.seed)
    _report(bad.values())
    images, captions = batch["image"], [_names(label, train_source) for label in batch["label"]]
    if mixing:
        images, captions = _mix(images, batch["label"], mixing, config.seed, train_source)
    size = f"{transform.image_size} x {transform.image_size}"
    facts = f"{len(train_source):,} images"
    facts += f", {train_source.num_classes or '?'} classes" if labelled else ""
    heading = f"Training: {train_source.name}, {train_source.split} ({facts}), {size}: {_describe(transform, mixing)}"
    parts: list[tuple[str, np.ndarray | Sequence[np.ndarray], Sequence[str]]] = [(heading, images, captions)]

    if eval_source is not None:
        see = data.eval_transform(config.data)
        indices = np.linspace(0, len(eval_source) - 1, min(count, len(eval_source)), dtype=int)
        batch, bad = BatchLoader(eval_source, see, num_classes=num_classes).load(indices)
        _report(bad.values())
        crop = f"shorter side to {see.resize_small}, centre" if see.resize_small else "whole image"
        heading = f"Evaluation: {eval_source.name}, {eval_source.split} ({len(eval_source):,} images), {size}: {crop}"
        parts.append((heading, batch["image"], [_names(label, eval_source) for label in batch["label"]]))
    return _draw_grid(parts)


def draw_classes(config: ConfigDict, most: int = 100) -> "Figure":
    """Draws one unaugmented image of each class of the training data, for at most `most` classes."""
    source = data.open_train_source(config.data)
    order, found = IndexStream(source, config.seed), dict[int, np.ndarray]()
    num_classes = source.num_classes or config.model.num_classes
    wanted = min(most, num_classes or most)
    whole = TrainTransform(
        image_size=96, inception_crop=False, flip=False, exif_orientation=config.data.exif_orientation
    )
    rng, looked_at = np.random.default_rng(0), 0
    for looked_at in range(1, min(len(source), _READS_PER_CLASS * wanted) + 1):
        try:
            example = source[order[looked_at - 1]]
            turn = example.get("exif_orientation", False)
            for label in map(int, np.atleast_1d(example["label"])):
                if label != NO_LABEL and label not in found:
                    found[label] = whole(example["image"], rng, exif_orientation=turn)
        except (BadRecordError, ImageError) as error:
            _report([error])
        if len(found) >= wanted:
            break
    if not found:
        raise UserError(f"none of {looked_at:,} images of {source.name}, {source.split}, can be read and has a label.")
    labels = sorted(found)
    of = f" of {num_classes:,}" if num_classes else ""
    heading = (
        f"{source.name}, {source.split}: {len(source):,} images; {len(labels)}{of} classes, in {looked_at:,} images"
    )
    return _draw_grid([(heading, [found[label] for label in labels], [f"{i}: {_name(i, source)}" for i in labels])])


def _report(messages: Iterable[object]) -> None:
    for message in messages:
        report(UserError(f"{message}; drawn black or skipped"))


def run() -> None:
    """The command."""
    config = define_config()
    output = flags.DEFINE_string("output", "data.png", "PNG to write.")
    images = flags.DEFINE_integer("images", 32, "Number of training images, and of evaluation images.", lower_bound=1)
    classes = flags.DEFINE_bool("classes", False, "Draw one image of each class instead.")

    def main(_: list[str]) -> int:
        logging.set_verbosity(logging.WARNING)
        try:
            check_fields(config.value)
            figure = draw_classes(config.value) if classes.value else draw_batches(config.value, images.value)
            write_figure(path := pathlib.Path(output.value).expanduser(), figure)
        except (UserError, OSError) as error:
            return report(error)
        print(path)
        return 0

    common_flags.run(main, config)


if __name__ == "__main__":
    run()
