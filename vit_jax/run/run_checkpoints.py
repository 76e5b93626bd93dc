"""The checkpoints of a run: `checkpoints/` to resume from, `best/` to use, `emergency/` to look into."""

import contextlib
import json
import logging
import math
from typing import Any

from vit_jax.checkpoints import Checkpoints
from vit_jax.errors import UserError
from vit_jax.files import AnyPath, write_atomically
from vit_jax.multihost import processes
from vit_jax.multihost.signals import Stopped
from vit_jax.run.journal import Journal, NonFiniteError
from vit_jax.run.lease import LockLostError
from vit_jax.run.workdir import FAILURE
from vit_jax.train_step import TrainState

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves the training state when due, the best parameters, and, if possible, the state when a run fails.

    All processes must make the same calls.
    """

    def __init__(
        self,
        workdir: AnyPath,
        journal: Journal,
        *,
        keep: int,
        every_steps: int | None,
        keep_best: bool = True,
        best_metric: str | None = None,
    ):
        """Opens the folders. Everything after `journal` is a field of `config.checkpoint`."""
        self._workdir, self._journal = workdir, journal
        self._every_steps, self._keep_best, self._best_metric = every_steps, keep_best, best_metric
        self._checkpoints = Checkpoints(workdir / "checkpoints", keep=keep)
        self._best = Checkpoints(workdir / "best", keep=2)  # a second one in case the newest is dropped
        self._best_value = -math.inf
        self._first_step = 0  # of this start

    def restore(self, like: Any) -> tuple[int, TrainState, dict[str, Any]] | None:
        """Reads the newest intact checkpoint; None if there is none.

        `like` is a tree with the shapes, dtypes and shardings of the state. Returns step, state, and the data saved
        with it: "data" (the position in the data) and "window" (the unfinished window of metrics).

        Raises:
          UserError: see `Checkpoints.restore_latest`.
        """
        with self._journal.ledger.spent_on("restore"):
            return self._checkpoints.restore_latest(like)

    def start(self, step: int, *, same_examples_since: int = 0) -> None:
        """Begins after a step: drops what an earlier start saved in `best/` after it, and finds the value to beat.

        Evaluations up to `same_examples_since` used other examples, so their accuracies do not count.
        """
        self._first_step = step + 1
        self._best.drop_after(step)
        best = self._best.latest_extra()
        if best and best[0] > same_examples_since and best[1].get("metric") == self._best_metric:
            self._best_value = best[1]["accuracy"]

    def save_if_due(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Saves the state after a step, and the position in the data, in the background, if that is due.

        Waits for the steps under way.

        Raises:
          NonFiniteError: a metric of a step is not finite; nothing is saved.
          UserError: this or an earlier checkpoint cannot be written.
        """
        if self._journal.is_due(step, self._every_steps):
            self._save(step, state, position)

    def _save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        with self._journal.pause("checkpoint", "saving a checkpoint"):
            self._journal.flush()
            self._best.wait()  # otherwise a kill could lose it: its evaluation would not be repeated
            self._checkpoints.save(step, state, {"data": position, "window": self._journal.step_metrics.get_state()})
        self._journal.record_costs()

    def save_if_best(self, step: int, params: Any, value: float) -> None:
        """Saves evaluated parameters in the background if they are better than all earlier ones."""
        if not self._keep_best or not value > self._best_value:
            return
        self._best_value = value
        with self._journal.ledger.spent_on("checkpoint"):
            if processes.process_count() > 1:
                self._checkpoints.wait()  # Orbax's threads for the two folders would wait at each other's barriers
            self._best.save(step, params, {"accuracy": value, "metric": self._best_metric})

    def wait(self) -> None:
        """Waits until everything is on disk; raises `UserError` if a checkpoint cannot be written."""
        with self._journal.pause("checkpoint", "writing checkpoints"):
            self._checkpoints.wait()
            self._best.wait()

    def rescue(self, error: Exception, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Saves the state if possible when an error ends the loop.

        After a signal, or an error that a user can fix, the state is good and becomes a checkpoint. After any other
        error it goes to `emergency/`, and so does a state whose loss is not finite. With several processes, nothing is
        saved unless all stop at the same step.

        Raises:
          UserError: a loss is not finite; the message names its step and the last good checkpoint.
        """
        try:
            if isinstance(error, LockLostError):
                return  # another process may be writing there
            if isinstance(error, NonFiniteError):
                raise error
            all_stop_here = isinstance(error, Stopped) or processes.process_count() == 1
            if step < self._first_step or not all_stop_here:
                return
            if isinstance(error, UserError | Stopped):
                self._save(step, state, position)
                self.wait()
                reason = f"{error}: " if isinstance(error, Stopped) else ""
                logger.info("%sthe state of step %d is saved; run the same command to resume", reason, step)
            else:
                with contextlib.suppress(Exception):  # the metrics of the last steps
                    self._journal.step_metrics.drain()
                logger.error("%s", self._save_in_emergency(step, state, position))
        except NonFiniteError as diverged:  # perhaps found by the save
            self.wait()
            last_good = self._last_good(diverged.step)
            saved = self._save_in_emergency(step, state, position)
            if processes.is_main_process():
                write_atomically(self._workdir / FAILURE, json.dumps({"reason": str(diverged)}) + "\n")
            raise UserError(f"{diverged} {last_good} {saved}") from diverged

    def _last_good(self, bad_step: int) -> str:
        """Says where to resume from, and how, after the loss of a step was not finite."""
        if self._checkpoints.latest_step() == bad_step - 1:
            # The loss of a step is that of the parameters before its update, so the update before it caused the
            # problem.
            self._checkpoints.set_aside(bad_step - 1, "diverged")
        last = self._checkpoints.latest_step()
        last_good = "No checkpoint was saved before it."
        if last is not None:
            last_good = f"The last good checkpoint is that of step {last}."
        return (
            f"{last_good} Try a lower optimizer.learning_rate, a longer optimizer.warmup_steps, or "
            "optimizer.clip_norm=1, in a new workdir or with --allow_config_change."
        )

    def _save_in_emergency(self, step: int, state: TrainState, position: dict[str, Any]) -> str:
        """Saves a state that may be bad; returns a message that says where, or why not. Raises nothing."""
        try:
            with Checkpoints(self._workdir / "emergency", keep=1) as emergency:
                emergency.drop_after(step - 1)  # of an earlier failure
                emergency.save(step, state, {"data": position, "window": self._journal.step_metrics.get_state()})
                emergency.wait()
        except Exception as error:  # the first error matters more
            return f"The state of step {step} could not be saved for a closer look: {error}"
        return (
            f"The state of step {step} is in {self._workdir / 'emergency' / str(step)} for a closer look; a start "
            "resumes from it if it is moved to checkpoints/."
        )

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        """Ends the background work."""
        self._best.__exit__(*error)
        self._checkpoints.__exit__(*error)
