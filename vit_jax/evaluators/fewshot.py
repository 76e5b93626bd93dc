"""Few-shot linear accuracy (section 4.1 of the paper): how well a frozen representation tells classes apart.

For each seed and number of shots k, draws k images of each class from a pool, solves a linear classifier on their
features in closed form (`evaluators/ridge.py`), and scores it on a test split. The defaults are those of the released
evaluator (google-research/big_vision, evaluators/fewshot_lsr.py and configs/common_fewshot.py).
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import statistics
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
from ml_collections import ConfigDict

from vit_jax.data.overlap import check_disjoint
from vit_jax.data.pipeline import BadRecords
from vit_jax.data.sources import open_source
from vit_jax.data.sources.base import NO_LABEL, BadRecordError, Source
from vit_jax.data.sources.splits import SlicedSource
from vit_jax.data.transforms import EvalTransform
from vit_jax.errors import UserError, unknown_name
from vit_jax.evaluators.evaluator_type import EvalData, EvaluatorType, Openable, RunData, Setup
from vit_jax.evaluators.features import FeatureExtractor, Features, representation_shapes
from vit_jax.evaluators.registry import TYPES, short_name
from vit_jax.evaluators.ridge import solve_ridge
from vit_jax.field_checks import COUNT, Several
from vit_jax.train_step import TrainState

logger = logging.getLogger(__name__)


def read_labels(source: Source, *, num_threads: int = 16, max_bad_records: int = 0) -> np.ndarray:
    """Reads the labels of all examples, int64 `[examples]`, `NO_LABEL` for those without. Decodes no image.

    Sources that know their labels without reading the examples have a method `labels()`, which may return None. Up to
    `max_bad_records` unreadable examples count as unlabelled.

    Raises:
      UserError: images have several labels, or more examples cannot be read.
    """
    _check_single_label(source)
    if hasattr(source, "labels") and (known := source.labels()) is not None:
        return known
    bad: dict[int, str] = {}

    def read(index: int) -> int:
        try:
            label = source[index]["label"]
        except BadRecordError as error:
            bad[index] = str(error).rstrip(".")
            return NO_LABEL
        given = [label] if isinstance(label, int | np.integer) else list(label)
        return int(given[0]) if given else NO_LABEL

    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        labels = np.fromiter(pool.map(read, range(len(source)), chunksize=64), np.int64, len(source))
    BadRecords(max_bad_records).add(bad)
    return labels


def draw_shots(labels: np.ndarray, num_classes: int, shots: int, seed: int) -> np.ndarray:
    """Draws examples of each class. With the same seed, fewer shots are a subset of more.

    Draws as the released evaluator does, so a pool in the same order gives the same examples: class by class, the
    first of a permutation by NumPy's generator.

    Args:
      labels: int `[examples]`, classes 0 to `num_classes - 1`.
      num_classes: number of classes.
      shots: examples per class; a class with fewer gives all of them.
      seed: seed of the generator.

    Returns:
      Indices of the examples, class by class, int64 `[at most shots * num_classes]`.
    """
    generator = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.searchsorted(labels[order], np.arange(num_classes + 1)))[1:-1]
    return np.concatenate([generator.permutation(indices)[:shots] for indices in members])


class FewShot(EvaluatorType):
    """Few-shot accuracy of representations, on data sets of any classes.

    `run` yields the mean over the seeds for each representation and number of shots k, and with two or more seeds
    their standard deviation (n - 1) under the same name with `_std`:

    - `<representation>/<k>shot`: the accuracy with the only l2 value, or with the best of several on the validation
      split, which is then `<representation>/<k>shot_l2`. Omitted with several values and no validation split.
    - `<representation>/<k>shot/l2=<l2>`: with several l2 values, the accuracy of each.

    The last one is `examples`, the number of test images.
    """

    def __init__(self, entry: ConfigDict, data: EvalData, setup: Setup, *, take_all: bool = False):
        """Reads the labels of the pool and draws the examples; decodes no image and compiles nothing.

        Args:
          entry: fields of the type "fewshot" (`evaluators.registry`); `seeds` may also be a tuple of seeds.
          data: the pool, the test split, and the validation split if there is one.
          setup: the parts that all evaluators share. Its transform, at the entry's sizes, prepares the images.
          take_all: use all examples of a class that has fewer than the shots, instead of raising an error.

        Raises:
          UserError: a class has fewer examples than shots, or none; the splits have different classes, or share
            examples; a field is out of range.
        """
        pool, test = cast(Source, data.pool), cast(Source, data.test)
        seeds = tuple(range(entry.seeds)) if isinstance(entry.seeds, int) else entry.seeds
        fields = TYPES["fewshot"].fields
        checks = {"shots": fields["shots"].check, "l2": fields["l2"].check, "seeds": Several(COUNT, 1, distinct=True)}
        for name, values in (("shots", entry.shots), ("l2", entry.l2), ("seeds", seeds)):
            if not checks[name].accepts(values) or len({f"{each:g}" for each in values}) < len(values):
                raise UserError(f"{name} must be {checks[name].expected}, got {values!r}.")
        self._entry, self._seeds, self._l2 = entry, seeds, tuple(map(float, entry.l2))
        self._test, self._validation = test, data.validation if len(self._l2) > 1 else None
        for other in (test, data.validation):
            if other is not None:
                _check_same_classes(pool, other)
                _check_single_label(other)
        check_splits(pool, test, self._validation)
        setup = dataclasses.replace(setup, transform=_transform(entry, setup))
        self._extract = FeatureExtractor(setup, entry.representations)

        labels = read_labels(pool, max_bad_records=setup.max_bad_records)
        if not (labels != NO_LABEL).any():
            raise UserError(f"no image of {pool.name}/{pool.split} has a label, so none can be drawn.")
        self._num_classes = pool.num_classes or int(labels.max()) + 1
        _check_counts(pool, labels, self._num_classes, entry.shots, take_all=take_all)
        draws = {(seed, k): draw_shots(labels, self._num_classes, k, seed) for seed in seeds for k in entry.shots}
        # Each image that was drawn goes through the model once, however often it was drawn.
        drawn = np.unique(np.concatenate(list(draws.values())))
        self._drawn = SlicedSource([(pool, drawn)], f"{pool.split} ({len(drawn)} drawn)")
        self._rows = {key: np.searchsorted(drawn, indices) for key, indices in draws.items()}
        logger.info(
            "few-shot evaluation: %d of the %d images of %s/%s are used, and %d of %s/%s to test",
            *(len(drawn), len(pool), pool.name, pool.split, len(test), test.name, test.split),
        )

    @staticmethod
    def open(name: str, entry: ConfigDict, data: RunData) -> Openable:
        """Each data set, by the last part of its name."""
        for dataset in entry.datasets:
            yield f"{name}/{short_name(dataset)}", functools.partial(_open_splits, entry, dataset)

    @staticmethod
    def check(name: str, entry: ConfigDict, setup: Setup) -> None:
        """Checks that the model has the representations and that the crop fits the images."""
        if entry.datasets:
            known = representation_shapes(setup.model, _transform(entry, setup).image_size)
            for each in entry.representations:
                if each not in known:
                    raise unknown_name(f"representation in evals.{name}.representations:", each, known)

    @staticmethod
    def describe(entry: ConfigDict, data: EvalData) -> str:
        """See `EvaluatorType`."""
        shots, l2 = (", ".join(f"{each:g}" for each in values) for values in (entry.shots, entry.l2))
        return (
            f"linear classifiers on {', '.join(entry.representations)}, shots {shots}, l2 {l2}, {entry.seeds} draw(s)"
        )

    def run(self, state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields names and values, accuracies in [0, 1]; see above. All processes must call it."""
        drawn, test = self._features(state, self._drawn), self._features(state, self._test)
        validation = None if self._validation is None else self._features(state, self._validation)
        for representation in self._entry.representations:
            for k in self._entry.shots:
                yield from self._results(representation, k, drawn, test, validation)
        yield "examples", len(test.labels)

    def _features(self, state: TrainState, source: Source) -> Features:
        features = self._extract(state.evaluated, source)
        labelled = features.labels != NO_LABEL
        if not labelled.any():
            raise UserError(f"none of the images of {source.name}/{source.split} has a label.")
        if source is self._drawn or labelled.all():
            return features  # rows of what was drawn are counted
        return Features({name: array[labelled] for name, array in features.arrays.items()}, features.labels[labelled])

    def _results(
        self, representation: str, k: int, drawn: Features, test: Features, validation: Features | None
    ) -> Iterator[tuple[str, float]]:
        name = f"{representation}/{k}shot"
        accuracies: dict[str, list[np.ndarray]] = {"test": [], "validation": []}
        for seed in self._seeds:
            rows = self._rows[seed, k]
            rows = rows[drawn.labels[rows] != NO_LABEL]  # images that could be read
            solution = solve_ridge(
                drawn.arrays[representation][rows],
                drawn.labels[rows],
                num_classes=self._num_classes,
                whiten=self._entry.whiten,
                bias=self._entry.bias,
            )
            for split, features in (("test", test), ("validation", validation)):
                if features is not None:
                    found = solution.accuracies(features.arrays[representation], features.labels, self._l2)
                    accuracies[split].append(found)
        by_l2 = np.array(accuracies["test"]).T.tolist()  # [l2][seeds]
        if len(self._l2) == 1:
            yield from _mean_and_std(name, by_l2[0])
            return
        if validation is not None:
            best = int(np.mean(accuracies["validation"], axis=0).argmax())
            yield from _mean_and_std(name, by_l2[best])
            yield f"{name}_l2", self._l2[best]
        for l2, of_seeds in zip(self._l2, by_l2, strict=True):
            yield from _mean_and_std(f"{name}/l2={l2:g}", of_seeds)


