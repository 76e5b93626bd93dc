"""What is trained on, for how long and evaluated on what when a model is transferred (table 4, section B.1.1)."""

import contextlib
import dataclasses
import logging
import math
import re
from collections.abc import Mapping

from vit_jax.config import quote_argument
from vit_jax.console import show_name
from vit_jax.data.sources import Source, find_path, open_source
from vit_jax.data.sources.folders import list_splits
from vit_jax.data.sources.splits import split_role
from vit_jax.data.sources.tfds import find_tfds, prepared_folder
from vit_jax.data.transforms import size_of
from vit_jax.errors import UserError, unknown_name
from vit_jax.paper.tables import FIGURE_9, TABLE_4

logger = logging.getLogger(__name__)

STAGES = ("final", "choose")
FEWEST_TO_SPLIT = 10  # images, so that each part gets one
SMALL_AREA = 96 * 96  # pixels; BiT-HyperRule takes smaller images to a lower resolution

_WORDS = {"train": "train or training", "test": "test or testing"}


@dataclasses.dataclass(frozen=True)
class TransferTask:
    """A data set to transfer to.

    Attributes:
      dataset: as `config.data.dataset`.
      splits: by stage the split to train on and that to evaluate on. "choose" is for the learning rate, on a held-out
        part of the training data; "final" trains on all of them.
      num_images: to train on, by stage; None where nobody published it.
      num_classes: None where the data say it.
      steps: length of fine-tuning.
      learning_rates: to choose from.
      small_images: whether the images have fewer than 96x96 pixels.
    """

    dataset: str
    splits: Mapping[str, tuple[str, str]]
    num_images: Mapping[str, int | None]
    num_classes: int | None
    steps: int
    learning_rates: tuple[float, ...]
    small_images: bool = False


def _known(
    name: str, table: str, train: str, test: str, *, images: int, classes: int, held_out: int, small: bool = False
) -> TransferTask:
    """A row of table 4; `held_out` percent of the training images choose the learning rate."""
    row = TABLE_4[table]
    kept = images - round(images * held_out / 100)
    if "+" in train:  # in both parts alike
        parts = train.split("+")
        choose = "+".join(f"{part}[:{100 - held_out}%]" for part in parts)
        validation = "+".join(f"{part}[{100 - held_out}%:]" for part in parts)
    else:
        choose, validation = f"{train}[:{100 - held_out}%]", f"{train}[{100 - held_out}%:]"
    return TransferTask(
        dataset=f"tfds:{name}",
        splits={"choose": (choose, validation), "final": (train, test)},
        num_images={"choose": kept, "final": images},
        num_classes=classes,
        steps=row.steps,
        learning_rates=row.learning_rates,
        small_images=small,
    )


# Numbers of images are those of TFDS. Flowers-102 has 1,020 images each in train and validation; BiT, whose tasks the
# paper took over, trains on both.
TASKS = {
    "imagenet2012": _known(
        "imagenet2012", "ImageNet", "train", "validation", images=1_281_167, classes=1000, held_out=1
    ),
    "cifar10": _known("cifar10", "CIFAR-10", "train", "test", images=50_000, classes=10, held_out=2, small=True),
    "cifar100": _known("cifar100", "CIFAR-100", "train", "test", images=50_000, classes=100, held_out=2, small=True),
    "pets": _known("oxford_iiit_pet", "Pets", "train", "test", images=3_680, classes=37, held_out=10),
    "flowers": _known(
        "oxford_flowers102", "Flowers-102", "train+validation", "test", images=2_040, classes=102, held_out=10
    ),
}


def gap_learning_rate(learning_rate: float) -> float:
    """A learning rate for global average pooling from one for the class token.

    Figure 9 has one pair, 8e-4 and 3e-4. That other rates keep the proportion is our assumption.
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


def hyper_rule_steps(num_images: int) -> int:
    """BiT-HyperRule's length of fine-tuning for so many training images (Kolesnikov et al., 2020, section 3.3)."""
    return 500 if num_images < 20_000 else 10_000 if num_images < 500_000 else 20_000


def hyper_rule_sizes(*, small_images: bool, is_large: bool) -> tuple[int, int]:
    """BiT-HyperRule's image sizes in pixels: images are resized to the first and cropped at random to the second.

    Args:
      small_images: whether images have fewer than 96x96 pixels.
      is_large: whether the others have the sizes that the BiT paper gives to R152x4 alone, and the released code to all
        models.
    """
    if small_images:
        return 160, 128
    return (512, 480) if is_large else (448, 384)


