"""Lists of all that was found: a line for each setting, and a line for each run."""

import itertools
from collections.abc import Iterable, Sequence

from vit_jax.report.markdown import Listing
from vit_jax.report.measured import ACCURACY, REAL, TOP_5, same_images
from vit_jax.report.pretrained import dropout_of
from vit_jax.report.result import Record
from vit_jax.report.seeds import Ours, Result, group
from vit_jax.report.settings import differing

_USUAL_SPLITS = ("", "train")


def results_table(records: Sequence[Record]) -> Listing:
    """Every setting with a result, a line each: mean and standard deviation over its seeds."""
    results = group(record for record in records if record.is_result)
    names = _names_of_values(value for result in results for record in result.records for value in record.results)
    results = sorted(results, key=lambda result: _place_of(result.first))
    differences = _differences(results)
    rows, values = [], []
    for result, difference in zip(results, differences, strict=True):
        told = _describe(result.first)
        seeds = ", ".join(str(each.seed) for each in result.records if each.seed is not None)
        measured = [result.ours(name) for name in names]
        folder = str(result.first.path)
        if len(result.records) > 1:
            folder = f"{common_folder([str(each.path) for each in result.records])} ({len(result.records)})"
        rows.append([*map(_text, told), seeds, *map(_show, measured), folder])
        paths = " ".join(str(each.path) for each in result.records)
        numbers = [number for ours in measured for number in ((ours.mean, ours.std) if ours else (None, None))]
        values.append([*told, difference, seeds, *numbers, paths])
    rows, remarks = _shortened(rows, differences)
    remarks += _remarks_on(results, names)
    told_of_std = (
        "± is the sample standard deviation over seeds (n - 1), or, of one run, over draws of few-shot images."
    )
    remarks += [told_of_std] if any("±" in cell for row in rows for cell in row) else []
    headings = [*_DESCRIBED, "seeds", *names, "folder"]
    of_values = [
        *_DESCRIBED,
        "differs in",
        "seeds",
        *(each for name in names for each in (name, f"{name} ±")),
        "folders",
    ]
    return Listing("results", "Results, percent: a line for each setting", headings, rows, of_values, values, remarks)


def common_folder(folders: Sequence[str]) -> str:
    """The folder that several are in, "..." where they have nothing in common; of buckets, too."""
    parts = zip(*(folder.split("/") for folder in folders), strict=False)
    shared = itertools.takewhile(lambda each: len(set(each)) == 1, parts)
    return "/".join(each[0] for each in shared) or "..."


def runs_table(records: Sequence[Record]) -> Listing:
    """Everything that was found, a line each, what only chooses among it."""
    names = _names_of_values(value for record in records for value in record.values)
    rows, values = [], []
    for record in sorted(records, key=lambda record: str(record.path)):
        told = [*_describe(record), record.seed, _use_of(record)]
        measured = [record.values[name].value if name in record.values else None for name in names]
        shown = ["" if value is None else f"{100 * value:.2f}" for value in measured]
        rows.append([*map(_text, told), *shown, str(record.path)])
        values.append([*told, *(None if value is None else 100 * value for value in measured), str(record.path)])
    rows, remarks = _shortened(rows, [""] * len(rows))
    remarks += [
        f"{record.path}: with what {', '.join(record.besides)} measured of it" for record in records if record.besides
    ]
    headings = [*_DESCRIBED, "seed", "use", *names, "folder"]
    title = "All runs and evaluations that were found, percent"
    return Listing("runs", title, headings, rows, headings, values, remarks)


def _differences(results: Sequence[Result]) -> list[str]:
    """What sets apart those that `_describe` tells nothing different of; "" for the others."""
    alike: dict[str, list[Result]] = {}
    for result in results:
        alike.setdefault(str(_describe(result.first)), []).append(result)

    def difference(result: Result, others: Sequence[Result]) -> str:
        first = result.first
        trainings = [other.first.training for other in others]
        fields = {
            name: first.training.get(name)
            for name in sorted({name for training in trainings for name in training})
            if any(training.get(name) != first.training.get(name) for training in trainings)
        }
        was_changed = fields.pop("changed on the way", None) is not None
        for other in others:
            for value in first.values.keys() & other.first.values.keys():
                mine, its = first.values[value].settings, other.first.values[value].settings
                fields |= {name: dict(mine).get(name) for name in differing(mine, its)}
        told = [f"{name}={value}" for name, value in fields.items()]
        told += _differing_images(first, [other.first for other in others])
        told += ["its config was changed on the way"] if was_changed else []
        if first.before and len({other.first.before.key for other in others if other.first.before}) > 1:
            told.append(f"from {common_folder([each.before.name for each in result.records if each.before])}")
        return ", ".join(told)

    return [difference(result, alike[str(_describe(result.first))]) for result in results]


