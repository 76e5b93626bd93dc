"""Lists of everything found: a line for each setting, and a line for each run."""

import itertools
from collections.abc import Iterable, Sequence

from vit_jax.report.markdown import Listing
from vit_jax.report.measured import ACCURACY, REAL, TOP_5, MeasuredModel, same_images
from vit_jax.report.names import data_set_name
from vit_jax.report.pretrained import dropout_of
from vit_jax.report.seeds import SeedGroup, SeedMean, group
from vit_jax.report.settings import differing

_USUAL_SPLITS = ("", "train")
_DESCRIBED = ("model", "pre-trained on", "trained on", "measured on", "pixels", "steps", "dropout")


def results_table(models: Sequence[MeasuredModel]) -> Listing:
    """Lists every setting with a result: mean and standard deviation over its seeds."""
    groups = sorted(group(model for model in models if model.is_result), key=lambda each: _order(each.first))
    names = _names_of_values(value for each in groups for model in each.models for value in model.results)
    differences = _differences(groups)
    rows, values = [], []
    for each, difference in zip(groups, differences, strict=True):
        described = _describe(each.first)
        seeds = ", ".join(str(model.seed) for model in each.models if model.seed is not None)
        means = [each.mean(name) for name in names]
        count = f" ({len(each.models)})" if len(each.models) > 1 else ""
        rows.append([*map(_text, described), seeds, *map(_show, means), f"{common_folder(each.paths)}{count}"])
        numbers = [number for mean in means for number in ((mean.mean, mean.std) if mean else (None, None))]
        values.append([*described, difference, seeds, *numbers, " ".join(each.paths)])
    rows, remarks = _shortened(rows, differences)
    remarks += _remarks_on(groups, names)
    if any("±" in cell for row in rows for cell in row):
        remarks.append(
            "± is the sample standard deviation over seeds (n - 1), or, of one run, over draws of few-shot images."
        )
    with_std = [heading for name in names for heading in (name, f"{name} ±")]
    headings = [*_DESCRIBED, "seeds", *names, "folder"]
    value_headings = [*_DESCRIBED, "differs in", "seeds", *with_std, "folders"]
    title = "Results, percent: a line for each setting"
    return Listing("results", title, headings, rows, value_headings, values, remarks)


def runs_table(models: Sequence[MeasuredModel]) -> Listing:
    """Lists every run and evaluation, including those that only choose."""
    names = _names_of_values(value for model in models for value in model.values)
    rows, values = [], []
    for model in sorted(models, key=lambda model: str(model.path)):
        described = [*_describe(model), model.seed, _use_of(model)]
        measured = [100 * model.values[name].value if name in model.values else None for name in names]
        shown = ["" if value is None else f"{value:.2f}" for value in measured]
        rows.append([*map(_text, described), *shown, str(model.path)])
        values.append([*described, *measured, str(model.path)])
    rows, remarks = _shortened(rows, [""] * len(rows))
    remarks += [
        f"{model.path}: with what {', '.join(model.besides)} measured of it" for model in models if model.besides
    ]
    headings = [*_DESCRIBED, "seed", "use", *names, "folder"]
    title = "All runs and evaluations that were found, percent"
    return Listing("runs", title, headings, rows, headings, values, remarks)


def common_folder(folders: Sequence[str]) -> str:
    """The common folder of several paths, also in buckets; "..." if there is none."""
    parts = zip(*(folder.split("/") for folder in folders), strict=False)
    shared = itertools.takewhile(lambda each: len(set(each)) == 1, parts)
    return "/".join(each[0] for each in shared) or "..."


def _differences(groups: Sequence[SeedGroup]) -> list[str]:
    """What distinguishes groups with the same description; "" for other groups."""
    described = [_describe(each.first) for each in groups]
    return [
        _difference(each, [other for other, its in zip(groups, described, strict=True) if its == own])
        for each, own in zip(groups, described, strict=True)
    ]


def _difference(one: SeedGroup, others: Sequence[SeedGroup]) -> str:
    model, models = one.first, [other.first for other in others]
    names = sorted({name for other in models for name in other.training})
    fields = {
        name: model.training.get(name)
        for name in names
        if any(other.training.get(name) != model.training.get(name) for other in models)
    }
    for other in models:
        for name in model.values.keys() & other.values.keys():
            own = model.values[name].settings
            fields |= {field: own.get(field) for field in differing(own, other.values[name].settings)}
    parts = [f"{name}={value}" for name, value in fields.items()]
    parts += _differing_images(model, models)
    if model.changes and any(other.changes != model.changes for other in models):
        parts.append("its config changed during the run")
    if model.before and len({other.before.key for other in models if other.before}) > 1:
        parts.append(f"from {common_folder([each.before.name for each in one.models if each.before])}")
    return ", ".join(parts)