def hyper_rule_schedule(steps: int) -> tuple[int, tuple[float, ...]]:
    """BiT-HyperRule's warm-up, in steps, and the shares of the run after which the learning rate drops."""
    return (steps // 5, (0.4, 0.6, 0.8)) if steps <= 500 else (min(500, steps // 20), (0.3, 0.6, 0.9))


def held_out_percent(num_images: int) -> int:
    """The share that chooses the learning rate: as the paper's for data sets of that size."""
    return 10 if num_images < 20_000 else 2 if num_images < 500_000 else 1


def transfer_task(dataset: str, *, train: str = "", test: str = "") -> TransferTask:
    """The task of a data set.

    Args:
      dataset: one of `TASKS`, "tfds:<name>", or the path of an image folder or zip file.
      train: name of the split to train on; "": what is usual.
      test: name of the split to test on; "": what is usual.

    Returns:
      Table 4's, or for other data sets the same protocol: its steps by the number of training images; a validation
      split chooses the learning rate where there is one beside a test split, otherwise a held-out part of the training
      images does. Images without splits, or of a single one, are split: a tenth to test on, a tenth to choose on.

    Raises:
      UserError: there is no such data set, or one without anything to train on, to test on or to tell apart.
    """
    if dataset in TASKS:
        if train or test:
            raise UserError(f"the splits of {dataset} are the paper's; name {TASKS[dataset].dataset} to choose others.")
        return TASKS[dataset]
    splits = _splits(dataset)
    if splits is None:
        if not dataset.startswith("tfds:") and "/" not in dataset and "." not in dataset:
            raise unknown_name("data set to transfer to (and no such folder)", dataset, TASKS)
        splits = ["train", "test"]  # an error says what is missing when the data are opened
    if not splits:
        raise UserError(f"{dataset} has no folders; images should lie in <class>/ or <split>/<class>/, e.g. cat/1.jpg.")
    if len(splits) == 1 and not test:
        whole = train or splits[0]
        count = _count(dataset, whole)
        if count is not None and count < FEWEST_TO_SPLIT:
            raise UserError(
                f"{dataset} has {count} images, too few to hold a tenth out to test on. Add some, at least "
                f"{FEWEST_TO_SPLIT} in all, or divide them into folders train/<class>/ and test/<class>/."
            )
        choose, final = (f"{whole}[:80%]", f"{whole}[80%:90%]"), (f"{whole}[:90%]", f"{whole}[90%:]")
        return _task(dataset, {"choose": choose, "final": final}, whole, count, 0.9)
    found, validation = train or _find(splits, "train"), _find(splits, "validation")
    test = test or _find(splits, "test")
    if not found or not (test or validation):
        raise _unnamed(dataset, splits, found, test)
    if split_role(found.partition("[")[0]) == "test":
        logger.warning("%s: trains on the split %r, which by its name is for testing.", dataset, found)
    train, count = found, _count(dataset, found)
    if test and validation and validation not in (train, test):
        both = count + (_count(dataset, validation) or 0) if count else None
        choose, final = (train, validation), (f"{train}+{validation}", test)
        return _task(dataset, {"choose": choose, "final": final}, train, both)
    percent = held_out_percent(count or 0)
    choose = (f"{train}[:{100 - percent}%]", f"{train}[{100 - percent}%:]")
    final = (train, test or validation or "")
    return _task(dataset, {"choose": choose, "final": final}, train, count)


def _task(
    dataset: str, splits: Mapping[str, tuple[str, str]], train: str, count: int | None, share: float = 1.0
) -> TransferTask:
    """The task of a data set with so many images, of which a share is for the final training; `train` has some."""
    source = open_source(dataset, train) if count is not None else None
    if source and source.num_classes == 1:
        names = ", ".join(source.class_names or ())
        raise UserError(f"{dataset} has a single class ({names}), so there is nothing to tell apart. Add another.")
    return TransferTask(
        dataset=dataset,
        splits=splits,
        num_images={"choose": None, "final": None},
        num_classes=None,
        steps=hyper_rule_steps(round((count or 0) * share)),
        learning_rates=TABLE_4["Pets"].learning_rates,
        small_images=source is not None and _is_small(source),
    )


def _is_small(source: Source) -> bool:
    """Whether the first image is that can be read."""
    for index in range(min(len(source), 100)):
        with contextlib.suppress(UserError):  # training tells which cannot
            image = source[index]["image"]
            return math.prod(size_of(image) if isinstance(image, bytes) else image.shape[:2]) < SMALL_AREA
    return False


def _find(splits: list[str], role: str) -> str:
    """The split that is for this, by its name; "" if there is none."""
    return next((split for split in splits if split_role(split) == role), "")


def _unnamed(dataset: str, splits: list[str], train: str, test: str) -> UserError:
    """The error where names do not say what to train on or to test on.

    Its example trains on nothing that might be test images: what is for what is read from parts of the names, and where
    they tell nothing, from the person.
    """
    wanted = "test" if train else "train"
    left = [split for split in splits if split not in (train, test)]
    likely = [split for split in left if _seems(split) == wanted]
    if train:
        test = (likely or [split for split in left if _seems(split) != "train"] or ["<split>"])[0]
    else:
        train = (likely or ["<split>"])[0]
        test = test or next((split for split in left if _seems(split) in ("test", "validation")), "<split>")
    return UserError(
        f"{show_name(dataset)} has the splits {', '.join(map(show_name, splits))}. None of them is called "
        f"{_WORDS[wanted]}; say which is to {wanted} on, such as "
        f"--config=...:dataset={quote_argument(dataset)},train={quote_argument(train)},test={quote_argument(test)}"
    )


def _seems(split: str) -> str | None:
    """What a split is for, by any word in its name: "seg_train", "Test_Images", "testset2"."""
    for word in re.findall(r"[a-z]+", split.lower()):
        for part in ("train", "test", "val"):
            if word.startswith(part) or word.endswith(part):
                return {"val": "validation"}.get(part, part)
        if word in ("eval", "evaluation", "dev", "holdout", "heldout"):
            return "test"
    return None


def _splits(dataset: str) -> list[str] | None:
    """Names of the splits; None where the data set is not here."""
    if dataset == "digits":
        return ["train", "test"]
    if dataset.startswith("tfds:"):
        folder = find_tfds(dataset.removeprefix("tfds:"))
    else:
        path = find_path(dataset)
        if path is None:
            return None
        folder = prepared_folder(path)
        if folder is None:
            return list_splits(path)
    if folder is None:
        return None
    import tensorflow_datasets as tfds  # takes a third of a second; without TensorFlow

    return sorted(tfds.builder_from_directory(folder).info.splits)


def _count(dataset: str, split: str) -> int | None:
    """Number of images of a split; None where the data set is not here."""
    return None if _splits(dataset) is None else len(open_source(dataset, split))
