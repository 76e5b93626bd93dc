r"""Linear classifiers in closed form: regularised least squares to targets in {-1, 1}^K (section 4.1 of the paper).

With a row of features a training example in X `[n, D]`, and in Y `[n, K]` a 1 for the class of the example and -1 for
the others,

    W(l2) = (X^T X + l2 I)^-1 X^T Y = X^T (X X^T + l2 I)^-1 Y,    scores(x) = x^T W,    prediction = argmax scores.

By default features are first whitened (each less its mean over the training examples, over its standard deviation
+ 1e-5) and a constant feature of 100 is appended, so that the intercept is hardly regularised. So does the released
evaluator (google-research/big_vision, evaluators/fewshot_lsr.py).

    solution = solve_ridge(train_features, train_labels, num_classes=10)
    solution.accuracies(test_features, test_labels, [2.0**l2 for l2 in range(1, 11)])

One eigendecomposition, of the smaller of the two Gram matrices, serves all l2 values, and `accuracies` scores all of
them with few matrix products (`_Ladder` says how). What is returned is what float64 gives.
"""

import concurrent.futures
import dataclasses
from collections.abc import Sequence

import numpy as np
import threadpoolctl

from vit_jax.console import num_cpus
from vit_jax.errors import UserError

BIAS = 100.0  # as is EPSILON, of the released evaluator
EPSILON = 1e-5

_BLOCK = 512  # test examples that a thread takes at once: their scores stay near its core
_PROBE = 256  # test examples that decide which products are worth it
_FEW = 0.02  # share of examples that need no further product in float32
_WORTH = 0.1  # share of examples that must be decided for a look at the scores to pay
_UNIT = 2.0**-24  # rounding unit of float32


@dataclasses.dataclass(frozen=True)
class RidgeSolution:
    """The minimisers for all l2 values at once: W(l2) = left diag(1 / (eigenvalues + l2)) right.

    An example with features x is seen as (x - mean) * scale. With whitening the intercept stands apart, as it has no
    part in the other weights: whitened features sum to 0. Without, the constant feature is the last row of `left`.

    Attributes:
      mean: of the training features, float64 `[dim]`.
      scale: 1 / (standard deviation + 1e-5), 0 for a constant feature; ones without whitening; float64 `[dim]`.
      eigenvalues: of the Gram matrix, not negative, float64 `[rank]`; `rank` is the less of its two sizes.
      left: float64 `[dim, rank]`, `[dim + 1, rank]` with a constant feature but no whitening.
      right: float64 `[rank, num_classes]`.
      left_norms: squared lengths of the columns of `left`, which are orthogonal, float64 `[rank]`.
      counts: training examples of each class, int64 `[num_classes]`.
      whiten: whether features are whitened.
      bias: value of the constant feature; 0 stands for none.
    """

    mean: np.ndarray
    scale: np.ndarray
    eigenvalues: np.ndarray
    left: np.ndarray
    right: np.ndarray
    left_norms: np.ndarray
    counts: np.ndarray
    whiten: bool
    bias: float

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.counts)

    def weights(self, l2: float) -> tuple[np.ndarray, np.ndarray]:
        """The linear layer: scores are `features @ kernel + intercept`.

        Args:
          l2: the regularisation, more than 0.

        Returns:
          kernel `[dim, num_classes]` and intercept `[num_classes]`, float64.

        Raises:
          UserError: l2 is not more than 0.
        """
        kernel, intercept = self._centred_weights(_checked_l2([l2])[0])
        kernel = kernel * self.scale[:, None]
        return kernel, intercept - self.mean @ kernel

    def scores(self, features: np.ndarray, l2: float) -> np.ndarray:
        """Scores of examples, float64 `[examples, num_classes]`; the prediction is the class of the highest.

        Args:
          features: `[examples, dim]`.
          l2: the regularisation, more than 0.

        Raises:
          UserError: l2 is not more than 0, or the features are not those of the training examples.
        """
        l2 = _checked_l2([l2])[0]
        features = _checked_features(features, len(self.mean))
        kernel, intercept = self._centred_weights(l2)
        return self.centred(features) @ kernel + intercept

    def accuracies(self, features: np.ndarray, labels: np.ndarray, l2: Sequence[float] | np.ndarray) -> np.ndarray:
        """Shares of examples whose class has the highest score; of equal scores the first class counts.

        Args:
          features: `[examples, dim]`, best float32. Only blocks of them are copied.
          labels: classes, int `[examples]`.
          l2: the regularisations, each more than 0.

        Returns:
          A share for each l2 value, float64 `[len(l2)]`.

        Raises:
          UserError: an l2 is not more than 0, a label is no class, or the features are not those of the training
            examples.
        """
        l2 = _checked_l2(l2)
        features = _checked_features(features, len(self.mean))
        labels = _checked_labels(labels, len(features), self.num_classes)
        return _Ladder(self, l2).count_first(features, labels) / len(features)

    def centred(self, features: np.ndarray) -> np.ndarray:
        """The features less the mean, and scaled if they are whitened, float64 `[examples, dim]`."""
        return (features.astype(np.float64) - self.mean) * self.scale

    def intercepts(self, l2: np.ndarray) -> np.ndarray:
        """Scores of an example whose features are the mean, float64 `[len(l2), num_classes]`."""
        if self.whiten:
            examples = self.counts.sum()
            # The normal equation of the constant feature, which is orthogonal to all others.
            return self.bias**2 * (2 * self.counts - examples) / (self.bias**2 * examples + l2[:, None])
        anchor = np.append(self.mean, self.bias) if self.bias else self.mean
        return (anchor @ self.left / (self.eigenvalues + l2[:, None])) @ self.right

    def _centred_weights(self, l2: float) -> tuple[np.ndarray, np.ndarray]:
        scaled = self.right / (self.eigenvalues + l2)[:, None]
        return self.left[: len(self.mean)] @ scaled, self.intercepts(np.array([l2]))[0]


