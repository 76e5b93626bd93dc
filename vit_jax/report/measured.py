"""Models with their measured numbers: values from metrics, how each was measured, and its flaws."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.data.imagenet_test_sets import IMAGENET_TEST_SETS
from vit_jax.data.transfer_tasks import TASKS
from vit_jax.data.vtab import TASKS as VTAB_TASKS
from vit_jax.evaluators.registry import TYPES
from vit_jax.files import AnyPath
from vit_jax.report import settings
from vit_jax.report.lineage import Lineage
from vit_jax.report.names import data_set_name, vtab_task
from vit_jax.report.purposes import FINAL, Purpose
from vit_jax.run.run_result import counts

NUM_VALIDATION_IMAGES = IMAGENET_TEST_SETS["real"].num_images
NUM_LABELLED = IMAGENET_TEST_SETS["real"].num_labelled
ACCURACY, TOP_5, REAL = "accuracy", "top-5", IMAGENET_TEST_SETS["real"].title

# Sizes of the test sets of the paper's tasks: ImageNet's validation images, and the others from TFDS.
TEST_IMAGES = {
    "imagenet2012": NUM_VALIDATION_IMAGES,
    "cifar10": 10_000,
    "cifar100": 10_000,
    "pets": 3_669,
    "flowers": 6_149,
}

_CHECKED = re.compile(r"(?!train/).*/(examples|accuracy|top5_accuracy|\d+shot|\d+shot_std)")
_UNBOUNDED = ("/examples", "_std")
_FEW_SHOT = re.compile(r"(?P<prefix>(?P<entry>[^/]+)/(?P<where>.+))/(?P<representation>[^/]+)/(?P<shots>\d+)shot")
_FEW_SHOT_SIZE = 224
_FEW_SHOT_POOL = {"tfds:imagenet2012": "train[:65000]"}  # the released evaluator's

Images = tuple[int | None, str | None]  # their number and fingerprint; None: not recorded


@dataclasses.dataclass(frozen=True)
class MeasuredValue:
    """A measured share, such as an accuracy.

    Attributes:
      value: the number.
      std: standard deviation over draws of few-shot images, if there are several.
      notes: notes for readers.
      settings: what was measured and how; numbers with different settings are not averaged.
      images: the images that it was measured on.
      flaw: why it is not a result; "" if it is one.
      metric: its name in the metrics.
    """

    value: float
    std: float | None = None
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    images: Images = (None, None)
    flaw: str = ""
    metric: str = ""

    def agrees_with(self, other: "MeasuredValue") -> bool:
        """Whether both were measured on the same images in the same way, as far as recorded."""
        return self.settings == other.settings and same_images(self.images, other.images)


def same_images(one: Images, other: Images) -> bool:
    """Whether two sets of images may be the same; unrecorded values match anything."""
    return all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))


@dataclasses.dataclass(frozen=True)
class MeasuredModel:
    """Parameters with the numbers that their run, or an evaluation, measured.

    Attributes:
      path: folder of the run, or of the evaluation.
      model: label, such as "ViT-B/16".
      fields: the arguments of `create_model`, as far as known.
      before: lineage of the training's initial weights; None: it began from scratch.
      lineage: lineage of the measured parameters, including that training.
      trained_on: name of the training's data set; "" for weights that were not trained further.
      dataset: the data set of `ACCURACY`, as in `config.data.dataset`.
      eval_split: its split.
      image_size: in pixels.
      key: equal for models that may be averaged, if they have the same `image_size`.
      values: by name: `ACCURACY`, `TOP_5`, "5-shot <data set>", titles or names of other evaluations.
      purpose: whether its numbers are results.
      seed: seed of the training; None for weights that were not trained here.
      training: all settings of the training by field; {} for such weights.
      train_images: the training images.
      changes: changes of the config during training.
      besides: folders of evaluations whose values are among these.
      history: each value during the training, as pairs of step and share.
      speed: images a second and core in training, the median; None if not recorded.
      device: kind of the devices that it was trained on; "" if not recorded.
      study: the figure or table of the paper that its config page is for; "" if it is of no study.
    """

    path: AnyPath
    model: str
    fields: Mapping[str, Any]
    before: Lineage | None
    lineage: Lineage
    trained_on: str
    dataset: str
    eval_split: str | None
    image_size: int
    key: str
    values: dict[str, MeasuredValue]
    purpose: Purpose = Purpose(FINAL)  # noqa: RUF009 - frozen
    seed: int | None = None
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_images: Images = (None, None)
    changes: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    history: Mapping[str, tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=dict)
    speed: float | None = None
    device: str = ""
    study: str = ""

    @property
    def steps(self) -> int | None:
        """Length of the training; None if unknown."""
        return self.training.get("steps")

    @property
    def is_result(self) -> bool:
        """Whether any of its numbers is a result."""
        return self.purpose.what == FINAL

    @property
    def results(self) -> dict[str, MeasuredValue]:
        """The values that are results."""
        return {name: value for name, value in self.values.items() if not value.flaw} if self.is_result else {}

    def goes_with(self, other: "MeasuredModel") -> bool:
        """Whether two models may be averaged: one setting, the same images, measured in the same way.

        Ignores numbers that are not results.
        """
        if (self.key, self.image_size) != (other.key, other.image_size):
            return False
        pairs = [(self.values[name], other.values[name]) for name in self.values.keys() & other.values.keys()]
        agree = all(one.agrees_with(another) for one, another in pairs if not (one.flaw or another.flaw))
        return agree and same_images(self.train_images, other.train_images)


def measure(
    fields: Mapping[str, Any],
    model: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    fingerprint: str | None = None,
    overlap: Any = None,
    notes: Sequence[str] = (),
) -> tuple[dict[str, MeasuredValue], list[str]]:
    """Reads the measured numbers from metrics.

    Args:
      fields: fields of the config, flat.
      model: the arguments of `create_model`.
      metrics: by name.
      fingerprint: fingerprint of the evaluation split's images, if recorded.
      overlap: the number of each evaluation's examples that were trained on, if recorded.
      notes: notes on all of the numbers.

    Returns:
      Values by name, as in `MeasuredModel`, and a line for each number that is left out.
    """
    numbers, problems = _check_numbers(metrics)
    overlap = counts(overlap)
    values: dict[str, MeasuredValue] = {}

    def add(
        name: str,
        metric: str,
        prefix: str,
        how: Mapping[str, Any],
        whole: Sequence[int],
        own_notes: Sequence[str] = (),
        fingerprint: str | None = None,
    ) -> None:
        if metric not in numbers:
            return
        examples = int(numbers[f"{prefix}/examples"]) if f"{prefix}/examples" in numbers else None
        flaw, loss, loss_notes = "", metrics.get(f"{prefix}/loss"), []
        if prefix in overlap:
            flaw = f"measured on images of which {overlap[prefix]} were trained on"
        elif examples is not None and whole and examples not in whole:
            flaw = f"measured on {examples:,} of {max(whole):,} images"
        if isinstance(loss, float) and not math.isfinite(loss):
            loss_notes = [f"{prefix}/loss is {loss}: some logits are not finite, so the accuracy may be meaningless"]
        noted = (*notes, *own_notes, *loss_notes)
        std, images = numbers.get(f"{metric}_std"), (examples, fingerprint)
        values[name] = MeasuredValue(numbers[metric], std, noted, how, images, flaw, metric)

    split = fields["data.eval_split"]
    if split is not None:
        how, dataset = settings.accuracy_settings(fields, model), str(fields["data.dataset"])
        whole = _whole_test_set(dataset, split)
        top_1, top_5 = ACCURACY, TOP_5
        if fields["data.eval_labels"]:  # ReaL labels
            top_1, top_5 = REAL, f"{REAL} {TOP_5}"
            whole = (NUM_LABELLED,) if whole == (NUM_VALIDATION_IMAGES,) else whole
        add(top_1, f"{split}/accuracy", split, how, whole, fingerprint=fingerprint)
        add(top_5, f"{split}/top5_accuracy", split, how, whole, fingerprint=fingerprint)
    entries = settings.entries_of(fields)
    for entry, given in entries.items():
        if given["type"] != "fewshot" and entry != split:
            variant = str(given["variant"] or entry) if given["type"] == "imagenet_variant" else ""
            test_set = IMAGENET_TEST_SETS.get(variant)
            title = test_set.title if test_set and variant == entry else entry
            whole = (test_set.num_labelled,) if test_set else ()
            add(title, f"{entry}/accuracy", entry, settings.entry_settings(entry, fields, model), whole)
    for metric, match in ((metric, _FEW_SHOT.fullmatch(metric)) for metric in metrics):
        given = entries.get(match["entry"], {}) if match else {}
        if match and given.get("type") == "fewshot":
            split, where = given["test_split"], match["where"]  # the data set by its short name
            full = re.compile(f"(.*[:/])?{re.escape(where)}/*")
            dataset = next(filter(full.fullmatch, map(str, given["datasets"])), where)
            how = settings.few_shot_settings(match["entry"], dataset, fields, model)
            name, whole = _few_shot_name(dataset, match, split), _whole_test_set(dataset, split)
            add(name, metric, match["prefix"], how, whole, _few_shot_notes(match["entry"], dataset, how))
    return values, problems


def history_of(
    values: Mapping[str, MeasuredValue], rows: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[tuple[int, float], ...]]:
    """The course of each value over the rows of `metrics.jsonl`: pairs of step and share, finite ones only."""
    history = {}
    for name, value in values.items():
        points = [(row["step"], row[value.metric]) for row in rows if value.metric in row]
        history[name] = tuple((step, float(share)) for step, share in points if _is_share(share))
    return history


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _check_numbers(metrics: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Returns the valid metrics, and a line for each that is not a number or out of range."""
    numbers, problems = {}, []
    for name, value in metrics.items():
        if not _CHECKED.fullmatch(name):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            problems.append(f"{name} is {value!r}, not a number")
        elif not math.isfinite(value):
            problems.append(f"{name} is {value}, not a finite number")
        elif value < 0 or (value > 1 and not name.endswith(_UNBOUNDED)):
            problems.append(f"{name} is {value}, which is impossible")
        else:
            numbers[name] = float(value)
    return numbers, problems


