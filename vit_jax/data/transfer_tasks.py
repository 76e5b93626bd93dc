"""Transfer tasks: training data, length and evaluation data of fine-tuning (table 4, section B.1.1)."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

from vit_jax.console import quote_argument, show_name
from vit_jax.data.bit_hyper_rule import hyper_rule_steps
from vit_jax.data.sources import Source, find_path, open_source
from vit_jax.data.sources.folders import list_splits
from vit_jax.data.sources.splits import split_role
from vit_jax.data.sources.tfds import prepared_folder, split_sizes
from vit_jax.data.transforms import size_of
from vit_jax.errors import UserError, unknown_name
from vit_jax.paper.tables import FIGURE_9, TABLE_4

logger = logging.getLogger(__name__)

STAGES = ("final", "choose")
_FEWEST_TO_SPLIT = 10  # images, so that each part gets one
_SMALL_AREA = 96 * 96  # pixels; BiT-HyperRule uses a lower resolution for smaller images


@dataclasses.dataclass(frozen=True)
class TransferTask:
    """A data set to transfer to.

    Attributes:
      dataset: see `config.data.dataset`.
      splits: by stage, the splits to train and to evaluate on. "choose" is for choosing the learning rate on a held-out
        part of the training data; "final" trains on all of them.
      num_images: number of training images by stage; None if not published.
      num_classes: number of classes; None: that of the data.
      steps: length of fine-tuning.
      learning_rates: the learning rates to choose from.
      small_images: whether the images have fewer than 96x96 pixels.
    """

    dataset: str
    splits: Mapping[str, tuple[str, str]]
    num_images: Mapping[str, int | None]
    num_classes: int | None
    steps: int
    learning_rates: tuple[float, ...]
    small_images: bool = False


def _table_4(
    name: str, row_name: str, train: str, test: str, *, images: int, classes: int, held_out: int, small: bool = False
) -> TransferTask:
    """Makes a row of table 4; `held_out` percent of the training images are for choosing the learning rate."""
    row = TABLE_4[row_name]
    parts = train.split("+")
    choose = "+".join(f"{part}[:{100 - held_out}%]" for part in parts)
    validation = "+".join(f"{part}[{100 - held_out}%:]" for part in parts)
    return TransferTask(
        dataset=f"tfds:{name}",
        splits={"choose": (choose, validation), "final": (train, test)},
        num_images={"choose": images - round(images * held_out / 100), "final": images},
        num_classes=classes,
        steps=row.steps,
        learning_rates=row.learning_rates,
        small_images=small,
    )


# Numbers of images are TFDS's. Flowers-102 has 1,020 images each in train and validation; BiT, whose tasks the paper
# uses, trains on both.
TASKS = {
    "imagenet2012": _table_4(
        "imagenet2012", "ImageNet", "train", "validation", images=1_281_167, classes=1000, held_out=1
    ),
    "cifar10": _table_4("cifar10", "CIFAR-10", "train", "test", images=50_000, classes=10, held_out=2, small=True),
    "cifar100": _table_4("cifar100", "CIFAR-100", "train", "test", images=50_000, classes=100, held_out=2, small=True),
    "pets": _table_4("oxford_iiit_pet", "Pets", "train", "test", images=3_680, classes=37, held_out=10),
    "flowers": _table_4(
        "oxford_flowers102", "Flowers-102", "train+validation", "test", images=2_040, classes=102, held_out=10
    ),
}


def gap_learning_rate(learning_rate: float) -> float:
    """Converts a learning rate for the class token to one for global average pooling.

    Figure 9 has one pair, 8e-4 and 3e-4. We assume that other rates have the same ratio.
    """
    return float(f"{learning_rate * FIGURE_9['gap'] / FIGURE_9['cls']:.6g}")


def pooling(pool: str, learning_rate: float) -> tuple[str | None, float]:
    """The fields `model.pool` and `optimizer.learning_rate` for a config's argument `pool`.

    Args:
      pool: "cls" or "gap".
      learning_rate: for the class token.

    Raises:
      UserError: another kind of pooling.
    """
    if pool not in FIGURE_9:
        raise unknown_name("pool", pool, FIGURE_9)
    return (None, learning_rate) if pool == "cls" else (pool, gap_learning_rate(learning_rate))


def transfer_task(dataset: str, *, train: str = "", test: str = "") -> TransferTask:
    """Makes the task of a data set.

    Args:
      dataset: one of `TASKS`, "tfds:<name>", or the path of an image folder or zip file.
      train: split to train on; "": by the names of the splits.
      test: split to test on; likewise.

    Returns:
      a row of table 4; for other data sets the same protocol, with steps by the number of training images. The
      learning rate is chosen on a validation split if there is one besides the test split, otherwise on held-out
      training images. A single split is divided: a tenth to test on, a tenth to choose on.

    Raises:
      UserError: the data set does not exist, or has nothing to train on, nothing to test on, or a single class.
    """
    if dataset in TASKS:
        if train or test:
            raise UserError(
                f"the splits of {dataset} are the paper's; use {TASKS[dataset].dataset} instead to choose others."
            )
        return TASKS[dataset]
    splits = _splits(dataset)
    exists = splits is not None
    if splits is None:
        if not dataset.startswith("tfds:") and "/" not in dataset and "." not in dataset:
            raise unknown_name("data set to transfer to (and no such folder)", dataset, TASKS)
        splits = ["train", "test"]  # opening the data raises the error
    if not splits:
        raise UserError(f"{dataset} has no folders; images should be in <class>/ or <split>/<class>/, e.g. cat/1.jpg.")
    if len(splits) == 1 and not test:
        train = train or splits[0]
        source = open_source(dataset, train) if exists else None
        if source is not None and len(source) < _FEWEST_TO_SPLIT:
            raise UserError(
                f"{dataset} has {len(source)} images, too few to hold out a tenth to test on. Add images, at least "
                f"{_FEWEST_TO_SPLIT} in all, or divide them into folders train/<class>/ and test/<class>/."
            )
        choose, final = (f"{train}[:80%]", f"{train}[80%:90%]"), (f"{train}[:90%]", f"{train}[90%:]")
        return _task(dataset, choose, final, source, round(0.9 * len(source or ())))
    roles = {split_role(split): split for split in reversed(splits)}
    train, test = train or roles.get("train", ""), test or roles.get("test", "")
    validation = roles.get("validation", "")
    if not train or not (test or validation):
        raise UserError(
            f"{show_name(dataset)} has the splits {', '.join(map(show_name, splits))}. None of them is called "
            f"{'test or testing' if train else 'train or training'}; name the splits: "
            f"--config=...:dataset={quote_argument(dataset)},train={quote_argument(train or '<split>')},"
            f"test={quote_argument(test or '<split>')}"
        )
    if split_role(train.partition("[")[0]) == "test":
        logger.warning("%s: trains on the split %r, which by its name is for testing.", dataset, train)
    source = open_source(dataset, train) if exists else None
    count = len(source or ())
    if test and validation and validation not in (train, test):
        count += len(open_source(dataset, validation)) if exists else 0
        return _task(dataset, (train, validation), (f"{train}+{validation}", test), source, count)
    held_out = 10 if count < 20_000 else 2 if count < 500_000 else 1  # percent: as table 4's tasks of that size
    choose = (f"{train}[:{100 - held_out}%]", f"{train}[{100 - held_out}%:]")
    return _task(dataset, choose, (train, test or validation), source, count)


def _task(
    dataset: str, choose: tuple[str, str], final: tuple[str, str], source: Source | None, num_images: int
) -> TransferTask:
    """Makes a task from its training split, if that exists, and the number of images of the final training."""
    if source and source.num_classes == 1:
        names = ", ".join(source.class_names or ())
        raise UserError(f"{dataset} has a single class ({names}), so there is nothing to classify. Add another class.")
    return TransferTask(
        dataset=dataset,
        splits={"choose": choose, "final": final},
        num_images={"choose": None, "final": None},
        num_classes=None,
        steps=hyper_rule_steps(num_images),
        learning_rates=TABLE_4["Pets"].learning_rates,
        small_images=source is not None and _is_small(source),
    )


def _is_small(source: Source) -> bool:
    """Whether the first image that can be read is small."""
    for index in range(min(len(source), 100)):
        with contextlib.suppress(UserError):  # training reports it
            image = source[index]["image"]
            return math.prod(size_of(image) if isinstance(image, bytes) else image.shape[:2]) < _SMALL_AREA
    return False


def _splits(dataset: str) -> Sequence[str] | None:
    """Names of the splits; None if the data set does not exist."""
    if dataset == "digits":
        return ["train", "test"]
    path = find_path(dataset)
    if path is None:
        return None
    folder = prepared_folder(path)
    return sorted(split_sizes(folder)) if folder else list_splits(path)
