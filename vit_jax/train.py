"""The training loop."""

import contextlib
import logging
import signal
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax import experiment as experiments
from vit_jax import overview, partitioning, workdir
from vit_jax.analysis.flops import train_step_flops
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
    """How a run ends on SIGTERM and SIGINT (Ctrl-C): at once as long as it has made nothing, in good order after that.

    Python's handlers wait for C++ code, such as a long compilation, to return; the system's default does not.
    """

    signum: int | None = None

    def __enter__(self) -> "StopSignal":
        self._before = {each: signal.signal(each, signal.SIG_DFL) for each in (signal.SIGTERM, signal.SIGINT)}
        return self

    def arm(self) -> None:
        """From now on a signal only asks to stop; a second one ends the process at once."""
        for each in self._before:
            signal.signal(each, self._receive)

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _receive(self, signum: int, _: object) -> None:
        self.signum = signum
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        logger.info("%s: saving and stopping; once more to end at once", signal.Signals(signum).name)

    def check(self) -> None:
        """Raises `Stopped` if asked to stop."""
        if self.signum is not None:
            raise Stopped(self.signum)


def train(config: ConfigDict, path: workdir.AnyPath, *, allow_config_change: bool = False) -> dict[str, Any]:
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
    if jax.process_count() > 1:
        raise UserError("training over several processes is not there yet; run a single process.")
    with StopSignal() as stop, contextlib.ExitStack() as cleanup:
        # The parts of the run.
        experiment = experiments.build(config)
        cleanup.enter_context(workdir.locked(path))
        workdir.check_config(path, config, allow_config_change=allow_config_change)
        logger.info("%s", overview.describe_run(config, experiment))
        mesh, num_steps = experiment.mesh, experiment.num_steps
        batches = cleanup.enter_context(contextlib.closing(experiments.make_train_batches(config, experiment)))
        evaluator = experiments.make_evaluator(config, experiment, before_each_batch=stop.check)
        train_step = make_train_step(
            experiment.model, experiment.optimizer, experiment.schedule, experiment.loss_fn, mesh,
            accumulation_steps=config.accumulation_steps, mixing=experiment.mixing,
        )  # fmt: skip
        checkpoints = cleanup.enter_context(Checkpoints(path / "checkpoints", keep=config.checkpoint.keep))
        best = cleanup.enter_context(Checkpoints(path / "best", keep=2))  # the one before, should the newest be dropped

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
        best.drop_after(step)
        best_accuracy = (best.latest_extra() or {"accuracy": -1.0})["accuracy"]
        devices = partitioning.describe_devices(mesh)
        workdir.record_start(path, config, step=step, devices=devices)

        # What is measured.
        flops = train_step_flops(experiment.model, config.data.image_size)
        throughput = Throughput(config.batch_size, num_cores(devices["num_devices"]), flops)
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
            writer.flush()
            best.wait()  # or a kill could lose it for good: this evaluation would not be made again
            checkpoints.save(step, state, {"data": batches.get_state(), "window": step_metrics.get_state()})
            throughput.restart(step)

        def evaluate() -> None:
            nonlocal best_accuracy
            if evaluator is None:
                return
            step_metrics.drain()
            evaluated = dict(evaluator.run(state))
            log(step, {f"{config.data.eval_split}/{name}": value for name, value in evaluated.items()})
            if config.checkpoint.keep_best and evaluated["accuracy"] > best_accuracy:
                best_accuracy = evaluated["accuracy"]
                best.save(step, state.params, {"accuracy": best_accuracy})
            draw()
            throughput.restart(step)

        def draw() -> None:
            try:
                writer.flush()
                plot_curves([path], path / "curves.png")
            except Exception:  # no run ends over a picture
                logger.warning("could not draw curves.png", exc_info=True)

        # The story.
        first_step, metrics = step + 1, None
        try:
            try:
                if step and is_due(config.eval_every_steps):
                    evaluate()  # an earlier start may have ended in the middle of it
                while step < num_steps:
                    stop.check()
                    with throughput.waiting_for_input(metrics):
                        batch = next(batches)
                    state, metrics = train_step(state, batch)
                    del batch  # its memory can be used again before the next is there
                    step += 1
                    step_metrics.push(step, metrics)
                    if step == first_step:
                        jax.block_until_ready(state)
                        stop.arm()
                        logger.info("first step done %.1f s after the start", time.perf_counter() - start_time)
                        throughput.restart(step)
                    if is_due(config.checkpoint.every_steps):
                        save()
                    if is_due(config.eval_every_steps):
                        evaluate()
            except NonFiniteError:
                raise
            except (UserError, Stopped) as error:  # nothing is wrong with the state
                if step >= first_step:
                    save()
                    checkpoints.wait()
                    reason = f"{error}: " if isinstance(error, Stopped) else ""
                    logger.info("%sthe state of step %d is saved; run the same command to go on", reason, step)
                raise
        except NonFiniteError as error:
            raise UserError(f"{error} {_last_good(checkpoints, error.step)}") from error

        checkpoints.wait()
        best.wait()
        draw()
        return write_summary(config, path, experiment, seconds=time.perf_counter() - start_time)


def _last_good(checkpoints: Checkpoints, bad_step: int) -> str:
    """Where to go on from after the loss of a step was not finite, and how."""
    checkpoints.wait()
    if checkpoints.latest_step() == bad_step - 1:
        # The loss of a step is that of the parameters before its update: this update did the harm.
        checkpoints.set_aside(bad_step - 1, "diverged")
    last = checkpoints.latest_step()
    where = (
        "No checkpoint was saved before it." if last is None else f"The last good checkpoint is that of step {last}."
    )
    return (
        f"{where} Try a lower optimizer.learning_rate, a longer optimizer.warmup_steps, or optimizer.clip_norm=1, in a "
        "new workdir or with --allow_config_change."
    )