def _mean_and_std(name: str, of_seeds: Sequence[float]) -> Iterator[tuple[str, float]]:
    yield name, statistics.fmean(of_seeds)
    if len(of_seeds) > 1:
        yield f"{name}_std", statistics.stdev(of_seeds)


def _check_same_classes(pool: Source, other: Source) -> None:
    named = pool.class_names is not None and other.class_names is not None
    if pool.num_classes != other.num_classes or (
        named and list(pool.class_names or ()) != list(other.class_names or ())
    ):
        raise UserError(
            f"{pool.name}/{pool.split} and {other.name}/{other.split} have different classes ({pool.num_classes} and "
            f"{other.num_classes}), so labels would not mean the same."
        )


def check_splits(pool: Source, test: Source, validation: Source | None = None) -> None:
    """Checks that no classifier is tested, and no l2 chosen, on examples that it was solved on.

    Raises:
      UserError: two of the splits share examples.
    """
    advice = (
        "Each example may have one use: set train_split, test_split and validation_split to disjoint parts, such as "
        "'train[:90%]' and 'train[90%:]'."
    )
    roles = [(pool, "to draw from"), (validation, "to choose l2 on"), (test, "to test on")]
    used = [(source, role) for source, role in roles if source is not None]
    for (source, role), (other, other_role) in itertools.combinations(reversed(used), 2):
        check_disjoint(source, role, other, other_role, advice)


