import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.objectives.losses import NO_LABEL, Loss, is_correct, is_labelled, multi_hot

LABELS = jnp.array([[2, NO_LABEL, NO_LABEL], [0, 3, 1], [NO_LABEL, NO_LABEL, NO_LABEL]])
LOGITS = jnp.array([[0.1, -1.0, 2.0, 0.5], [1.0, 0.3, -0.2, 0.9], [0.0, 1.0, 2.0, 3.0]])


def test_labels_become_ones_in_their_columns_and_none_becomes_zeros():
    np.testing.assert_array_equal(multi_hot(LABELS, 4), [[0, 0, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(multi_hot(jnp.array([1, NO_LABEL]), 2), [[0, 1], [0, 0]])


def test_a_label_that_is_given_twice_counts_once():
    np.testing.assert_array_equal(multi_hot(jnp.array([[1, 1]]), 3), [[0, 1, 0]])


def test_any_of_the_labels_is_right():
    np.testing.assert_array_equal(is_correct(LOGITS, LABELS), [1, 1, 0])
    np.testing.assert_array_equal(is_correct(LOGITS, jnp.array([2, 3, 3])), [1, 0, 1])
    np.testing.assert_array_equal(is_labelled(LABELS), [1, 1, 0])


def test_sigmoid_loss_of_several_labels_matches_the_closed_form():
    found = Loss("sigmoid")(LOGITS, LABELS)
    p = 1 / (1 + np.exp(-np.asarray(LOGITS, np.float64)))
    expected = -np.log([p[0, 2], p[1, 0] * p[1, 3] * p[1, 1]])
    expected -= [np.log(1 - p[0, [0, 1, 3]]).sum(), np.log(1 - p[1, [2]]).sum()]
    np.testing.assert_allclose(found, [*expected, 0], rtol=1e-6)


def test_softmax_loss_of_several_labels_shares_the_probability_among_them():
    found = Loss("softmax")(LOGITS, LABELS)
    log_p = np.asarray(LOGITS, np.float64)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    np.testing.assert_allclose(found, [-log_p[0, 2], -log_p[1, [0, 1, 3]].mean(), 0], rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_one_label_in_a_row_of_several_equals_a_single_label(name):
    alone, row = jnp.array([1, 3, 0]), jnp.array([[1, NO_LABEL], [3, NO_LABEL], [0, NO_LABEL]])
    loss = Loss(name, label_smoothing=0.1)
    np.testing.assert_array_equal(loss(LOGITS, alone), loss(LOGITS, row))


def test_unknown_loss_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'softmax'"):
        Loss("sofmax")
