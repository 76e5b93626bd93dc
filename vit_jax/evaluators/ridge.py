r"""Linear classifiers in closed form: regularised least squares to targets in {-1, 1}^K (section 4.1 of the paper).

X `[n, D]` has the features of the n training examples as rows, and Y `[n, K]` has 1 for an example's class and -1 for
the others:

    W(l2) = (X^T X + l2 I)^-1 X^T Y = X^T (X X^T + l2 I)^-1 Y,    scores(x) = x^T W,    prediction = argmax scores.

Whitening and constant feature are those of the released evaluator (google-research/big_vision,
evaluators/fewshot_lsr.py). One eigendecomposition, of the smaller Gram matrix, serves all l2 values, and scoring takes
one product for each. All arithmetic is in float64.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vit_jax.errors import UserError

BIAS = 100.0
EPSILON = 1e-5
_BLOCK = 4096  # test examples scored at once


@dataclasses.dataclass(frozen=True)
class RidgeSolution:
    """The solutions for all l2 values: W(l2) = left diag(1 / (eigenvalues + l2)) right."""

    mean: np.ndarray  # subtracted from the features, float64 `[dim]`
    scale: np.ndarray  # then multiplies them, float64 `[dim]`
    bias: float  # the constant feature to append; 0: none
    eigenvalues: np.ndarray  # of the smaller Gram matrix, float64 `[rank]`
    left: np.ndarray  # float64 `[dim, rank]`, `[dim + 1, rank]` with a constant feature
    right: np.ndarray  # float64 `[rank, num_classes]`

    def weights(self, l2: float) -> tuple[np.ndarray, np.ndarray]:
        """Kernel `[dim, num_classes]` and intercept `[num_classes]` of scores = features @ kernel + intercept, float64.

        Raises:
          UserError: l2 is not more than 0.
        """
        weights = self._weights(l2)
        kernel = weights[: len(self.mean)] * self.scale[:, None]
        return kernel, self.bias * weights[-1] - self.mean @ kernel

    def scores(self, features: np.ndarray, l2: float) -> np.ndarray:
        """Scores of examples `[examples, dim]`, float64 `[examples, num_classes]`; the highest is the prediction.

        Raises:
          UserError: l2 is not more than 0, or the features are not finite, or differ in number from those in training.
        """
        return _rows(_checked(features, len(self.mean)), self.mean, self.scale, self.bias) @ self._weights(l2)

    def accuracies(self, features: np.ndarray, labels: np.ndarray, l2: Sequence[float] | np.ndarray) -> np.ndarray:
        """The share of examples whose class has the highest score, for each l2 value; ties go to the first class.

        Args:
          features: `[examples, dim]`.
          labels: classes, int `[examples]`.
          l2: the regularisations, each more than 0.

        Raises:
          UserError: as in `scores`, or a label is not a class.
        """
        features = _checked(features, len(self.mean))
        labels = _checked_labels(labels, len(features), self.right.shape[1])
        weights, correct = [self._weights(each) for each in l2], np.zeros(len(l2))
        for start in range(0, len(labels), _BLOCK):
            rows = _rows(features[start : start + _BLOCK], self.mean, self.scale, self.bias)
            expected = labels[start : start + _BLOCK]
            correct += [np.sum((rows @ each).argmax(axis=1) == expected) for each in weights]
        return correct / len(labels)

    def _weights(self, l2: float) -> np.ndarray:
        if not 0 < l2 < np.inf:
            raise UserError(f"l2 must be more than 0, got {l2}. A small one, such as 1e-6, gives plain least squares.")
        return self.left @ (self.right / (self.eigenvalues + l2)[:, None])


def solve_ridge(
    features: np.ndarray, labels: np.ndarray, *, num_classes: int | None = None, whiten: bool = True, bias: float = BIAS
) -> RidgeSolution:
    """Decomposes the normal equations. Features may be constant or equal, and examples fewer than features or classes.

    Args:
      features: of the training examples, `[examples, dim]`.
      labels: their classes, int `[examples]`.
      num_classes: number of classes, including those without examples; None: the highest label plus one.
      whiten: whether to subtract from each feature its mean over the training examples and to divide it by its standard
        deviation there + 1e-5. A feature that is constant there becomes 0 in all examples.
      bias: the constant feature, so large that the intercept is hardly regularised; 0: none.

    Raises:
      UserError: arrays of the wrong shape, no examples, a label that is not a class, or a feature that is not finite.
    """
    features = _checked(features)
    num_classes = int(np.max(labels, initial=-1)) + 1 if num_classes is None else num_classes
    labels = _checked_labels(labels, len(features), num_classes)
    mean, scale = np.zeros(features.shape[1]), np.ones(features.shape[1])
    if whiten:
        mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
        # A constant feature has no weight, but in other examples it may be many units of 1e-5 away from its mean.
        scale = np.where((features == features[0]).all(axis=0), 0, 1 / (std + EPSILON))
    x = _rows(features, mean, scale, bias)
    if len(x) >= x.shape[1]:
        eigenvalues, left = np.linalg.eigh(x.T @ x)
        right = left.T @ _times_targets(x, labels, num_classes)
    else:
        eigenvalues, vectors = np.linalg.eigh(x @ x.T)
        left, right = x.T @ vectors, _times_targets(vectors, labels, num_classes)
    return RidgeSolution(mean, scale, float(bias), np.maximum(eigenvalues, 0), left, right)  # rounding may leave -1e-16


def _rows(features: np.ndarray, mean: np.ndarray, scale: np.ndarray, bias: float) -> np.ndarray:
    rows = (features.astype(np.float64) - mean) * scale
    return np.append(rows, np.full((len(rows), 1), float(bias)), axis=1) if bias else rows


def _times_targets(rows: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """`rows^T Y`: twice the sum over the examples of a class, minus the sum over all."""
    sums = np.zeros((num_classes, rows.shape[1]))
    np.add.at(sums, labels, rows)
    return (2 * sums - rows.sum(axis=0)).T


def _checked(features: np.ndarray, dim: int | None = None) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or 0 in features.shape or features.shape[1] != (dim or features.shape[1]):
        raise UserError(f"features must be of shape [examples, {dim or 'dim'}], got {list(features.shape)}.")
    if len(bad := np.flatnonzero(~np.isfinite(features).all(axis=1))):
        raise UserError(
            f"{len(bad)} of {len(features)} examples, the first of them number {bad[0]}, have features that are not "
            "finite. Check the model's parameters, or its dtype."
        )
    return features


def _checked_labels(labels: np.ndarray, examples: int, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (examples,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"labels must be {examples} integers, got shape {list(labels.shape)} of {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"labels must be 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}.")
    return labels
