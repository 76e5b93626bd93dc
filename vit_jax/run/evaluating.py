"""Evaluations during training."""

from collections.abc import Iterator, Sequence
from typing import Any

from vit_jax.run.journal import Journal
from vit_jax.run.run_checkpoints import RunCheckpoints
from vit_jax.train_step import TrainState


class Evaluations:
    """Runs each evaluation when it is due, writes its metrics, and keeps the best parameters."""

    def __init__(self, evaluations: Sequence[Any], journal: Journal, checkpoints: RunCheckpoints):
        """Takes the evaluations of a run, from `make_evaluations`."""
        self._evaluations, self._journal, self._checkpoints = evaluations, journal, checkpoints

    def __iter__(self) -> Iterator[Any]:
        return iter(self._evaluations)

    def run_if_due(self, step: int, state: TrainState) -> None:
        """Runs the evaluations that are due after a step, once that is done. Raises as `Journal.pause` does."""
        due = [each for each in self._evaluations if self._journal.is_due(step, each.every_steps)]
        if not due:
            return
        with self._journal.pause("evaluation", "evaluation"):
            for each in due:
                metrics = each.run(state)
                self._journal.write(step, {f"{each.name}/{name}": value for name, value in metrics.items()})
                if each.best_metric:
                    self._checkpoints.save_if_best(step, state.evaluated, metrics[each.best_metric])
            self._journal.draw_curves_if_due()
