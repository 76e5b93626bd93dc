"""A permutation of a few million numbers that is the same with every version of every library."""

import numpy as np


def permutation(length: int, seed: int) -> np.ndarray:
    """Permutes the numbers below `length` by `seed`: uint32 `[length]`, or uint64 from 2^32 on.

    Sorts them by their SplitMix64 hashes (Steele et al., 2014). NumPy's generators may change with any release, but
    held-out slices and the training order must not.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        x = np.arange(length, dtype=np.uint64) + np.uint64(seed % 2**32) * np.uint64(2**32)
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable").astype(np.uint32 if length < 2**32 else np.uint64)
