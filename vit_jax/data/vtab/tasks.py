"""The 19 tasks: data sets, splits, labels; and the score, the mean over them.

Sources:

- Data sets, splits, labels and numbers of classes: google-research/task_adaptation, `task_adaptation/data/*.py` (the
  version that has train800, val200 and train800val200), and the numbers of examples in its tests, `*_test.py`.
- The splits agree with google-research/scenic's config "Plain ViT on VTAB". (Its training split of Clevr-Count has
  1,000 + 200 examples against the benchmark's 800 + 200; that must be a slip.)
- Names, features and versions: the builders of tensorflow-datasets 4.9.10.
- Flipping and cropping: Kolesnikov et al., "Big Transfer" (2020), appendix F; the same in scenic's config.

Slices are by number: VTAB takes whole percentages of a split's size, rounded down, where TFDS rounds to the nearest
example. Only SVHN's size leaves a remainder, 90 % of 73,257 being 65,931.3, so both give 65,931.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from vit_jax.data.sources.records import Features
from vit_jax.data.vtab.task_labels import (
    clevr_count,
    clevr_distance,
    dsprites_location,
    dsprites_orientation,
    dsprites_pixels,
    kitti_distance,
)
from vit_jax.errors import unknown_name

GROUPS = ("natural", "specialized", "structured")


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set that TFDS prepares, and VTAB's splits of it.

    Attributes:
      name: <name>[/<config>] in TFDS.
      versions: those with VTAB's examples, the one that VTAB used first.
      sizes: numbers of examples of TFDS's splits; several if a version leaves damaged images out.
      splits: VTAB's splits as slices of TFDS's: all examples in "train", "validation" and "test", and VTAB-1k in
        "train800", "val200" and "train800val200".
      manual: whether TFDS cannot download it, but takes a folder with the downloaded files. docs/vtab.md says which.
      pixels: makes pixels from an encoded image that needs more than decoding.
    """

    name: str
    versions: tuple[str, ...]
    sizes: Mapping[str, tuple[int, ...]]
    splits: Mapping[str, str]
    manual: bool = False
    pixels: Callable[[bytes], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the 19.

    Attributes:
      id: short name, for commands.
      name: as in `vit_jax.paper.tables.VTAB_TASKS`.
      group: one of `GROUPS`.
      data: the data set.
      num_classes: labels are 0 to `num_classes - 1`.
      label: the feature with the label, or a function that derives it from the features.
      flip: whether a mirrored image keeps its label.
      crop: whether a part of an image keeps its label.
    """

    id: str
    name: str
    group: str
    data: DataSet
    num_classes: int
    label: str | Callable[[Features], int] = "label"
    flip: bool = True
    crop: bool = True


def _splits(train: str, validation: str, test: str) -> dict[str, str]:
    """VTAB's splits as slices of TFDS's; the training examples are the first of TFDS's "train"."""
    split, _, rest = validation.partition("[")
    start = int(rest.partition(":")[0] or 0)
    val200 = f"{split}[{start}:{start + 200}]"
    return {
        "train": train,
        "validation": validation,
        "test": test,
        "train800": "train[:800]",
        "val200": val200,
        "train800val200": f"train[:800]+{val200}",
    }


_OWN = _splits("train", "validation", "test")  # the data set has all three

_CALTECH101 = DataSet(
    "caltech101", ("3.*.*",), {"train": (3060,), "test": (6084,)}, _splits("train[:2754]", "train[2754:]", "test")
)
_CIFAR100 = DataSet(
    "cifar100", ("3.*.*",), {"train": (50_000,), "test": (10_000,)}, _splits("train[:45000]", "train[45000:]", "test")
)
_DTD = DataSet("dtd", ("3.*.*",), {"train": (1880,), "validation": (1880,), "test": (1880,)}, _OWN)
_FLOWERS102 = DataSet("oxford_flowers102", ("2.*.*",), {"train": (1020,), "validation": (1020,), "test": (6149,)}, _OWN)
_PETS = DataSet(
    "oxford_iiit_pet",
    ("3.*.*", "4.*.*"),  # 4.0.0 has the same lists and keys (oxford_iiit_pet_dataset_builder.py)
    {"train": (3680,), "test": (3669,)},
    _splits("train[:2944]", "train[2944:]", "test"),
)
_SUN397 = DataSet(
    "sun397/tfds",
    ("4.*.*",),
    # sun397_dataset_builder.py leaves an image out that cannot be decoded; it is number 66,481 of train.
    {"train": (76_128, 76_127), "validation": (10_875,), "test": (21_750,)},
    _OWN,
    manual=True,
)
_SVHN = DataSet(
    "svhn_cropped",
    ("3.*.*",),
    {"train": (73_257,), "test": (26_032,)},
    _splits("train[:65931]", "train[65931:]", "test"),
)
_CAMELYON = DataSet(
    "patch_camelyon", ("2.*.*",), {"train": (262_144,), "validation": (32_768,), "test": (32_768,)}, _OWN
)
_EUROSAT = DataSet(
    "eurosat/rgb", ("2.*.*",), {"train": (27_000,)}, _splits("train[:16200]", "train[16200:21600]", "train[21600:]")
)
_RESISC45 = DataSet(
    "resisc45",
    ("3.*.*",),
    {"train": (31_500,)},
    _splits("train[:18900]", "train[18900:25200]", "train[25200:]"),
    manual=True,
)
_RETINOPATHY = DataSet(
    "diabetic_retinopathy_detection/btgraham-300",
    ("3.*.*",),
    {"train": (35_126,), "validation": (10_906,), "test": (42_670,)},
    _OWN,
    manual=True,
)
_CLEVR = DataSet(
    "clevr",
    ("3.*.*",),
    {"train": (70_000,), "validation": (15_000,)},
    _splits("train[:63000]", "train[63000:]", "validation"),  # its own test split has no descriptions of the scenes
)
_DMLAB = DataSet("dmlab", ("2.*.*",), {"train": (65_550,), "validation": (22_628,), "test": (22_735,)}, _OWN)
_KITTI = DataSet(
    "kitti",
    ("3.*.*",),
    # TFDS's own splits, by video, not the 80/10/10 % of VTAB's paper: issue 9 of google-research/task_adaptation
    {"train": (6347,), "validation": (423,), "test": (711,)},
    _OWN,
)
_DSPRITES = DataSet(
    "dsprites",
    ("2.*.*",),
    {"train": (737_280,)},
    _splits("train[:589824]", "train[589824:663552]", "train[663552:]"),
    pixels=dsprites_pixels,
)
_SMALLNORB = DataSet(
    "smallnorb",
    ("2.*.*",),
    {"train": (24_300,), "test": (24_300,)},
    _splits("train", "test[:12150]", "test[12150:]"),  # validation images show other toys than training images
)

TASKS: dict[str, Task] = {
    task.id: task
    for task in (
        Task("caltech101", "Caltech101", "natural", _CALTECH101, 102),
        Task("cifar100", "CIFAR-100", "natural", _CIFAR100, 100),
        Task("dtd", "DTD", "natural", _DTD, 47),
        Task("flowers102", "Flowers102", "natural", _FLOWERS102, 102),
        Task("pets", "Pets", "natural", _PETS, 37),
        Task("sun397", "SUN397", "natural", _SUN397, 397),
        Task("svhn", "SVHN", "natural", _SVHN, 10),
        Task("camelyon", "Camelyon", "specialized", _CAMELYON, 2),
        Task("eurosat", "EuroSAT", "specialized", _EUROSAT, 10),
        Task("resisc45", "Resisc45", "specialized", _RESISC45, 45),
        Task("retinopathy", "Retinopathy", "specialized", _RETINOPATHY, 5),
        Task("clevr_count", "Clevr-Count", "structured", _CLEVR, 8, clevr_count, crop=False),
        Task("clevr_distance", "Clevr-Dist", "structured", _CLEVR, 6, clevr_distance, crop=False),
        Task("dmlab", "DMLab", "structured", _DMLAB, 6, crop=False),
        Task("dsprites_location", "dSpr-Loc", "structured", _DSPRITES, 16, dsprites_location, flip=False, crop=False),
        Task("dsprites_orientation", "dSpr-Ori", "structured", _DSPRITES, 16, dsprites_orientation, flip=False),
        Task("kitti_distance", "KITTI-Dist", "structured", _KITTI, 4, kitti_distance, crop=False),
        Task("smallnorb_azimuth", "sNORB-Azim", "structured", _SMALLNORB, 18, "label_azimuth", flip=False),
        Task("smallnorb_elevation", "sNORB-Elev", "structured", _SMALLNORB, 9, "label_elevation"),
    )
}


def get_task(name: str) -> Task:
    """Returns a task by its id; raises UserError if there is no such task."""
    if name not in TASKS:
        raise unknown_name("VTAB task", name, TASKS)
    return TASKS[name]


def group_means(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Means over groups of tasks and over all 19, with equal weights (table 9, figure 2).

    Args:
      accuracies: of each task, by its id, in any unit.

    Returns:
      a value for each of "natural", "specialized" and "structured" that is complete, and "mean" if all 19 tasks are
      given. A mean over fewer tasks is not a VTAB score.

    Raises:
      UserError: there is no such task.
    """
    for name in accuracies:
        get_task(name)
    members = {group: [task.id for task in TASKS.values() if task.group == group] for group in GROUPS}
    members["mean"] = list(TASKS)
    return {
        group: sum(accuracies[task] for task in tasks) / len(tasks)
        for group, tasks in members.items()
        if all(task in accuracies for task in tasks)
    }
