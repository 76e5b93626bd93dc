"""The rate of matrix products in JAX and torch, the reference for utilisation."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.candidates import PAUSE_SECONDS, Settings, import_torch_and_timm, is_out_of_memory, torch_device

MATMUL_SIZES = (1024, 2048, 4096, 8192, 16384)
MATMUL_SECONDS = 2.0  # the longest that one product may take


def measure_matmul(settings: Settings, sizes: Sequence[int], *, with_jax: bool, with_torch: bool) -> dict[str, Any]:
    """Rates by framework; `reference` is the highest of all, in FLOP/s, or None."""
    rates: dict[str, Any] = {}
    if with_jax:
        rates["jax"] = matmul_rates(jax_product(settings.dtype), sizes)
    if with_torch:
        time.sleep(PAUSE_SECONDS)
        rates["torch"] = matmul_rates(torch_product(settings), sizes)
    everything = [entry["flops_per_second"] for entries in rates.values() for entry in entries]
    return {**rates, "reference": max(everything, default=None)}


def matmul_rates(product: Callable[[int], Callable[[int], float]], sizes: Sequence[int]) -> list[dict[str, float]]:
    """Rates of square matrix products.

    Args:
      product: makes, for a size, a function that returns the seconds of a number of products.
      sizes: ascending; those that take too long or too much memory are left out.

    Returns:
      for each size `{"size", "flops_per_second"}`, of the fastest of several turns.
    """
    rates: list[dict[str, float]] = []
    for size in sizes:
        if rates and 2 * size**3 / rates[-1]["flops_per_second"] > MATMUL_SECONDS:
            break
        try:
            seconds_of = product(size)
            seconds_of(1)
            repeats = max(1, min(1000, math.ceil(0.2 / seconds_of(1))))
            seconds = min(seconds_of(repeats) / repeats for _ in range(4))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        rates.append({"size": size, "flops_per_second": 2 * size**3 / seconds})
    return rates


def jax_product(dtype: str) -> Callable[[int], Callable[[int], float]]:
    """Matrix products in JAX, for `matmul_rates`."""
    multiply = jax.jit(jnp.matmul)

    def product(size: int) -> Callable[[int], float]:
        # Zeros take less power and so run faster than real matrices.
        left, right = jax.random.normal(jax.random.key(0), (2, size, size), dtype)

        def seconds(repeats: int) -> float:
            jax.block_until_ready((left, right))
            start = time.perf_counter()
            for _ in range(repeats):
                result = multiply(left, right)
            jax.block_until_ready(result)
            return time.perf_counter() - start

        return seconds

    return product


def torch_product(settings: Settings) -> Callable[[int], Callable[[int], float]]:
    """Matrix products in torch, for `matmul_rates`."""
    torch, _ = import_torch_and_timm()
    device = torch_device(torch, settings)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def product(size: int) -> Callable[[int], float]:
        left, right = torch.randn(2, size, size, device=device).to(getattr(torch, settings.dtype))

        def seconds(repeats: int) -> float:
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                torch.matmul(left, right)
            synchronize()
            return time.perf_counter() - start

        return seconds

    return product