def _differing_images(model: MeasuredModel, others: Sequence[MeasuredModel]) -> list[str]:
    """The images of a model, if they differ between models of the same settings."""
    sets = {"trained on": (model.train_images, [other.train_images for other in others])}
    for name, value in model.values.items():
        if name != TOP_5:
            its = [other.values[name].images for other in others if name in other.values]
            sets[f"{name} of"] = (value.images, its)
    return [
        f"{what} {'?' if images[0] is None else images[0]} images" + (f" ({images[1]})" if images[1] else "")
        for what, (images, theirs) in sets.items()
        if not all(same_images(images, each) for each in theirs)
    ]


def _shortened(rows: Sequence[Sequence[str]], differences: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Marks models of one name, and differences, in rows; returns the rows and the meaning of the marks."""
    marks: dict[str, str] = {}
    shortened = []
    for (model, *rest), difference in zip(rows, differences, strict=True):
        name, _, changes = model.partition(" (")
        for meaning in filter(None, (changes.removesuffix(")"), difference)):
            name += f" [{marks.setdefault(meaning, str(len(marks) + 1))}]"
        shortened.append([name, *rest])
    return shortened, [f"[{mark}] {meaning}" for meaning, mark in marks.items()]


def _remarks_on(groups: Sequence[SeedGroup], names: Sequence[str]) -> list[str]:
    """Notes on the numbers: the runs that lack them, and differences in how they were measured."""
    remarks = []
    for each in groups:
        folder = common_folder(each.paths)
        noted: dict[str, list[str]] = {}
        for name in names:
            lacking = [str(model.seed) for model in each.models if name not in model.results]
            if lacking and len(lacking) < len(each.models):
                remarks.append(f"{folder}: {name} is without seed {', '.join(lacking)}")
            for note in dict.fromkeys(note for model in each.having(name) for note in model.values[name].notes):
                noted.setdefault(note, []).append(name)
        remarks += [f"{folder}: {', '.join(of)}: {note}" for note, of in noted.items()]
        remarks += [
            f"{model.path}: its config changed during the run, {change}"
            for model in each.models
            for change in model.changes
        ]
    return list(dict.fromkeys(remarks))


def _use_of(model: MeasuredModel) -> str:
    flaws = {value.flaw for name, value in model.values.items() if value.flaw and not name.endswith(TOP_5)}
    changed = ["config changed during the run"] * bool(model.changes)
    return "; ".join([model.purpose.what, *changed, *sorted(flaws - {model.purpose.what})])


def _names_of_values(values: Iterable[str]) -> list[str]:
    """The names of all measured numbers: accuracy first, few-shot last by number of shots."""

    def order(name: str) -> tuple[bool, str, int, str]:
        shots, is_few_shot, rest = name.partition("-shot ")
        return (bool(is_few_shot), rest, int(shots) if is_few_shot else name != ACCURACY, name)

    return sorted({name for name in values if not name.endswith(TOP_5)}, key=order)


def _describe(model: MeasuredModel) -> list[object]:
    """Cells under `_DESCRIBED`."""
    trained_on, measured_on = model.trained_on, ""
    if trained_on and (split := model.training.get("data.train_split", "")) not in _USUAL_SPLITS:
        trained_on += f" {split}"
    if ACCURACY in model.values or REAL in model.values:
        name = data_set_name(model.dataset)
        measured_on = str(model.eval_split) if name == model.trained_on else f"{name} {model.eval_split}"
    before = "" if model.before is None else model.before.data
    return [model.model, before, trained_on, measured_on, model.image_size, model.steps, dropout_of(model)]


def _order(model: MeasuredModel) -> tuple[str, str, str, str]:
    return ("" if model.before is None else model.before.data, model.model, model.trained_on, str(model.path))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _show(mean: SeedMean | None) -> str:
    if mean is None:
        return ""
    return f"{mean.mean:.2f}" if mean.std is None else f"{mean.mean:.2f} ± {mean.std:.2f}"
