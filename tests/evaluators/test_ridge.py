"""The closed-form linear classifier against plain float64 solutions of NumPy."""

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.evaluators import ridge
from vit_jax.evaluators.ridge import solve_ridge


def clusters(examples, dim, classes, *, seed=0, spread=1.0, dtype=np.float32):
    """Features around a centre for each class, every class at least once, and labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1000).standard_normal((classes, dim))
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=max(0, examples - classes))])[:examples]
    features = centres[labels] + spread * rng.standard_normal((examples, dim))
    return (3 * features + rng.uniform(-5, 5, dim)).astype(dtype), labels


def design(train, features, *, whiten, bias):
    """What is solved for, as the released evaluator has it."""
    train, features = train.astype(np.float64), features.astype(np.float64)
    if whiten:
        features = (features - train.mean(axis=0)) / (train.std(axis=0) + 1e-5)
    return np.concatenate([features, np.full((len(features), 1), bias)], axis=1) if bias else features


def plain_scores(train, labels, classes, test, l2, *, whiten=True, bias=100.0):
    """(X^T X + l2 I)^-1 X^T Y, word for word."""
    x, targets = design(train, train, whiten=whiten, bias=bias), 2.0 * np.eye(classes)[labels] - 1
    weights = np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ targets)
    return design(train, test, whiten=whiten, bias=bias) @ weights


def duplicated(features):
    return np.concatenate([features, features, features[:, ::-1]], axis=1)


def constant(features):
    features = features.copy()
    features[:, ::3] = np.float32(0.1)
    return features


def mixed(features):
    """Features of very different sizes."""
    return features * 10.0 ** np.linspace(-6, 6, features.shape[1])


CASES = {
    "more examples than features": (80, 12, 5, lambda x: x),
    "more features than examples": (30, 50, 5, lambda x: x),
    "fewer examples than classes": (4, 10, 9, lambda x: x),
    "one example": (1, 6, 3, lambda x: x),
    "each feature several times": (80, 12, 5, duplicated),
    "constant features": (80, 12, 5, constant),
    "each example several times": (90, 40, 5, lambda x: x[np.arange(len(x)) % 10]),
    "all features zero": (20, 5, 4, np.zeros_like),
    "large features": (80, 12, 5, lambda x: 1e6 * x),
    "small features": (30, 50, 5, lambda x: 1e-6 * x),
}
FORMS = {
    "whitened": {},
    "whitened, no bias": {"bias": 0.0},
    "plain": {"whiten": False, "bias": 0.0},
    "plain, bias": {"whiten": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_scores_match_a_plain_float64_solution(case, form):
    examples, dim, classes, change = CASES[case]
    train, labels = clusters(examples, dim, classes)
    test, _ = clusters(200, dim, classes, seed=1)
    train, test = change(train), change(test)
    solution = solve_ridge(train, labels, num_classes=classes, **FORMS[form])
    for l2 in (0.1, 1.0, 2.0**10):
        expected = plain_scores(train, labels, classes, test, l2, **FORMS[form])
        tolerance = 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(solution.scores(test, l2), expected, rtol=0, atol=tolerance)
        kernel, intercept = solution.weights(l2)
        np.testing.assert_allclose(test @ kernel + intercept, expected, rtol=0, atol=tolerance)


def test_whitened_scores_do_not_suffer_from_features_of_very_different_sizes():
    train, labels = clusters(80, 12, 5, dtype=np.float64)
    test, _ = clusters(200, 12, 5, seed=1, dtype=np.float64)
    train, test = mixed(train), mixed(test)
    expected = plain_scores(train, labels, 5, test, 1e-3)
    np.testing.assert_allclose(solve_ridge(train, labels).scores(test, 1e-3), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("examples", [80, 9])
@pytest.mark.parametrize("value", [0.0, 7.3])  # the mean of equal numbers such as 7.3 is another number
def test_features_that_vary_in_test_examples_only_do_not_count(examples, value):
    train, labels = clusters(examples, 12, 5, dtype=np.float64)
    test, _ = clusters(200, 12, 5, seed=1, dtype=np.float64)
    expected = solve_ridge(train, labels)
    train = np.insert(train, [0, 3, 12], value, axis=1)
    test = np.insert(test, [0, 3, 12], np.random.default_rng(0).standard_normal((200, 3)), axis=1)
    found = solve_ridge(train, labels)
    np.testing.assert_allclose(
        found.scores(test, 1e-3), expected.scores(np.delete(test, [0, 4, 14], 1), 1e-3), atol=1e-9
    )
    assert not found.weights(1e-3)[0][[0, 4, 14]].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_tiny_l2_gives_the_least_squares_solution_of_least_length(form):
    train, labels = clusters(60, 8, 5)
    x = design(train, train, **{"whiten": True, "bias": 100.0} | FORMS[form])
    weights, *_ = np.linalg.lstsq(x, 2.0 * np.eye(5)[labels] - 1)
    found = solve_ridge(train, labels, **FORMS[form]).scores(train, 1e-8)
    np.testing.assert_allclose(found, x @ weights, rtol=0, atol=1e-6)


def test_primal_and_dual_solutions_are_the_same():
    # A feature more or less makes the difference of which is solved.
    train, labels = clusters(41, 40, 6)
    test, _ = clusters(50, 40, 6, seed=1)
    padded = [np.concatenate([array, np.zeros((len(array), 5), array.dtype)], axis=1) for array in (train, test)]
    primal, dual = solve_ridge(train, labels), solve_ridge(padded[0], labels)
    assert len(primal.left) == len(primal.eigenvalues) == 41  # with the constant feature
    assert (len(dual.left), len(dual.eigenvalues)) == (46, 41)
    np.testing.assert_allclose(primal.scores(test, 3.0), dual.scores(padded[1], 3.0), rtol=0, atol=1e-9)


GRID = (1e-6, 0.1, 2.0, 2.0**10, 1e7)


def decaying(features):
    """Rotated features of very different variances, like a trained model's."""
    dim = features.shape[1]
    turn = np.linalg.qr(np.random.default_rng(7).standard_normal((dim, dim)))[0]
    return (features * np.arange(1, dim + 1) ** -1.0) @ turn.astype(np.float32)


