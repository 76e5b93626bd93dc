"""Evaluators: `run(state)` yields `(metric name, value)`. The training loop knows nothing else of them."""

from collections.abc import Iterable
from typing import Protocol

from vit_jax.train_step import TrainState


class Evaluator(Protocol):
    """Measures parameters, `state.evaluated`. All processes run it alike and get the same values."""

    def run(self, state: TrainState) -> Iterable[tuple[str, float]]:
        """Yields names of metrics and their values."""
        ...
