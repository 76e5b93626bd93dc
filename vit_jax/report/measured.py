"""The numbers among the metrics of a run or an evaluation: what each is of, how it was measured, and its flaws."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.data.sources.imagenet_variants import NUM_IMAGES
from vit_jax.data.sources.real_labels import NUM_IMAGES as NUM_VALIDATION_IMAGES
from vit_jax.data.sources.real_labels import NUM_LABELLED
from vit_jax.data.transfer_tasks import TASKS
from vit_jax.data.vtab import TASKS as VTAB_TASKS
from vit_jax.report import settings
from vit_jax.report.names import data_set_name, vtab_task
from vit_jax.report.run_files import defaults
from vit_jax.report.settings import Settings

# Names of metrics of `vit_jax.experiment.evaluations.make_evaluations`, and how a reader knows them.
VARIANT_NAMES = {
    "real": "ImageNet ReaL",
    "imagenet_v2": "ImageNet-V2",
    "imagenet_r": "ImageNet-R",
    "imagenet_a": "ImageNet-A",
    "imagenet_sketch": "ImageNet-Sketch",
    "objectnet": "ObjectNet",
}
ACCURACY, TOP_5, REAL = "accuracy", "top-5", VARIANT_NAMES["real"]

# Test sets of the paper's tasks: the validation images of ImageNet, and what TFDS says of the others.
TEST_IMAGES = {
    "imagenet2012": NUM_VALIDATION_IMAGES,
    "cifar10": 10_000,
    "cifar100": 10_000,
    "pets": 3_669,
    "flowers": 6_149,
}

_FEW_SHOT = re.compile(r"fewshot/(?P<where>.+)/(?P<representation>[^/]+)/(?P<shots>\d+)shot(?P<std>_std)?")
_USUAL_REPRESENTATION = "pre_logits"
_FEW_SHOT_SIZE = 224
_FEW_SHOT_POOL = {"tfds:imagenet2012": "train[:65000]"}  # of the released evaluator


@dataclasses.dataclass(frozen=True)
class Value:
    """A number that was measured, as a share.

    Attributes:
      value: the number.
      std: over draws of few-shot images, where there are several.
      notes: what a reader of it should know.
      settings: what it was measured of and how; two numbers with other settings are no two samples of one.
      images: how many it is of, and their fingerprint; None for what was not recorded.
      flaw: why it is not a result; "" for one that is.
    """

    value: float
    std: float | None = None
    notes: tuple[str, ...] = ()
    settings: Settings = ()
    images: tuple[int | None, str | None] = (None, None)
    flaw: str = ""

    def agrees_with(self, other: "Value") -> bool:
        """Whether both were measured on the same images in the same way, as far as that was recorded."""
        return self.settings == other.settings and same_images(self.images, other.images)


def same_images(one: tuple[int | None, str | None], other: tuple[int | None, str | None]) -> bool:
    """Whether two sets of images, by number and fingerprint, may be one; what was not recorded fits everything."""
    return all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the metrics of a run or an evaluation say.

    Attributes:
      values: by name: `ACCURACY`, `TOP_5`, names of `VARIANT_NAMES`, "5-shot <data set>".
      examples: how many images `ACCURACY` is of; None where that was not recorded.
      problems: numbers that are left out, each with the reason.
    """

    values: dict[str, Value]
    examples: int | None
    problems: list[str]


def measure(
    fields: Mapping[str, Any],
    model: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    fingerprint: str | None = None,
    overlap: Any = None,
    notes: tuple[str, ...] = (),
) -> Measured:
    """Reads the numbers among metrics.

    Args:
      fields: of the config, flat.
      model: what the model was made with.
      metrics: by name.
      fingerprint: of the images of the evaluation split, if it was recorded.
      overlap: by evaluation, how many of its examples were trained on, if that was recorded.
      notes: on all of the numbers.
    """
    problems: list[str] = []

    def share(name: str) -> float | None:
        return _number(metrics, name, problems, at_most=1.0)

    def count(name: str) -> int | None:
        number = _number(metrics, name, problems)
        return None if number is None else int(number)

    def flaw(evaluation: str, number: int | None, whole: Sequence[int]) -> str:
        seen = overlap.get(evaluation) if isinstance(overlap, dict) else None
        if seen:
            return f"measured on images of which {seen} were trained on"
        return _flaw_of_part(number, whole)

    values: dict[str, Value] = {}
    split, anew = fields["data.eval_split"], bool(fields["data.eval_labels"])  # ImageNet's images with other labels
    examples = count(f"{split}/examples") if split is not None else None
    if split is not None:
        how = settings.accuracy_settings(fields, model)
        told = (*notes, *_loss_note(metrics, split))
        flawed = flaw(split, examples, _whole(fields))
        for metric, name in (
            ("accuracy", REAL if anew else ACCURACY),
            ("top5_accuracy", f"{REAL} {TOP_5}" if anew else TOP_5),
        ):
            if (value := share(f"{split}/{metric}")) is not None:
                values[name] = Value(value, None, told, how, (examples, fingerprint), flawed)
    for variant, name in VARIANT_NAMES.items():
        if (value := share(f"{variant}/accuracy")) is not None:
            how = settings.variant_settings(variant, fields, model)
            number = count(f"{variant}/examples")
            flawed = flaw(variant, number, (NUM_LABELLED if variant == "real" else NUM_IMAGES[variant],))
            told = (*notes, *_loss_note(metrics, variant))
            values[name] = Value(value, None, told, how, (number, None), flawed)
    for name, (where, few_shot) in _few_shot(fields, model, metrics, notes, problems).items():
        number = count(f"fewshot/{where}/examples")
        whole = _whole_of_task(dict(few_shot.settings)["fewshot.datasets"], fields["fewshot.test_split"])
        flawed = flaw(f"fewshot/{where}", number, whole)
        values[name] = dataclasses.replace(few_shot, images=(number, None), flaw=flawed)
    return Measured(values, examples, problems)