def solve_ridge(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int | None = None,
    whiten: bool = True,
    bias: float = BIAS,
) -> RidgeSolution:
    """Factorises the normal equations of regularised least squares to targets in {-1, 1}.

    In float64, whatever the features are. Any features will do: constant ones, equal ones, fewer examples than
    features or than classes.

    Args:
      features: of the training examples, `[examples, dim]`.
      labels: their classes, int `[examples]`.
      num_classes: number of classes, also of those without example; None: the highest label and one.
      whiten: whether each feature is made to have mean 0 and standard deviation 1 over the training examples; one that
        is constant there becomes 0 in all examples.
      bias: value of the constant feature that is appended; 0: none is.

    Raises:
      UserError: arrays of the wrong shape, no examples, a label that is no class, or a feature that is not finite.
    """
    features = _checked_features(features)
    if num_classes is None:
        num_classes = int(np.max(labels, initial=-1)) + 1
    labels = _checked_labels(labels, len(features), num_classes)
    examples, dim = features.shape
    x = features.astype(np.float64)
    if not np.isfinite(x).all():
        rows = np.flatnonzero(~np.isfinite(x).all(axis=1))
        raise _not_finite(f"{len(rows)} of {examples} training examples, the first of them number {rows[0]}, have")
    mean, scale = x.mean(axis=0), np.ones(dim)
    if whiten:
        x -= mean
        # A constant feature has no weight, but others than training examples may lie far from it in units of 1e-5, and
        # what rounding left would count. (The mean of equal numbers need not be exact.)
        is_constant = (features == features[0]).all(axis=0)
        scale = np.where(is_constant, 0, 1 / (np.sqrt(np.einsum("nd,nd->d", x, x) / examples) + EPSILON))
        x *= scale
    elif bias:
        x = np.append(x, np.full((examples, 1), float(bias)), axis=1)

    counts = np.bincount(labels, minlength=num_classes)
    if examples >= x.shape[1]:
        eigenvalues, left = np.linalg.eigh(x.T @ x)
        # X^T Y, whose columns are twice the sum over a class less the sum over all examples.
        members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        sums = np.stack([x[rows].sum(axis=0) for rows in members])
        right = left.T @ (2 * sums - sums.sum(axis=0)).T
        left_norms = np.ones(len(eigenvalues))
    else:
        eigenvalues, vectors = np.linalg.eigh(x @ x.T)
        left = x.T @ vectors
        right = 2 * vectors.T @ np.eye(num_classes)[labels] - vectors.sum(axis=0)[:, None]
        left_norms = np.maximum(eigenvalues, 0)
    eigenvalues = np.maximum(eigenvalues, 0)  # rounding may leave those that are 0 below it
    return RidgeSolution(mean, scale, eigenvalues, left, right, left_norms, counts, whiten, float(bias))


