"""Perceptual hashes of images, and the search for close ones."""

import zipfile

import numpy as np

from tests.conftest import data_file
from vit_jax.data.prepare.near_duplicates import find_pairs, hash_image


def test_the_search_finds_what_comparing_all_with_all_finds():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2**64, (300, 5), np.uint64)
    queries = targets[rng.integers(0, 300, 3000)]
    for _ in range(14):  # bits that differ, at random places
        flips = np.uint64(1) << rng.integers(0, 64, queries.shape, np.uint64)
        queries = queries ^ np.where(rng.random(queries.shape) < 0.7, flips, np.uint64(0))
    bits = np.bitwise_count(queries[:, None] ^ targets[None])
    expected = (bits[..., 0] <= 11) & (bits[..., 1:].sum(-1) <= 40)
    query, target, distance = find_pairs(queries, targets, near=11, sure=40)
    assert 100 < len(query) < 2900
    np.testing.assert_array_equal(np.stack([query, target], -1), np.argwhere(expected))
    np.testing.assert_array_equal(distance, bits[query, target, 1:].sum(-1))


def test_no_photo_is_mistaken_for_another():
    """Of 300 photos of ImageNet, and their mirror images, none resembles another."""
    with zipfile.ZipFile(data_file("imagenet_sample_300.zip")) as archive:
        photos = [archive.read(name) for name in archive.namelist() if name.endswith(".JPEG")][::3]
    plain = np.stack([hash_image(photo) for photo in photos])
    mirrored = np.stack([hash_image(photo, mirrored=True) for photo in photos])
    query, target, _ = find_pairs(plain, np.concatenate([plain, mirrored]))
    assert len(photos) == 100
    assert query.tolist() == target.tolist() == list(range(100))