def _number(metrics: Mapping[str, Any], name: str, problems: list[str], *, at_most: float = math.inf) -> float | None:
    """A metric, if there is one that can be; otherwise tells what is there instead."""
    value = metrics.get(name)
    if value is None and name not in metrics:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        problems.append(f"{name} is {value!r}, not a number")
    elif not math.isfinite(value):
        problems.append(f"{name} is {value}, not a finite number")
    elif not 0 <= value <= at_most:
        problems.append(f"{name} is {value}, which cannot be")
    else:
        return float(value)
    return None


def _loss_note(metrics: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
    loss = metrics.get(f"{prefix}/loss")
    if isinstance(loss, float) and not math.isfinite(loss):
        return (f"{prefix}/loss is {loss}: some logits are not finite, and what they count as says nothing",)
    return ()


def _whole(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """How many images the test set that is evaluated on has, if it is one of the paper's; () for others."""
    dataset, split = str(fields["data.dataset"]), fields["data.eval_split"]
    whole = _whole_of_task(dataset, split)
    return (NUM_LABELLED,) if whole == (NUM_VALIDATION_IMAGES,) and fields["data.eval_labels"] else whole


def _whole_of_task(dataset: str, split: str) -> tuple[int, ...]:
    if task := vtab_task(dataset):
        return vtab_test_images(task) if split == "test" else ()
    for name, each in TASKS.items():
        if data_set_name(each.dataset) == data_set_name(dataset) and split == each.splits["final"][1]:
            return (TEST_IMAGES[name],)
    return ()


def vtab_test_images(task: str) -> tuple[int, ...]:
    """How many test images a task of VTAB has; several numbers where versions of the data set differ."""
    data = VTAB_TASKS[task].data
    name, _, part = data.splits["test"].partition("[")
    begin = int(part.partition(":")[0]) if part else 0
    return tuple(size - begin for size in data.sizes[name])


def _flaw_of_part(examples: int | None, whole: Sequence[int]) -> str:
    if examples is None or not whole or examples in whole:
        return ""
    return f"measured on {examples:,} of {max(whole):,} images"


def _few_shot(
    fields: Mapping[str, Any],
    model: Mapping[str, Any],
    metrics: Mapping[str, Any],
    notes: tuple[str, ...],
    problems: list[str],
) -> dict[str, tuple[str, Value]]:
    """Few-shot accuracies by name, "5-shot ImageNet", each with what its evaluator calls the data set."""
    values = {}
    datasets = [str(dataset) for dataset in fields["fewshot.datasets"]]
    known = {task.dataset: task.splits["final"][1] for task in TASKS.values()}
    for metric in metrics:
        match = _FEW_SHOT.fullmatch(metric)
        if not match or match["std"]:
            continue
        value = _number(metrics, metric, problems, at_most=1.0)
        if value is None:
            continue
        dataset = _few_shot_data_set(match["where"], datasets)
        name = f"{match['shots']}-shot {data_set_name(dataset)}"
        if (split := fields["fewshot.test_split"]) != known.get(dataset, "test"):
            name += f" {split}"
        if match["representation"] != _USUAL_REPRESENTATION:
            name += f" ({match['representation']})"
        how = settings.few_shot_settings(dataset, fields, model)
        std = _number(metrics, f"{metric}_std", problems)
        values[name] = match["where"], Value(value, std, (*notes, *_few_shot_notes(dataset, how)), how)
    return values


def _few_shot_notes(dataset: str, how: Settings) -> list[str]:
    """What was done in another way than the released evaluator does it."""
    usual = {name: settings.plain(value) for name, value in defaults().items() if name.startswith("fewshot.")}
    usual |= {"fewshot.train_split": _FEW_SHOT_POOL.get(dataset, usual["fewshot.train_split"])}
    done = {name: value for name, value in how if name.startswith("fewshot.")}
    size = done["fewshot.image_size"]
    notes = [] if size == _FEW_SHOT_SIZE else [f"few-shot images at {size} pixels, usually {_FEW_SHOT_SIZE}"]
    if isinstance(size, int):
        usual["fewshot.crop_from"] = round(size * 256 / 224)
    for name, value in done.items():
        # Its data set and its test split are part of the name.
        if name not in ("fewshot.datasets", "fewshot.test_split", "fewshot.image_size") and value != usual.get(name):
            notes.append(f"{name}={value}, usually {usual.get(name)}")
    return notes


def _few_shot_data_set(where: str, datasets: Sequence[str]) -> str:
    """The data set of a config that an evaluator bears the short name of."""
    return next((each for each in datasets if re.fullmatch(f"(.*[:/])?{re.escape(where)}/*", each)), where)