def _differing_images(record: Record, others: Sequence[Record]) -> list[str]:
    """Of how many or which images a record is, where others of the same settings are of others."""
    sets = [("trained on", record.train_images, [other.train_images for other in others])]
    sets += [
        (f"{name} of", value.images, [other.values[name].images for other in others if name in other.values])
        for name, value in record.values.items()
        if name != TOP_5
    ]
    return [
        f"{what} {number if number is not None else '?'} images" + (f" ({fingerprint})" if fingerprint else "")
        for what, (number, fingerprint), theirs in sets
        if not all(same_images((number, fingerprint), each) for each in theirs)
    ]


def _shortened(rows: Sequence[Sequence[str]], differences: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Rows with marks for what sets models of one name apart, and for differences; what the marks mean."""
    marks: dict[str, str] = {}
    shortened = []
    for (model, *rest), difference in zip(rows, differences, strict=True):
        name, _, changes = model.partition(" (")
        for meaning in filter(None, (changes.removesuffix(")"), difference)):
            name += f" [{marks.setdefault(meaning, str(len(marks) + 1))}]"
        shortened.append([name, *rest])
    return shortened, [f"[{mark}] {meaning}" for meaning, mark in marks.items()]


def _remarks_on(results: Sequence[Result], names: Sequence[str]) -> list[str]:
    """What a reader of the numbers must know: of which runs they are not, and what is not right with them."""
    remarks = []
    for result in results:
        folder = common_folder([str(record.path) for record in result.records])
        for name in names:
            lacking = [str(record.seed) for record in result.records if name not in record.results]
            if lacking and len(lacking) < len(result.records):
                remarks.append(f"{folder}: {name} is without seed {', '.join(lacking)}")
        noted: dict[str, list[str]] = {}
        for name in names:
            for note in dict.fromkeys(note for record in result.having(name) for note in record.values[name].notes):
                noted.setdefault(note, []).append(name)
        remarks += [f"{folder}: {', '.join(of)}: {note}" for note, of in noted.items()]
        remarks += [
            f"{record.path}: its config was changed on the way, {change}"
            for record in result.records
            for change in record.changes
        ]
    return list(dict.fromkeys(remarks))


def _use_of(record: Record) -> str:
    flaws = {value.flaw for name, value in record.values.items() if value.flaw and not name.endswith(TOP_5)} - {
        record.use
    }
    changed = ["config changed on the way"] if record.changes else []
    return "; ".join([record.use, *changed, *sorted(flaws)])


def _names_of_values(values: Iterable[str]) -> list[str]:
    """The names of all that was measured: accuracy first, few-shot last by number of shots."""
    names = {name for name in values if not name.endswith(TOP_5)}

    def order(name: str) -> tuple[bool, str, int, str]:
        shots, is_few_shot, rest = name.partition("-shot ")
        return (bool(is_few_shot), rest, int(shots) if is_few_shot else name != ACCURACY, name)

    return sorted(names, key=order)


_DESCRIBED = ("model", "pre-trained on", "trained on", "measured on", "pixels", "steps", "dropout")


def _describe(record: Record) -> list[object]:
    """Cells that say what a record is of, as `_DESCRIBED` names them."""
    trained_on = record.trained_on
    if trained_on and record.train_split not in _USUAL_SPLITS:
        trained_on += f" {record.train_split}"
    measured_on = ""
    if ACCURACY in record.values or REAL in record.values:
        name, split = record.evaluated_on
        measured_on = str(split) if name == record.trained_on else f"{name} {split}"
    before = "" if record.before is None else record.before.data
    return [record.model, before, trained_on, measured_on, record.image_size, record.steps, dropout_of(record)]


def _place_of(record: Record) -> tuple[str, str, str, str]:
    before = "" if record.before is None else record.before.data
    return (before, record.model, record.trained_on, str(record.path))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _show(ours: Ours | None) -> str:
    if ours is None:
        return ""
    return f"{ours.mean:.2f}" if ours.std is None else f"{ours.mean:.2f} ± {ours.std:.2f}"
