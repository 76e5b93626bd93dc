"""Finds evaluation examples that this run, or the runs behind its weights, trained on."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config import base_config
from vit_jax.data.overlap import Places, shown
from vit_jax.data.sources import MissingDataError, Source
from vit_jax.errors import UserError
from vit_jax.experiment.build import Experiment
from vit_jax.experiment.data import open_data, training_data_sets
from vit_jax.experiment.evaluations import Evaluation, tested_sources
from vit_jax.experiment.objective import needs_labels
from vit_jax.files import AnyPath, parse_path
from vit_jax.json_files import read_object
from vit_jax.multihost import processes
from vit_jax.run.facts import read_facts

logger = logging.getLogger(__name__)

_PARENTS = 3  # how far above a file of weights to look for its run, as in <run>/best/100


def find_overlap(
    tested: Mapping[str, Source], weights: str | None, train_source: Source | None = None
) -> dict[str, int]:
    """Counts the examples of evaluations that were trained on, and warns of them. Reads no image.

    Args:
      tested: the examples of each evaluation, by its name; see `evaluations.tested_sources`.
      weights: see `config.weights`; the runs behind them count.
      train_source: the training examples of the run itself, if there is one.

    Returns:
      The number of such examples by evaluation, if there are any; {} in all processes but the main one. `summary.json`
      and `evaluation.json` record it as "overlap".
    """
    if not processes.is_main_process():
        return {}
    own = [] if train_source is None else [train_source]
    places = Places(*own, *sources_behind(weights))
    overlap = {name: count for name, source in tested.items() if (count := places.count(source))}
    for name, count in overlap.items():
        logger.warning(
            "%s, which %s is measured on, shares %s of its %s examples with the training data. Its accuracy shows "
            "how well the model fits them, and is not a result.",
            *(shown(tested[name]), name, f"{count:,}", f"{len(tested[name]):,}"),
        )
    return overlap


def find_overlap_of_run(experiment: Experiment, evaluations: Iterable[Evaluation]) -> dict[str, int]:
    """Counts the examples of a run's evaluations that it, or the runs behind its weights, trained on."""
    return find_overlap(tested_sources(evaluations), experiment.config.weights, experiment.train_source)


def sources_behind(weights: str | None) -> list[Source]:
    """The training data of the run that made the weights, of the run that made its initial weights, and so on.

    Warns of data that cannot be opened, and leaves them out. Warns of data that have changed since, and uses the
    current ones. Returns [] if no run of the weights (see `config.weights`) is known.
    """
    sources: list[Source] = []
    for path, data, labelled, fingerprint in _runs_behind(weights):
        found, missing = [], []
        try:
            for dataset, _ in training_data_sets(data):
                try:
                    found.append(open_data(data, dataset, data.train_split, labelled=labelled))
                except MissingDataError:
                    missing.append(dataset)
        except (UserError, TypeError, ValueError, AttributeError) as error:  # of an edited config.json
            found, missing = [], [str(error).partition("\n")[0]]
        sources += found
        if missing:
            logger.warning(
                "The training data of %s are missing, so they cannot be compared with the evaluation data: %s",
                *(path, ", ".join(missing)),
            )
        elif fingerprint and [source.fingerprint() for source in found] != [fingerprint]:
            logger.warning(
                "The training data of %s have changed since. The evaluation may include some of them unnoticed.",
                path,
            )
    return sources


def _runs_behind(weights: str | None) -> Iterator[tuple[AnyPath, ConfigDict, bool, str | None]]:
    """Yields workdir, `config.data`, whether labels mattered, and fingerprint of the training data of each run.

    The fingerprint is None for a mixture, or if it was not recorded.
    """
    seen = set()
    while isinstance(weights, str) and (path := _find_run(weights)) is not None and path not in seen:
        seen.add(path)
        try:
            recorded = read_object(path / "config.json")
            data: dict[str, Any] = base_config().data.to_dict() | recorded.get("data", {})
            facts = None if data["mixture"] else read_facts(path)
            if facts:
                data["dataset"] = facts.train.find()  # from any working folder
        except (UserError, TypeError) as error:
            logger.warning("The training data of %s are unknown: %s", path, error)
            return
        labelled = needs_labels(recorded.get("objective", "classification"))
        yield path, ConfigDict(data), labelled, facts.train.fingerprint if facts else None
        weights = recorded.get("weights")


def _find_run(weights: str) -> AnyPath | None:
    """The workdir of the run that made the weights: the path itself, or a folder not far above it."""
    try:
        path = parse_path(weights)
        if not path.exists():  # such as the name of a released checkpoint
            return None
        for folder in (path, *list(path.parents)[:_PARENTS]):
            if (folder / "starts.jsonl").is_file() and (folder / "config.json").is_file():
                return folder
    except (UserError, OSError, ValueError):  # not a path
        pass
    return None