class _Ladder:
    """Finds for all l2 values at once where the true class comes first.

    The matrices W(l2) of a grid are nearly multiples of one, and still more nearly combinations of two or three, as
    1 / (eigenvalue + l2) is a smooth function of l2. A singular value decomposition of these factors finds such
    matrices, the rungs. The scores of all l2 values are combinations of the products of the features with the rungs,
    in float32. By Cauchy and Schwarz no score is further off than the length of the features times the length of what
    the weights of its class lack, and a known amount of rounding. Where the best of the other classes is further from
    the true class than both can be off, it is decided which comes first. Examples with an l2 value that is not decided
    go up to the next rung; after the last, float64 decides.
    """

    def __init__(self, solution: RidgeSolution, l2: np.ndarray):
        """Makes the rungs' factors and the bounds; no rung yet."""
        self._solution, self._l2 = solution, l2
        factors = 1 / (solution.eigenvalues + l2[:, None])  # [l2, rank]
        # What is the same for all classes decides nothing.
        self._right = solution.right - solution.right.mean(axis=1, keepdims=True)
        intercepts = solution.intercepts(l2)
        # Not their mean: classes of as many examples have the same intercept, which must become 0 to be left out below.
        self._intercepts = intercepts - (intercepts.min(axis=1) + intercepts.max(axis=1))[:, None] / 2

        # Squared lengths of the columns of `left`, and what rounding in the decomposition may add.
        slack = 16 * len(solution.eigenvalues) * np.finfo(np.float64).eps
        norms = solution.left_norms * (1 + slack) + slack * solution.left_norms.max()
        squares = self._right**2
        typical = np.sqrt(norms * squares.mean(axis=1))
        rows = factors * typical
        _, _, directions = np.linalg.svd(rows / _nonzero(np.linalg.norm(rows, axis=1, keepdims=True)), False)
        directions[:2] = _midway(rows @ directions[:2].T) @ directions[:2]
        self._factors = np.where(typical > 0, directions / _nonzero(typical), 0)  # of the rungs, [rungs, rank]
        lengths = np.sqrt((self._factors**2 * norms) @ squares)  # of the rungs, [rungs, classes]
        longest = _nonzero(lengths.max(axis=1))  # made 1, for float32 to hold
        self._factors, lengths = self._factors / longest[:, None], lengths / longest[:, None]
        shares = rows @ directions.T * longest

        # From here on weights and scores are those of an l2 value over its share of the first rung.
        first = _nonzero(shares[:, :1])
        self._shares, shown = shares / first, self._intercepts / first
        self._shown_intercepts = shown.astype(np.float32) if shown.any() else None
        # The error of a score with so many rungs is at most a slope times the features' length, and an offset.
        self._slopes, self._offsets, self._is_enough = [], [], []  # [l2, classes]
        centre = np.linalg.norm(solution.mean * solution.scale)
        for number in range(1, len(directions) + 1):
            lacking = factors / first - self._shares[:, :number] @ self._factors[:number]
            missing = np.sqrt(lacking**2 * norms @ squares)
            weight = np.abs(self._shares[:, :number]) @ lengths[:number]
            rounding = _UNIT * (len(solution.mean) + len(l2) + 16) * weight
            self._slopes.append(1.01 * (missing + rounding))
            self._offsets.append(1.01 * _UNIT * (8 * centre * (weight + missing) + (len(l2) + 4) * np.abs(shown)))
            self._is_enough.append(bool((missing <= rounding).all()))
        self._rungs: list[np.ndarray] = []
        with np.errstate(over="ignore"):  # see _climb
            self._mean, self._scale = solution.mean.astype(np.float32), solution.scale.astype(np.float32)

    def count_first(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """How often the true class has the highest score, for each l2 value."""
        is_first = np.zeros((len(self._l2), len(labels)), bool)
        is_open = np.ones_like(is_first)
        looks = self._choose_looks(features[:_PROBE], labels[:_PROBE])

        def climb(start: int) -> None:
            block = slice(start, start + _BLOCK)
            self._climb(features[block], labels[block], looks, is_first[:, block], is_open[:, block])

        # Threads that each do all of a block leave no core waiting for what BLAS does not do.
        with (
            threadpoolctl.threadpool_limits(1, user_api="blas"),
            concurrent.futures.ThreadPoolExecutor(num_cpus()) as pool,
        ):
            list(pool.map(climb, range(0, len(labels), _BLOCK)))
        rows = np.flatnonzero(is_open.any(axis=0))
        for start in range(0, len(rows), 4 * _BLOCK):
            self._decide_exactly(features, labels, rows[start : start + 4 * _BLOCK], is_first, is_open)
        return is_first.sum(axis=1)

    def _choose_looks(self, features: np.ndarray, labels: np.ndarray) -> list[int]:
        """After how many rungs to look at what is decided, by what comes of it for some examples."""
        looks, before = [], 1.0
        is_first = np.zeros((len(self._l2), len(labels)), bool)
        is_open = np.ones_like(is_first)
        for number in range(1, len(self._slopes) + 1):
            directions = self._solution.left[: len(self._mean)]
            self._rungs.append((directions @ (self._factors[number - 1][:, None] * self._right)).astype(np.float32))
            self._climb(features, labels, [number], is_first, is_open)
            share = is_open.any(axis=0).mean()
            is_last = share <= _FEW or self._is_enough[number - 1] or number == len(self._slopes)
            if is_last or before - share >= _WORTH:
                looks.append(number)
                before = share
            if is_last:
                break
        return looks

    def _climb(
        self, features: np.ndarray, labels: np.ndarray, looks: Sequence[int], is_first: np.ndarray, is_open: np.ndarray
    ) -> None:
        """Decides what the rungs can, for a block of examples; fills in the two arrays `[l2, examples]`."""
        rows = np.arange(len(labels))  # of the examples that are still on the ladder
        # What is too large for float32 is never decided here, as comparisons with what is not a number are false.
        with np.errstate(over="ignore", invalid="ignore"):
            inputs = (features.astype(np.float32) - self._mean) * self._scale
            lengths = np.sqrt(np.einsum("nd,nd->n", inputs, inputs))
            products: list[np.ndarray] = []
            for number in range(1, looks[-1] + 1):
                products.append(inputs @ self._rungs[number - 1])
                if number not in looks:
                    continue
                self._decide(products, lengths, labels, rows, is_first, is_open)
                stay = is_open[:, rows].any(axis=0)
                if not stay.any():
                    return
                rows, labels, inputs, lengths = rows[stay], labels[stay], inputs[stay], lengths[stay]
                products = [product[stay] for product in products]

    def _decide(
        self,
        products: Sequence[np.ndarray],
        lengths: np.ndarray,
        labels: np.ndarray,
        rows: np.ndarray,
        is_first: np.ndarray,
        is_open: np.ndarray,
    ) -> None:
        number, every = len(products), np.arange(len(rows))
        leads = np.empty((len(self._l2), len(rows)), np.float32)  # of the true class over the best of the others
        scores, term = np.empty_like(products[0]), np.empty_like(products[0])
        for index, shares in enumerate(self._shares[:, :number].astype(np.float32)):
            if index and number == 1 and self._shown_intercepts is None:
                leads[index] = leads[0]
                continue
            np.multiply(products[-1], shares[-1], out=scores)
            for share, product in zip(shares[1:-1], products[1:-1], strict=True):
                scores += np.multiply(product, share, out=term)
            if number > 1:
                scores += products[0]
            if self._shown_intercepts is not None:
                scores += self._shown_intercepts[index]
            true = scores[every, labels]
            scores[every, labels] = -np.inf
            leads[index] = true - scores.max(axis=1)
        off = 0.0
        for bound, times in ((self._slopes[number - 1], lengths), (self._offsets[number - 1], 1)):
            off = off + (bound.max(axis=1, keepdims=True) + bound[:, labels]) * times
        is_first[:, rows] |= is_open[:, rows] & (leads > off)
        is_open[:, rows] &= ~((leads > off) | (leads < -off))

    def _decide_exactly(
        self, features: np.ndarray, labels: np.ndarray, rows: np.ndarray, is_first: np.ndarray, is_open: np.ndarray
    ) -> None:
        solution = self._solution
        projected = solution.centred(features[rows]) @ solution.left[: len(solution.mean)]
        finite = np.isfinite(projected).all(axis=1)
        if not finite.all():
            raise _not_finite(f"test example {rows[~finite][0]} has")
        for index, l2 in enumerate(self._l2):
            left = is_open[index, rows]
            scores = (projected[left] / (solution.eigenvalues + l2)) @ self._right + self._intercepts[index]
            is_first[index, rows[left]] = scores.argmax(axis=1) == labels[rows[left]]


def _midway(points: np.ndarray) -> np.ndarray:
    """Turns the axes of a plane so that the first lies midway between the outermost of some points.

    Args:
      points: as seen from 0 within less than half a turn, `[points, 2]`; or `[points, 1]`, all of one sign.

    Returns:
      The new axes, `[2, 2]` or `[1, 1]`.
    """
    if points.shape[1] == 1:
        return np.array([[1.0 if points.sum() >= 0 else -1.0]])
    towards = points.sum(axis=0)
    start = np.arctan2(towards[1], towards[0])
    angles = (np.arctan2(points[:, 1], points[:, 0]) - start + np.pi) % (2 * np.pi) - np.pi
    angle = start + (angles.min() + angles.max()) / 2
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _nonzero(array: np.ndarray) -> np.ndarray:
    """The array with ones for zeros, to divide by."""
    return np.where(array == 0, 1, array)


def _not_finite(which: str) -> UserError:
    return UserError(f"{which} features that are not finite. See to the model's parameters, or to its dtype.")


def _checked_l2(l2: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(l2, np.float64)
    if values.ndim != 1 or not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise UserError(
            f"l2 must be numbers more than 0, got {l2!r}. Without regularisation least squares has no one solution; "
            "for the solution of least length take a small l2, such as 1e-6, or numpy.linalg.lstsq."
        )
    return values


def _checked_features(features: np.ndarray, dim: int | None = None) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or 0 in features.shape:
        raise UserError(f"features must be of shape [examples, dim], none of them 0, got {list(features.shape)}.")
    if dim is not None and features.shape[1] != dim:
        raise UserError(f"there are {features.shape[1]} features of an example, but those trained on had {dim}.")
    return features


def _checked_labels(labels: np.ndarray, examples: int, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (examples,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels must be one integer for each of the {examples} examples, got shape {list(labels.shape)} of "
            f"{labels.dtype}."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"labels must be 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}. Leave examples without "
            "label out."
        )
    return labels.astype(np.int64)