def _whole_test_set(dataset: str, split: str) -> tuple[int, ...]:
    """The number of images of a test set of the paper; () for others."""
    if task := vtab_task(dataset):
        return vtab_test_images(task) if split == "test" else ()
    tests = {(data_set_name(task.dataset), task.splits["final"][1]): name for name, task in TASKS.items()}
    name = tests.get((data_set_name(dataset), split))
    return (TEST_IMAGES[name],) if name else ()


def vtab_test_images(task: str) -> tuple[int, ...]:
    """The number of test images of a VTAB task; several if versions of the data set differ."""
    data = VTAB_TASKS[task].data
    name, _, part = data.splits["test"].partition("[")
    begin = int(part.partition(":")[0]) if part else 0
    return tuple(size - begin for size in data.sizes[name])


def _few_shot_name(dataset: str, match: re.Match[str], split: str) -> str:
    """The name of a few-shot accuracy, such as "5-shot ImageNet"."""
    usual = {task.dataset: task.splits["final"][1] for task in TASKS.values()}.get(dataset, "test")
    name = f"{match['shots']}-shot {data_set_name(dataset)}" + ("" if split == usual else f" {split}")
    others = [
        match[part] for part, usual in (("representation", "pre_logits"), ("entry", "fewshot")) if match[part] != usual
    ]
    return f"{name} ({', '.join(others)})" if others else name


def _few_shot_notes(entry: str, dataset: str, how: Mapping[str, Any]) -> list[str]:
    """Notes on differences from the released evaluator."""
    prefix = f"evals.{entry}."
    done = {name.removeprefix(prefix): value for name, value in how.items() if name.startswith(prefix)}
    size = done["image_size"]
    usual = {name: settings.plain(field.default) for name, field in TYPES["fewshot"].fields.items()}
    usual |= {"train_split": _FEW_SHOT_POOL.get(dataset, usual["train_split"]), "crop_from": round(size * 256 / 224)}
    notes = [] if size == _FEW_SHOT_SIZE else [f"few-shot images at {size} pixels, usually {_FEW_SHOT_SIZE}"]
    elsewhere = ("datasets", "test_split", "image_size")  # in the number's name, or noted above
    return notes + [
        f"{prefix}{name}={value}, usually {usual[name]}"
        for name, value in done.items()
        if name not in elsewhere and value != usual[name]
    ]