def _check_single_label(source: Source) -> None:
    if source.max_labels > 1:
        raise UserError(
            f"images of {source.name}/{source.split} may have up to {source.max_labels} labels, but the few-shot "
            "evaluation is for data with one label an image."
        )


def _check_counts(pool: Source, labels: np.ndarray, num_classes: int, shots: Sequence[int], *, take_all: bool) -> None:
    if labels.max() >= num_classes:
        raise UserError(
            f"{pool.name}/{pool.split} has label {labels.max()}, but there are {num_classes} classes: labels are 0 to "
            f"{num_classes - 1}."
        )
    counts = np.bincount(labels[labels != NO_LABEL], minlength=num_classes)
    fewest, label = int(counts.min()), int(counts.argmin())
    name = f"class {label}" + (f" ({pool.class_names[label]!r})" if pool.class_names else "")
    which = f"{name} of {pool.name}/{pool.split}"
    if not fewest:
        others = np.sum(counts == 0) - 1
        raise UserError(
            f"{which} has no example{f', nor have {others} other classes' if others else ''}. Draw from a larger part "
            "of the data (train_split)."
        )
    if fewest < max(shots) and not take_all:
        others = np.sum(counts < max(shots)) - 1
        raise UserError(
            f"{which} has {fewest} example{'s' * (fewest > 1)}, fewer than {max(shots)} shots"
            f"{f', and {others} more have too few' if others else ''}. Leave out shots of more than {fewest}, or draw "
            "from a larger part of the data (train_split)."
        )


def _open_splits(entry: ConfigDict, dataset: str) -> EvalData:
    pool = open_source(dataset, entry.train_split)
    test = open_source(dataset, entry.test_split, class_names=pool.class_names)
    validation = None
    if entry.validation_split:
        validation = open_source(dataset, entry.validation_split, class_names=pool.class_names)
    check_splits(pool, test, validation if len(entry.l2) > 1 else None)
    return EvalData(test, pool=pool, validation=validation)


def _transform(entry: ConfigDict, setup: Setup) -> EvalTransform:
    size = entry.image_size or setup.transform.image_size
    return EvalTransform(
        size,
        crop_from=entry.crop_from or round(size * 256 / 224),
        resize=setup.transform.resize,
        exif_orientation=setup.transform.exif_orientation,
    )
