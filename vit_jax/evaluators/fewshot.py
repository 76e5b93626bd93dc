"""Few-shot linear accuracy (section 4.1 of the paper): how well a frozen representation tells classes apart.

For each seed and number of shots k, k images are drawn of each class of a pool; a linear classifier is solved for in
closed form on their features (`evaluators/ridge.py`), and scored on a test split. The defaults are those of the
released evaluator (google-research/big_vision, evaluators/fewshot_lsr.py and configs/common_fewshot.py).
"""

import concurrent.futures
import itertools
import logging
import numbers
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from vit_jax.data.overlap import check_disjoint
from vit_jax.data.pipeline import BadRecords
from vit_jax.data.sources.base import NO_LABEL, BadRecordError, Source
from vit_jax.data.sources.splits import SlicedSource
from vit_jax.data.transforms import EvalTransform
from vit_jax.errors import UserError
from vit_jax.evaluators.features import FeatureExtractor, Features
from vit_jax.evaluators.ridge import BIAS, solve_ridge
from vit_jax.train_step import TrainState

logger = logging.getLogger(__name__)

SHOTS = (1, 5, 10, 25)
L2 = 2.0**10
NUM_SEEDS = 3


def read_labels(source: Source, *, num_threads: int = 16, max_bad_records: int = 0) -> np.ndarray:
    """Labels of all examples, int64 `[examples]`, `NO_LABEL` where there is none. No image is decoded.

    Sources that know their labels without reading the examples say so by a method `labels()`, which may give None.

    Args:
      source: with one label an image.
      num_threads: that read.
      max_bad_records: examples that may be left without label because they cannot be read.

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
    """Draws examples of each class: for a seed, those of fewer shots are among those of more.

    As the released evaluator draws them, so that a pool in the same order gives the same examples: class by class, the
    first of a permutation by NumPy's generator.

    Args:
      labels: int `[examples]`.
      num_classes: classes are 0 to this, less one.
      shots: examples a class; where a class has fewer, all of them are taken.
      seed: of the generator.

    Returns:
      Indices of the examples, class by class, int64 `[at most shots * num_classes]`.
    """
    generator = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.searchsorted(labels[order], np.arange(num_classes + 1)))[1:-1]
    return np.concatenate([generator.permutation(indices)[:shots] for indices in members])


class FewShotEvaluator:
    """Few-shot accuracy of representations.

    `run` yields, for each representation and number of shots k, with the mean over the seeds and, if there are two or
    more, their standard deviation (n - 1) under the same name with `_std`:

    - `<representation>/<k>shot` for a single l2. Of several l2 values it is the one that is best on the validation
      split, told by `<representation>/<k>shot_l2`; without validation split there is no such number.
    - `<representation>/<k>shot/l2=<l2>` for each, if there are several l2 values.

    The last one is `examples`: how many test images these are measured on.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: Source,
        test: Source,
        mesh: Mesh,
        *,
        validation: Source | None = None,
        shots: Sequence[int] = SHOTS,
        l2: Sequence[float] = (L2,),
        seeds: int | Sequence[int] = NUM_SEEDS,
        representations: Sequence[str] = ("pre_logits",),
        crop_from: int | None = 256,
        image_size: int = 224,
        resize: str = "bilinear",
        exif_orientation: bool | None = None,
        whiten: bool = True,
        bias: float = BIAS,
        take_all: bool = False,
        batch_size: int = 512,
        shardings: Any = None,
        num_threads: int | None = None,
        max_bad_records: int = 0,
        before_each_batch: Callable[[], None] = lambda: None,
    ):
        """Reads the labels of the pool and draws the examples; decodes no image and compiles nothing.

        Args:
          model: images -> (logits, intermediates).
          pool: examples are drawn from it.
          test: accuracy is measured on it.
          mesh: the devices of all processes.
          validation: for choosing among several l2 values.
          shots: numbers of examples a class.
          l2: regularisations.
          seeds: of the draws, or their number: 0, 1, ...
          representations: see `FeatureExtractor`.
          crop_from: side, in pixels, of the square that images are resized to and whose centre is taken; None: they are
            resized to `image_size` and nothing is cut off.
          image_size: side of the images that the model sees, in pixels.
          resize: method of `data.transforms.resize`.
          exif_orientation: see `data.transforms.TrainTransform`.
          whiten: see `evaluators.ridge.solve_ridge`.
          bias: see there.
          take_all: take all examples of classes that have fewer than a number of shots, instead of an error.
          batch_size: images at once; see `FeatureExtractor`.
          shardings: of the parameters; None: replicated.
          num_threads: that decode; None: one for each core.
          max_bad_records: examples, of each split, that may be left out because they cannot be read.
          before_each_batch: called between batches; may raise to end an evaluation.

        Raises:
          UserError: a class has fewer examples than shots, or none; the splits have different classes, or examples in
            common; a parameter is out of its range.
        """
        self._shots = _checked_shots(shots)
        self._l2 = _checked_l2(l2)
        self._seeds = _checked_seeds(seeds)
        self._representations = tuple(representations)
        self._whiten, self._bias = whiten, bias
        for other in (test, validation):
            if other is not None:
                _check_same_classes(pool, other)
                _check_single_label(other)
        check_splits(pool, test, validation if len(self._l2) > 1 else None)
        self._test, self._validation = test, validation
        self._extract = FeatureExtractor(model, representations, mesh, image_size=image_size, shardings=shardings)
        self._transform = EvalTransform(
            image_size, resize=resize, crop_from=crop_from, exif_orientation=exif_orientation
        )
        self._how: dict[str, Any] = {
            "batch_size": batch_size,
            "num_threads": num_threads,
            "max_bad_records": max_bad_records,
            "before_each_batch": before_each_batch,
        }

        labels = read_labels(pool, max_bad_records=max_bad_records)
        if not (labels != NO_LABEL).any():
            raise UserError(f"no image of {pool.name}/{pool.split} has a label, so that none can be drawn.")
        self._num_classes = pool.num_classes or int(labels.max()) + 1
        _check_counts(pool, labels, self._num_classes, self._shots, take_all=take_all)
        draws = {(seed, k): draw_shots(labels, self._num_classes, k, seed) for seed in self._seeds for k in self._shots}
        # Each image that was drawn goes through the model once, however often it was drawn.
        drawn = np.unique(np.concatenate(list(draws.values())))
        self._drawn = SlicedSource([(pool, drawn)], f"{pool.split} ({len(drawn)} drawn)")
        self._rows = {key: np.searchsorted(drawn, indices) for key, indices in draws.items()}
        logger.info(
            "few-shot evaluation: %d of the %d images of %s/%s are used, and %d of %s/%s to test",
            *(len(drawn), len(pool), pool.name, pool.split, len(test), test.name, test.split),
        )

    def run(self, state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields names and values, accuracies in [0, 1]; see above. All processes must call it."""
        drawn, test = self._features(state, self._drawn), self._features(state, self._test)
        validation = None if self._validation is None or len(self._l2) == 1 else self._features(state, self._validation)
        for representation in self._representations:
            for k in self._shots:
                yield from self._results(representation, k, drawn, test, validation)
        yield "examples", len(test.labels)

    def _features(self, state: TrainState, source: Source) -> Features:
        features = self._extract(state.evaluated, source, self._transform, **self._how)
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
            rows = rows[drawn.labels[rows] != NO_LABEL]  # what could be read
            solution = solve_ridge(
                drawn.arrays[representation][rows],
                drawn.labels[rows],
                num_classes=self._num_classes,
                whiten=self._whiten,
                bias=self._bias,
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


def _checked_shots(shots: Any) -> tuple[int, ...]:
    given = _numbers(shots, numbers.Integral)
    if not given or min(given) < 1 or len(set(given)) != len(given):
        raise UserError(f"shots must be different whole numbers of at least 1, such as {SHOTS} or (5,); got {shots!r}.")
    return given


def _checked_l2(l2: Any) -> tuple[float, ...]:
    given = _numbers(l2, numbers.Real)
    if (
        not given
        or any(not 0 < each < float("inf") for each in given)
        or len({f"{each:g}" for each in given}) < len(given)
    ):
        raise UserError(f"l2 must be different numbers of more than 0, such as ({L2:g},); got {l2!r}.")
    return tuple(float(each) for each in given)


def _checked_seeds(seeds: Any) -> tuple[int, ...]:
    given = _numbers(range(seeds) if isinstance(seeds, int) else seeds, numbers.Integral)
    if not given or min(given) < 0 or len(set(given)) != len(given):
        raise UserError(f"seeds must be a number of at least 1, or different seeds of at least 0; got {seeds!r}.")
    return given


def _numbers(values: Any, kind: type) -> tuple[Any, ...]:
    """The values as a tuple; none if they are not all numbers of a kind."""
    given = tuple(values) if isinstance(values, Iterable) else ()
    return given if all(isinstance(each, kind) and not isinstance(each, bool) for each in given) else ()


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
    """Checks that nothing is measured, and no l2 chosen, on examples that a classifier may have seen.

    Args:
      pool: examples are drawn from it.
      test: accuracy is measured on it.
      validation: l2 is chosen on it; None: it is not chosen.

    Raises:
      UserError: two of them share examples.
    """
    advice = (
        "Each example may have one use: set fewshot.train_split, fewshot.test_split and fewshot.validation_split to "
        "disjoint parts, such as 'train[:90%]' and 'train[90%:]'."
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

    def name(label: int) -> str:
        return f"class {label}" + (f" ({pool.class_names[label]!r})" if pool.class_names else "")

    fewest, where = int(counts.min()), f"of {pool.name}/{pool.split}"
    label = int(counts.argmin())
    if not fewest:
        more = f", nor have {np.sum(counts == 0) - 1} other classes" if np.sum(counts == 0) > 1 else ""
        raise UserError(
            f"{name(label)} {where} has no example{more}, so that nothing can be learnt of it. Take a larger part of "
            "the data to draw from (fewshot.train_split)."
        )
    if fewest < max(shots) and not take_all:
        more = f", and {np.sum(counts < max(shots)) - 1} more have too few" if np.sum(counts < max(shots)) > 1 else ""
        raise UserError(
            f"{name(label)} {where} has {fewest} example{'s' * (fewest > 1)}, fewer than {max(shots)} shots{more}. "
            f"Leave out shots of more than {fewest}, or take a larger part of the data to draw from "
            "(fewshot.train_split)."
        )