def rounded(features):
    """Few different values, so that scores are equal or nearly so."""
    return np.round(features / 8)


@pytest.mark.parametrize(
    ("examples", "change", "form"),
    [
        (300, lambda x: x, "whitened"),
        (300, decaying, "whitened"),
        (40, decaying, "whitened"),
        (300, rounded, "whitened"),
        (300, lambda x: x, "plain"),
        (300, decaying, "plain, bias"),
        (300, constant, "plain, bias"),
        (40, lambda x: x + 1e6, "whitened, no bias"),  # float32 subtracts the mean with an error
    ],
)
def test_accuracies_match_float64(examples, change, form):
    classes = 30
    train, labels = clusters(examples, 64, classes, spread=2.5)
    test, test_labels = clusters(1500, 64, classes, seed=1, spread=2.5)
    train, test = change(train), change(test)
    found = solve_ridge(train, labels, **FORMS[form]).accuracies(test, test_labels, GRID)
    expected = [
        np.mean(plain_scores(train, labels, classes, test, l2, **FORMS[form]).argmax(axis=1) == test_labels)
        for l2 in GRID
    ]
    assert found.tolist() == expected
    assert 0.05 < max(expected) < 1  # neither all right nor by chance


@pytest.mark.parametrize("apart", [1e-9, 1e-7, 1e-6])
def test_classes_too_close_for_float32_are_distinguished(apart):
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    centres = rng.standard_normal((4, 16))
    centres[1] = centres[0] + apart * rng.standard_normal(16)
    # Classes 0 and 1 have examples with the same noise.
    train = centres[labels] + np.repeat(rng.standard_normal((100, 16)), 2, axis=0)
    train -= train.mean(axis=0)
    test = train[0] + rng.standard_normal((1000, 16))
    form = {"whiten": False, "bias": 0.0}
    expected = plain_scores(train, labels, 4, test, 1e-3, **form).argmax(axis=1)
    assert np.isin([0, 1], expected).all()
    assert solve_ridge(train, labels, **form).accuracies(test, expected, [1e-3]).tolist() == [1.0]


