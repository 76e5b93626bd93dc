import numpy as np
import pytest

from vit_jax.data.permutation import permutation


def splitmix64(x):
    """The generator as its authors wrote it, in Python's integers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@pytest.mark.parametrize(("length", "seed"), [(1, 0), (10, 0), (100, 5), (1000, 2**32 - 1)])
def test_numbers_are_sorted_by_their_hashes(length, seed):
    golden_ratio = 0x9E3779B97F4A7C15
    keys = [splitmix64((i + seed * 2**32) * golden_ratio % 2**64) for i in range(length)]
    assert permutation(length, seed).tolist() == sorted(range(length), key=keys.__getitem__)


def test_order_does_not_change_between_versions():
    # Runs are resumed, and held-out parts held out, by this order.
    assert permutation(10, 0).tolist() == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]


def test_seeds_have_their_own_orders_and_no_place_is_preferred():
    orders = np.array([permutation(20, seed) for seed in range(2000)])
    assert len({tuple(order) for order in orders}) == 2000
    counts = np.array([np.bincount(orders[:, place], minlength=20) for place in range(20)])
    assert np.square(counts - 100).sum() / 100 < 361 + 4 * np.sqrt(2 * 361)  # chi-squared, 19 x 19 degrees of freedom
