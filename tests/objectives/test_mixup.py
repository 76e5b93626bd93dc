import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vit_jax.errors import UserError
from vit_jax.objectives.mixup import Mixing, neighbours


def shares(mixing, count=400, size=32):
    """Weights `[count, size, size]` of as many draws."""
    draw = jax.jit(jax.vmap(lambda rng: mixing.weights(rng, size, size)))
    return np.asarray(draw(jax.random.split(jax.random.key(0), count)))[..., 0]


@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_mixup_draws_one_share_for_all_pixels_from_the_beta_distribution_folded_at_a_half(alpha):
    drawn = shares(Mixing(mixup_alpha=alpha))
    assert (drawn == drawn[:, :1, :1]).all()
    share = drawn[:, 0, 0]
    assert share.min() >= 0.5
    beta = scipy.stats.beta(alpha, alpha)
    assert scipy.stats.kstest(share, lambda x: beta.cdf(x) - beta.cdf(1 - x)).pvalue > 0.01


def test_cutmix_cuts_one_box_of_about_the_drawn_area():
    drawn = shares(Mixing(cutmix_alpha=1.0))
    assert set(np.unique(drawn)) == {0.0, 1.0}
    for weights in drawn:
        cut = weights == 0
        rows, columns = cut.any(axis=1), cut.any(axis=0)
        np.testing.assert_array_equal(cut, np.outer(rows, columns))  # a box
        for line in (rows, columns):
            assert np.abs(np.diff(line.astype(int))).sum() <= 2  # in one piece
    # A box of sides s about a uniform centre, cut off at the border, keeps s (1 - s/4) of each side in the mean, and
    # s^2 = 1 - share is uniform: the mean area is the integral of u (1 - sqrt(u)/4)^2.
    expected = 1 / 2 - 1 / 2 * 2 / 5 + 1 / 16 / 3
    assert abs((1 - drawn).mean() - expected) < 0.05


def test_both_take_turns_at_random():
    is_mixup = np.array([((weights > 0) & (weights < 1)).any() for weights in shares(Mixing(0.8, 1.0))])
    assert 160 < is_mixup.sum() < 240


def test_neighbours_are_a_permutation_without_fixed_points():
    np.testing.assert_array_equal(neighbours(jnp.arange(4)), [3, 0, 1, 2])


def test_without_alpha_nothing_is_mixed():
    assert not Mixing()
    assert Mixing(mixup_alpha=0.1)
    assert Mixing(cutmix_alpha=0.1)


@pytest.mark.parametrize("alpha", [-0.1, float("inf"), float("nan")])
def test_impossible_alpha_is_refused(alpha):
    with pytest.raises(UserError, match="mixup_alpha must be at least 0"):
        Mixing(mixup_alpha=alpha)
