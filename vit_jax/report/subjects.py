"""Networks that were trained from scratch, each with everything that was measured of it: what studies compare."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit_jax.data.transfer_tasks import TASKS
from vit_jax.paper.figures_in_words import FIGURE_4_IMAGES
from vit_jax.report.listings import common_folder
from vit_jax.report.measured import ACCURACY, TOP_5, MeasuredModel
from vit_jax.report.names import PRE_TRAINING_IMAGES, TEST_SPLITS, data_set_name
from vit_jax.report.recipes import IMAGENET, others_note
from vit_jax.report.seeds import SeedGroup, SeedMean, group
from vit_jax.report.settings import attributes
from vit_jax.run.workdir import is_among

FIVE_SHOT = f"5-shot {IMAGENET}"
FINE_TUNED = ("fine-tuned on ", "linear probe on ")  # begin the names of numbers after transfer
_WITHIN = 0.15  # as `names.pre_training_name`


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network that was trained from scratch, with all seeds of its setting.

    Attributes:
      model: the first run; or, if only fine-tuning from it was found, the first fine-tuned model.
      training: all settings of the pre-training, by field.
      data: its data, by the paper's name if there is one.
      num_images: number of images; None if unknown.
      exaflops: compute of the pre-training; None if unknown.
      measures: numbers in percent: few-shot accuracies, accuracy on its own test set, accuracy after fine-tuning.
      curves: the course of each measure: epochs, and means over the seeds that have all of these points, in percent.
      paths: folders of the pre-trainings.
    """

    model: MeasuredModel
    training: Mapping[str, Any]
    data: str
    num_images: int | None
    exaflops: float | None
    measures: Mapping[str, SeedMean]
    curves: Mapping[str, tuple[tuple[float, float], ...]]
    paths: tuple[str, ...]

    @property
    def fields(self) -> Mapping[str, Any]:
        """All attributes of the model, by name."""
        return {name[6:]: value for name, value in self.training.items() if name.startswith("model.")}

    def settings_without(self, varied: Sequence[str]) -> str:
        """The settings of the pre-training except those that a study varies; equal for networks it compares."""
        left = {name: value for name, value in self.training.items() if not is_among(name, varied)}
        return json.dumps(left, sort_keys=True, default=str)

    @property
    def is_papers(self) -> bool:
        """Whether it was pre-trained on data of the paper, and measured as the paper's studies: 5-shot ImageNet."""
        return FIVE_SHOT in self.measures and is_papers_data(self)


def is_papers_data(subject: Subject) -> bool:
    """Whether the data are ImageNet, ImageNet-21k, JFT-300M, or one of figure 4's subsets of JFT-300M."""
    if subject.training.get("objective", "classification") != "classification":
        return False
    if subject.data in PRE_TRAINING_IMAGES:
        return True
    is_jft = data_set_name(str(subject.training.get("data.dataset", ""))) == "JFT-300M"
    images = subject.num_images or 0
    return is_jft and any(abs(images / each - 1) <= _WITHIN for each in FIGURE_4_IMAGES)


def find_subjects(models: Iterable[MeasuredModel]) -> list[Subject]:
    """Finds the networks that were trained from scratch among models with results, and what was measured of them."""
    found: dict[str, dict[str, list[SeedGroup]]] = {}
    for each in group(model for model in models if model.is_result):
        first = each.first
        training = _pre_training_of(first)
        if not training:
            continue
        key = json.dumps([training, _data_of(first)], sort_keys=True, default=str)
        names = {name for model in each.models for name in model.results if not name.endswith(TOP_5)}
        of_subject = found.setdefault(key, {})
        for name in sorted(names):
            of_subject.setdefault(f"{_FINE}{name}" if _is_fine_tuned(first) else name, []).append(each)
    return [_make_subject(measures) for measures in found.values() if measures]


def _is_fine_tuned(model: MeasuredModel) -> bool:
    return model.before is not None and bool(model.trained_on)


def _pre_training_of(model: MeasuredModel) -> Mapping[str, Any]:
    """The settings of the training from scratch behind a model; {} if it is not one of one or two trainings."""
    if model.before is None:
        return model.training
    if model.trained_on:
        return model.before.from_scratch
    if model.lineage.is_released and model.lineage.num_images:  # a released checkpoint that was not fine-tuned
        return {**attributes(model.fields), "weights": model.lineage.name}
    return {}