def test_accuracies_depend_neither_on_order_nor_on_block_size(monkeypatch):
    train, labels = clusters(300, 64, 30, spread=2.5)
    test, test_labels = clusters(1000, 64, 30, seed=1, spread=2.5)
    expected = solve_ridge(train, labels).accuracies(test, test_labels, GRID).tolist()
    rng = np.random.default_rng(0)
    some, others = rng.permutation(len(train)), rng.permutation(len(test))
    shuffled = solve_ridge(train[some], labels[some])
    assert shuffled.accuracies(test[others], test_labels[others], GRID).tolist() == expected
    monkeypatch.setattr(ridge, "_BLOCK", 17)
    assert shuffled.accuracies(test, test_labels, GRID).tolist() == expected


def test_ties_go_to_the_first_class():
    train, labels = clusters(40, 8, 3)
    solution = solve_ridge(train, labels, num_classes=6)  # 3, 4 and 5 have no example, and the same scores
    kernel, _ = solution.weights(1.0)
    np.testing.assert_allclose(kernel[:, 3], kernel[:, 5], rtol=0, atol=1e-12)
    zeros = np.zeros((30, 8), np.float32)
    all_alike = solve_ridge(zeros, np.arange(30) % 3)
    for label, share in ((0, 1.0), (1, 0.0), (2, 0.0)):
        assert all_alike.accuracies(zeros, np.full(30, label), [1.0, 2.0]).tolist() == [share, share]


def test_half_precision_features_are_solved_in_float64():
    train, labels = clusters(80, 12, 5)
    train = train.astype(np.float16)
    expected = plain_scores(train, labels, 5, train, 1.0)
    np.testing.assert_allclose(solve_ridge(train, labels).scores(train, 1.0), expected, rtol=0, atol=1e-6)


def test_values_too_large_for_float32_are_scored():
    train, labels = clusters(80, 12, 5, dtype=np.float64)
    found = solve_ridge(train * 1e60, labels).accuracies(train * 1e60, labels, [1.0, 2.0])
    np.testing.assert_array_equal(found, solve_ridge(train, labels).accuracies(train, labels, [1.0, 2.0]))


@pytest.mark.parametrize("l2", [0.0, -1.0, float("nan"), float("inf")])
def test_l2_that_is_not_positive_is_refused(l2):
    solution = solve_ridge(*clusters(20, 4, 3))
    for ask in (lambda: solution.weights(l2), lambda: solution.scores(np.zeros((1, 4)), l2)):
        with pytest.raises(UserError, match="l2 must be more than 0, got"):
            ask()
    with pytest.raises(UserError, match="l2 must be more than 0, got"):
        solution.accuracies(np.zeros((1, 4)), np.zeros(1, int), [1.0, l2])


def test_features_that_are_not_finite_are_refused():
    train, labels = clusters(20, 4, 3)
    solution = solve_ridge(train, labels)
    train[7, 2] = np.nan
    for ask in (lambda: solve_ridge(train, labels), lambda: solution.accuracies(train, labels, [1.0])):
        with pytest.raises(UserError, match="1 of 20 examples, the first of them number 7, have features that are not"):
            ask()


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.zeros((3, 2, 2)), np.zeros(3, int), r"shape \[examples, dim\], got \[3, 2, 2\]"),
        (np.zeros((0, 2)), np.zeros(0, int), r"got \[0, 2\]"),
        (np.zeros((3, 2)), np.zeros(2, int), r"labels must be 3 integers, got shape \[2\]"),
        (np.zeros((3, 2)), np.zeros(3), r"got shape \[3\] of float64"),
        (np.zeros((3, 2)), np.array([0, -1, 1]), r"labels must be 0 to 1, got -1 to 1"),
        (np.zeros((3, 2)), np.array([0, 2, 1]), r"labels must be 0 to 1, got 0 to 2"),
    ],
)
def test_bad_training_examples_are_refused(features, labels, message):
    with pytest.raises(UserError, match=message):
        solve_ridge(features, labels, num_classes=2)


def test_other_features_than_those_trained_on_are_refused():
    solution = solve_ridge(*clusters(20, 4, 3))
    with pytest.raises(UserError, match=r"shape \[examples, 4\], got \[2, 5\]"):
        solution.scores(np.zeros((2, 5)), 1.0)
