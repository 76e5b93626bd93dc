"""The training loop."""

import contextlib
import logging
import pathlib
import signal
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax import experiment as experiments
from vit_jax import overview, partitioning, workdir
from vit_jax.checkpoints import Checkpoints
from vit_jax.curves import plot_curves
from vit_jax.errors import UserError
from vit_jax.metrics import MetricWriter, NonFiniteError, StepMetrics, Throughput, format_row, num_cores
from vit_jax.summary import write_summary
from vit_jax.train_step import init_train_state, make_train_step

logger = logging.getLogger(__name__)


class Stopped(Exception):  # noqa: N818 - not an error
    """The run was asked to stop, and did so in good order."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignal:
    """Within this context SIGTERM and SIGINT (Ctrl-C) only ask to stop; a second one ends the process at once."""

    signum: int | None = None

    def __enter__(self) -> "StopSignal":
        self._before = {each: signal.signal(each, self._receive) for each in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _receive(self, signum: int, _: object) -> None:
        self.signum = signum
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def check(self) -> None:
        """Raises `Stopped` if asked to stop."""
        if self.signum is not None:
            raise Stopped(self.signum)


def train(config: ConfigDict, path: pathlib.Path, *, allow_config_change: bool = False) -> dict[str, Any]:
    """Trains, evaluates and saves a model; goes on where an earlier start in the same workdir ended.

    Args:
      config: see `vit_jax.config.base_config`.
      path: the workdir; see `vit_jax.workdir` for what is in it.
      allow_config_change: go on in the workdir of another config.

    Returns:
      The summary that is also in `summary.json`.

    Raises:
      UserError: something the user can mend.
      Stopped: SIGTERM or SIGINT came; the state is saved.
    """
    start_time = time.perf_counter()
    with StopSignal() as stop, contextlib.ExitStack() as cleanup:
        # The parts of the run.
        experiment = experiments.build(config)
        workdir.prepare(path, config, allow_config_change=allow_config_change)
        logger.info("%s", overview.describe_run(config, experiment))
        mesh, num_steps = experiment.mesh, experiment.num_steps
        batches = experiments.make_train_batches(config, experiment)
        evaluator = experiments.make_evaluator(config, experiment, before_each_batch=stop.check)
        train_step = make_train_step(
            experiment.model, experiment.optimizer, experiment.schedule, experiment.loss_fn, mesh,
            accumulation_steps=config.accumulation_steps,
        )  # fmt: skip
        checkpoints = cleanup.enter_context(Checkpoints(path / "checkpoints", keep=config.checkpoint.keep))
        best = cleanup.enter_context(Checkpoints(path / "best", keep=1))

        # A new state, or where an earlier start ended.
        if restored := checkpoints.restore_latest(experiment.abstract_state):
            step, state, saved = restored
            batches.set_state(saved["data"])
            logger.info("resumed from the checkpoint of step %d", step)
        else:
            step, saved = 0, {}
            state = init_train_state(
                experiment.model, experiment.optimizer, mesh, image_size=config.data.image_size, seed=config.seed
            )
        devices = partitioning.describe_devices(mesh)
        workdir.record_start(path, step=step, devices=devices)

        # What is measured.
        throughput = Throughput(config.batch_size, num_cores(devices["num_devices"]))
        writer = cleanup.enter_context(MetricWriter(path, step=step, eval_split=config.data.eval_split))

        def log(step: int, metrics: dict[str, float]) -> None:
            writer.write(step, metrics)
            logger.info("%s", format_row(step, num_steps, metrics))

        def log_window(step: int, averages: dict[str, float]) -> None:
            log(step, {f"train/{name}": value for name, value in averages.items()} | throughput.mark(step))

        step_metrics = StepMetrics(config.log_every_steps, log_window, state=saved.get("window"))

        # What is done now and then.
        def is_due(every_steps: int | None) -> bool:
            return step == num_steps or (every_steps is not None and step % every_steps == 0)

        def save() -> None:
            step_metrics.drain()  # raises rather than save what follows a loss that is not finite
            best.wait()  # or a kill could lose it for good: this evaluation would not be made again
            checkpoints.save(step, state, {"data": batches.get_state(), "window": step_metrics.get_state()})
            throughput.restart(step)

        def evaluate() -> None:
            if evaluator is None:
                return
            step_metrics.drain()
            evaluated = dict(evaluator.run(state))
            log(step, {f"{config.data.eval_split}/{name}": value for name, value in evaluated.items()})
            if config.checkpoint.keep_best and evaluated["accuracy"] > best_accuracy(best):
                best.save(step, state.params, {"accuracy": evaluated["accuracy"]})
            plot_curves([path], path / "curves.png")
            throughput.restart(step)

        # The story.
        first_step = step + 1
        try:
            if step and is_due(config.eval_every_steps):
                evaluate()  # an earlier start may have ended in the middle of it
            while step < num_steps:
                stop.check()
                batch = next(batches)
                state, metrics = train_step(state, batch)
                step += 1
                step_metrics.push(step, metrics)
                if step == first_step:
                    jax.block_until_ready(state)
                    logger.info("first step done %.1f s after the start", time.perf_counter() - start_time)
                    throughput.restart(step)
                if is_due(config.checkpoint.every_steps):
                    save()
                if is_due(config.eval_every_steps):
                    evaluate()
        except NonFiniteError as error:
            checkpoints.wait()
            raise UserError(
                f"{error} The last good checkpoint is that of step {checkpoints.latest_step()} in {path}/checkpoints; "
                "nothing after it was saved. Try a lower optimizer.learning_rate, a longer optimizer.warmup_steps, or "
                "optimizer.clip_norm=1, in a new workdir or with --allow_config_change."
            ) from error
        except (UserError, Stopped) as error:  # nothing is wrong with the state
            save()
            checkpoints.wait()
            reason = f"{error}: " if isinstance(error, Stopped) else ""
            logger.info("%sthe state of step %d is saved; run the same command to go on", reason, step)
            raise

        checkpoints.wait()
        best.wait()
        plot_curves([path], path / "curves.png")
        return write_summary(config, path, experiment, seconds=time.perf_counter() - start_time)


def best_accuracy(best: Checkpoints) -> float:
    """Accuracy of the best evaluation so far; -1 before the first."""
    step = best.latest_step()
    return -1.0 if step is None else best.read_extra(step)["accuracy"]