_FINE = ">"  # marks the numbers of fine-tuned models until they have a name


def _data_of(model: MeasuredModel) -> str:
    return (model.before if model.before and model.trained_on else model.lineage).data


def _make_subject(found: Mapping[str, Sequence[SeedGroup]]) -> Subject:
    candidates: dict[str, list[tuple[str, SeedGroup]]] = {}
    for name, groups in found.items():
        plain = name.removeprefix(_FINE)
        for each in groups:
            candidates.setdefault(_measure_name(each.first, plain), []).append((plain, each))
    measures, curves = {}, {}
    for measure, of_measure in candidates.items():
        ranked = sorted(of_measure, key=lambda each: _rank(*each))
        name, first = ranked[0]
        if mean := first.mean(name):
            notes = [f"its config changed during the run, {change}" for change in first.first.changes]
            measures[measure] = mean.noted(*others_note([each for _, each in ranked]), *notes)
            curves[measure] = _curve(first, name)
    groups = [each for of_name in found.values() for each in of_name]
    own = [each for each in groups if not _is_fine_tuned(each.first)] or groups
    model = min(own, key=lambda each: -len(each.models)).first
    lineage = model.before if model.before and _is_fine_tuned(model) else model.lineage
    if _is_fine_tuned(model):
        paths = {tuned.before.name for each in groups for tuned in each.models if tuned.before}
    else:
        paths = {path for each in own for path in each.paths}
    return Subject(
        model=model,
        training=_pre_training_of(model),
        data=lineage.data,
        num_images=lineage.num_images,
        exaflops=lineage.exaflops,
        measures=measures,
        curves=curves,
        paths=tuple(sorted(paths)),
    )


def _rank(name: str, each: SeedGroup) -> tuple[int, int, str]:
    differences = len(each.first.changes) + sum(len(model.values[name].notes) for model in each.having(name)[:1])
    return differences, -len(each.models), str(each.first.path)


def _measure_name(model: MeasuredModel, name: str) -> str:
    """A column's name, such as "5-shot digits", "accuracy, test" or "fine-tuned on Pets at 384 px"."""
    measured_on = data_set_name(model.dataset)
    split = str(model.eval_split)
    if not _is_fine_tuned(model):
        if name != ACCURACY:
            return name
        return f"accuracy, {split}" if measured_on == model.trained_on else f"accuracy, {measured_on} {split}"
    how = FINE_TUNED[bool(model.training.get("train_only"))]
    part = str(model.training.get("data.train_split") or "train")
    usual = "train" if TEST_SPLITS.get(model.trained_on) is None else _usual_train_split(model.trained_on)
    trained_on = model.trained_on if part in ("train", usual) else f"{model.trained_on} {part}"
    what = "" if name == ACCURACY else f", {name}"
    return f"{how}{trained_on} at {model.image_size} px{what}"


def _usual_train_split(task: str) -> str:
    (transfer,) = (each for each in TASKS.values() if data_set_name(each.dataset) == task)
    return transfer.splits["final"][0]


def _curve(each: SeedGroup, name: str) -> tuple[tuple[float, float], ...]:
    """The mean over seeds of a number during training, by epochs, where all seeds have it; () if there is no course."""
    models = [model for model in each.having(name) if model.before is None]
    histories = [dict(model.history.get(name, ())) for model in models]
    steps, epochs = each.first.steps, each.first.lineage.epochs
    if not histories or not steps or not epochs:
        return ()
    shared = sorted(set.intersection(*(set(history) for history in histories)))
    points = [(step / steps * epochs, [history[step] for history in histories]) for step in shared]
    return tuple((epoch, 100 * sum(values) / len(values)) for epoch, values in points)


def comparisons(subjects: Sequence[Subject], varied: Sequence[str]) -> dict[str, list[Subject]]:
    """Groups networks that differ only in the settings that a study varies, by the folder that they share."""
    alike: dict[str, list[Subject]] = {}
    for subject in subjects:
        alike.setdefault(subject.settings_without(varied), []).append(subject)
    named: dict[str, list[Subject]] = {}
    for members in alike.values():
        name = common_folder([path for member in members for path in member.paths])
        again = sum(other.partition(" (")[0] == name for other in named)
        named[f"{name} ({again + 1})" if again else name] = members
    return named
