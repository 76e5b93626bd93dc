"""Checks that a sweep uses different examples for training, choosing and reporting."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from ml_collections import ConfigDict

from vit_jax.data.overlap import check_disjoint, count_shared
from vit_jax.data.sources import MissingDataError, Source
from vit_jax.data.sources.splits import resolve
from vit_jax.errors import UserError
from vit_jax.experiment.data import open_data, open_eval_source, training_data_sets
from vit_jax.experiment.evaluations import open_evaluations, tested_sources
from vit_jax.experiment.objective import needs_labels

logger = logging.getLogger(__name__)

TRAINED_ON = "what is trained on"
WEIGHTS = "what the weights were trained on"
CHOSEN_BY = "what the values are chosen by"
REPORTED = "what the final runs are evaluated on"
STOPPED_BY = "what early stopping uses"

_ADVICE = (
    "Choose on a held-out part of the training data, and report on the test split, for example with "
    "--config.data.train_split='train[:90%]' --config.data.eval_split='train[90%:]' "
    "--final=data.train_split=train,data.eval_split=test; or only choose, with --seeds=0."
)
_DATA = ("dataset", "train_split", "eval_split", "eval_labels", "mixture", "image_key", "label_key", "max_labels")
_SUPPOSED_LENGTHS = (10**6, 10**9)  # of a split that is missing


@dataclasses.dataclass(frozen=True)
class UsedExamples:
    """Examples that a run uses, by their names in the config; `source` is None if the data set is missing."""

    dataset: str
    split: str
    source: Source | None


def compare_examples(
    trials: Sequence[tuple[ConfigDict, str]],
    finals: Sequence[tuple[ConfigDict, str]],
    sources_behind: Callable[[str | None], Sequence[Source]],
    stopped_by: Sequence[tuple[ConfigDict, str]] = (),
) -> tuple[str, ...]:
    """Compares the examples that a task's runs use for training, choosing and reporting. Returns notes on the numbers.

    Args:
      trials: config and metric of each candidate's run.
      finals: the same for one final run of each candidate.
      sources_behind: `experiment.leakage.sources_behind`.
      stopped_by: config and metric that picks the step that counts, of each run with early stopping.

    Raises:
      UserError: two uses share examples, or candidates are compared on different examples.
    """
    chosen_by: list[UsedExamples] = []
    stop = [_measured(runs[0][0], runs[0][1]) for runs in _by_examples(stopped_by)]
    for runs in _by_examples(trials):
        config, metric = runs[0]
        if measured := _measured(config, metric):
            chosen_by.append(measured)
            for trained_on in _trained_on(config):
                _check(measured, CHOSEN_BY, trained_on, TRAINED_ON)
    notes: list[str] = []
    for runs in _by_examples(finals):
        config, metric = runs[0]
        if not (measured := _measured(config, metric)):
            continue
        for trained_on in _trained_on(config):
            _check(measured, REPORTED, trained_on, TRAINED_ON)
        for weights in dict.fromkeys(config.weights for config, _ in runs):
            for source in sources_behind(weights):
                _check(measured, REPORTED, UsedExamples(source.name, source.split, source), WEIGHTS)
        for examples in chosen_by if len(finals) > 1 else ():
            _check(measured, REPORTED, examples, CHOSEN_BY)
        notes += _early_stopping(measured, metric, filter(None, stop))
        notes += _part_of_split(config, measured)
    for examples in chosen_by[1:]:
        if not _is_same(chosen_by[0], examples):
            raise UserError(
                f"the values would be compared on different examples, {chosen_by[0].split!r} of {chosen_by[0].dataset} "
                f"and {examples.split!r} of {examples.dataset}. Evaluate all on the same, or make a sweep of each."
            )
    return tuple(dict.fromkeys(notes))


def _early_stopping(measured: UsedExamples, metric: str, stop: Iterable[UsedExamples]) -> Iterator[str]:
    """A note if the examples that pick the step of a run are also measured; `UserError` if only some of them are."""
    for examples in stop:
        if (examples.dataset, examples.split) == (measured.dataset, measured.split):
            yield f"{metric} is measured on the examples that pick the step of each run, so it is too high."
        else:
            _check(measured, REPORTED, examples, STOPPED_BY)


def _by_examples(runs: Sequence[tuple[ConfigDict, str]]) -> Collection[list[tuple[ConfigDict, str]]]:
    """Groups runs that train and evaluate on the same examples, whose data are then opened once."""
    groups: dict[str, list[tuple[ConfigDict, str]]] = {}
    for config, metric in runs:
        fields = [metric, config.evals.to_dict(), *(config.data[name] for name in _DATA)]
        groups.setdefault(json.dumps(fields, default=str), []).append((config, metric))
    return groups.values()


def _trained_on(config: ConfigDict) -> list[UsedExamples]:
    """The training data of a run; each part of a mixture separately."""
    data, split, labelled = config.data, config.data.train_split, needs_labels(config.objective)
    datasets = [dataset for dataset, _ in training_data_sets(data)]
    return [_open(each, split, functools.partial(open_data, data, each, split, labelled=labelled)) for each in datasets]


def _measured(config: ConfigDict, metric: str) -> UsedExamples | None:
    """The examples of a metric, by its full name in `metrics.jsonl`; None for a training metric."""
    data, labelled = config.data, needs_labels(config.objective)
    if data.eval_split is not None and metric.startswith(f"{data.eval_split}/"):
        return _open(data.dataset, data.eval_split, lambda: open_eval_source(data, labelled=labelled))
    tested = tested_sources(open_evaluations(config, None, _leave_out))
    found = next((source for name, source in tested.items() if metric.startswith(f"{name}/")), None)
    return UsedExamples(found.name, found.split, found) if found else None


def _leave_out(evaluation: str, _: MissingDataError) -> None:
    warn_missing("its data set", evaluation)


@functools.cache
def warn_missing(dataset: str, split: str) -> None:
    """Warns of a missing data set, once for many tasks."""
    logger.warning(
        "%s is missing, so %s of it can be compared with other splits by name only. Each run compares its training "
        "data with what it evaluates, and says so.",
        *(dataset, split),
    )


def _open(dataset: str, split: str, open_it: Callable[[], Source]) -> UsedExamples:
    try:
        return UsedExamples(dataset, split, open_it())
    except MissingDataError:
        warn_missing(dataset, split)
        return UsedExamples(dataset, split, None)


def _check(tested: UsedExamples, its_role: str, other: UsedExamples, other_role: str) -> None:
    """Raises `UserError` if two sets of examples share examples."""
    if tested.source is not None and other.source is not None:
        check_disjoint(tested.source, its_role, other.source, other_role, _ADVICE)
    elif tested.dataset == other.dataset and _surely_share(tested.split, other.split):
        raise UserError(
            f"{tested.split!r} of {tested.dataset}, {its_role}, shares examples with {other.split!r}, {other_role}. "
            f"{_ADVICE}"
        )


def _is_same(one: UsedExamples, other: UsedExamples) -> bool:
    """Whether two sets of examples are the same, or may be if they are missing."""
    if one.source is None or other.source is None:
        return True
    return len(one.source) == len(other.source) == count_shared(one.source, other.source)


def _surely_share(one: str, other: str) -> bool:
    """Whether two splits of a data set share examples for any lengths of its splits."""
    names = sorted({term.split("[")[0].strip() for split in (one, other) for term in split.split("+")})

    def share(length: int) -> bool:
        try:
            first, second = (resolve(split, names, lambda _: [length], data_set="") for split in (one, other))
        except UserError:  # such as slices by files
            return one == other
        return any(
            each.split == its.split and max(each.start, its.start) < min(each.stop, its.stop)
            for each in first
            for its in second
        )

    return all(map(share, _SUPPOSED_LENGTHS))


def _part_of_split(config: ConfigDict, examples: UsedExamples) -> list[str]:
    """A note if numbers are measured on a part of a split."""
    source = examples.source
    if source is None or "[" not in examples.split:
        return []
    names = dict.fromkeys(term.split("[")[0].strip() for term in examples.split.split("+"))
    try:
        labelled = needs_labels(config.objective)
        whole = sum(len(open_data(config.data, examples.dataset, name, labelled=labelled)) for name in names)
    except UserError:
        return []
    if len(source) == whole:
        return []
    return [
        f"{examples.split} has {len(source):,} of the {whole:,} examples of {' and '.join(names)}; numbers of the "
        "whole split cannot be compared with it."
    ]
