"""The training loop."""

import contextlib
import dataclasses
import json
import logging
import math
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax import sharding
from vit_jax.checkpoints import Checkpoints
from vit_jax.costs.hardware import describe_machine
from vit_jax.errors import UserError
from vit_jax.experiment import build as experiments
from vit_jax.experiment import dry_run, leakage
from vit_jax.experiment.evaluations import check_resumed, describe_data, describe_facts, make_evaluations
from vit_jax.multihost import preemption, processes
from vit_jax.multihost.signals import Stopped, StopSignal
from vit_jax.multihost.watchdog import Watchdog
from vit_jax.run import workdir
from vit_jax.run.accounting import Accounts, Ledger
from vit_jax.run.curves import plot_curves
from vit_jax.run.facts import RunFacts, read_facts, write_facts
from vit_jax.run.journal import MetricWriter, NonFiniteError, StepMetrics, Throughput, format_row
from vit_jax.run.profiling import Profiler
from vit_jax.run.summary import write_summary
from vit_jax.train_step import TrainState

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_CURVES = 60.0


def train(
    config: ConfigDict,
    path: workdir.AnyPath | str,
    *,
    allow_config_change: bool = False,
    allow_data_change: bool = False,
    ledger: Ledger | None = None,
    owns_process: bool = False,
) -> dict[str, Any]:
    """Trains, evaluates and saves a model; goes on where an earlier start in the same workdir ended.

    May be called from any thread, and again and again in one process. Only in the main thread do SIGTERM and Ctrl-C
    save and stop the run; docs/library.md says more about use inside another program.

    With several processes (`processes.initialize`) all must call it alike. They train and save together; the main
    process alone writes metrics and results.

    Args:
      config: see `vit_jax.config.base_config`.
      path: the workdir; see `vit_jax.run.workdir` for what is in it.
      allow_config_change: go on in the workdir of another config.
      allow_data_change: go on although the evaluation data have changed. Training data never may.
      ledger: where the time goes, from the start of the process; None: from here.
      owns_process: whether the process is the run's alone. Then signals before the first step, a step that hangs and
        the loss of a bucket's lock end the process; otherwise nothing does.

    Returns:
      The summary that is also in `summary.json`; {} in all processes but the main one.

    Raises:
      UserError: something the user can mend.
      Stopped: SIGTERM or SIGINT came to any of the processes; the state is saved.
    """
    path = workdir.parse(path)
    ledger = ledger or Ledger()
    start_time = time.perf_counter()
    is_main = processes.is_main_process()
    with StopSignal(owns_process=owns_process) as stop, contextlib.ExitStack() as cleanup:
        # The parts of the run.
        experiment = experiments.build(config)
        mesh, num_steps = experiment.mesh, experiment.num_steps
        stop.vote_over(mesh)
        cleanup.enter_context(
            workdir.opened(
                path,
                config,
                allow_config_change=allow_config_change,
                on_lost=workdir.end_process if owns_process else stop.fail,
            )
        )
        logger.info("%s", dry_run.describe_run(config, experiment))
        ends_process = owns_process or processes.process_count() > 1
        watchdog = cleanup.enter_context(Watchdog(config.watchdog_seconds, path, owns_process=ends_process))
        batches = cleanup.enter_context(contextlib.closing(experiments.make_train_batches(config, experiment)))
        evaluations = make_evaluations(
            config,
            experiment.model,
            mesh,
            experiment.eval_source,
            class_names=experiment.class_names,
            shardings=sharding.shardings_of(experiment.abstract_state.evaluated),
            before_each_batch=stop.check,
        )
        processes.check_same("data", describe_data(experiment.train_source, evaluations))
        overlap = {}
        if is_main and experiment.train_source is not None:
            trained_on = [experiment.train_source, *leakage.sources_behind(config.weights)]
            overlap = leakage.find_overlap({each.name: each.data.test for each in evaluations}, trained_on)
        train_step = experiments.make_step(config, experiment)
        checkpoints = cleanup.enter_context(Checkpoints(path / "checkpoints", keep=config.checkpoint.keep))
        best = cleanup.enter_context(Checkpoints(path / "best", keep=2))  # the one before, should the newest be dropped

        # A new state, or where an earlier start ended.
        with ledger.spent_on("restore"):
            restored = checkpoints.restore_latest(experiment.abstract_state)
        facts = describe_facts(config, experiment)
        if restored:
            step, state, saved = restored
            _check_length(step, num_steps, path)
            kept = _read_facts(path)
            same_examples = check_resumed(kept, facts, experiment, str(path), allow_change=allow_data_change)
            batches.set_state(saved["data"])
            since = step if not same_examples else kept.eval_since if kept else 0
            facts = dataclasses.replace(facts, eval_since=since)
            logger.info("resumed from the checkpoint of step %d, read in %.1f s", step, ledger.seconds()["restore"])
            if (images := batches.get_state()["images"]) != step * config.batch_size:
                epochs = (images + (num_steps - step) * config.batch_size) / experiment.num_train_images
                logger.info("the batch size was another before; at its end the run will have seen %.4g epochs", epochs)
        else:
            step, saved, same_examples = 0, {}, True
            state = experiments.init_state(config, experiment)
        experiment = dataclasses.replace(experiment, initial_params=None)  # a copy on the host, of no more use
        best.drop_after(step)
        best_accuracy = -1.0
        if same_examples:
            best_accuracy = (best.latest_extra() or {"accuracy": -1.0})["accuracy"]

        # What is measured.
        machine = describe_machine(list(mesh.devices.flat))
        throughput = Throughput(
            config.batch_size,
            machine.num_cores,
            experiment.train_flops,
            peak_flops=machine.bf16_flops,
            ledger=ledger,
        )
        accounts = Accounts(path, ledger, machine, step=step, writes=is_main)
        profiler = cleanup.enter_context(
            Profiler(
                path / "profile",
                first_step=config.profile.first_step,
                num_steps=config.profile.num_steps,
                ledger=ledger,
            )
        )
        writer = None
        if is_main:
            workdir.record_start(path, config, step=step, devices=sharding.describe_devices(mesh))
            workdir.write_atomically(path / "model.json", json.dumps(experiment.model_fields, indent=1) + "\n")
            write_facts(path, facts)
            (path / workdir.FAILURE).unlink(missing_ok=True)
            writer = cleanup.enter_context(MetricWriter(path, step=step))

        def log(step: int, metrics: dict[str, float]) -> None:
            if writer:
                writer.write(step, metrics)
            logger.info("%s", format_row(step, num_steps, metrics))

        def log_window(step: int, averages: dict[str, float]) -> None:
            log(step, {f"train/{name}": value for name, value in averages.items()} | throughput.mark(step))
            accounts.record_if_due(step)

        drawn = -math.inf  # when curves.png was
        step_metrics = StepMetrics(config.log_every_steps, log_window, state=saved.get("window"))

        # What is done now and then. To wait for outstanding steps belongs to training.
        def is_due(every_steps: int | None) -> bool:
            return step == num_steps or (every_steps is not None and step % every_steps == 0)

        def describe_position() -> dict[str, Any]:
            return {"data": position, "window": step_metrics.get_state()}

        def save() -> None:
            step_metrics.drain()  # raises rather than save what follows a loss that is not finite
            with ledger.spent_on("checkpoint"), watchdog.allow("saving a checkpoint"):
                if writer:
                    writer.flush()
                best.wait()  # or a kill could lose it for good: this evaluation would not be made again
                checkpoints.save(step, state, describe_position())
            accounts.record(step)
            throughput.restart(step)

        def wait_for_checkpoints() -> None:
            with ledger.spent_on("checkpoint"), watchdog.allow("writing checkpoints"):
                checkpoints.wait()
                best.wait()

        def evaluate() -> None:
            nonlocal best_accuracy
            due = [each for each in evaluations if is_due(each.every_steps)]
            if not due:
                return
            step_metrics.drain()
            with ledger.spent_on("evaluation"), watchdog.allow("evaluation"):
                for each in due:
                    evaluated = dict(each.evaluator.run(state))
                    log(step, {f"{each.name}/{name}": value for name, value in evaluated.items()})
                    if each.is_main and config.checkpoint.keep_best and evaluated["accuracy"] > best_accuracy:
                        best_accuracy = evaluated["accuracy"]
                        with ledger.spent_on("checkpoint"):
                            if processes.process_count() > 1:
                                checkpoints.wait()  # Orbax's threads for the two would wait at each other's barriers
                            best.save(step, state.evaluated, {"accuracy": best_accuracy})
                if step < num_steps and time.monotonic() - drawn > _SECONDS_BETWEEN_CURVES:
                    draw()
            throughput.restart(step)

        def draw() -> None:
            nonlocal drawn
            if not writer:
                return
            drawn = time.monotonic()
            with ledger.spent_on("report"):
                try:
                    writer.flush()
                    plot_curves([path], path / "curves.png")
                except Exception as error:  # no run ends over a picture
                    logger.warning("could not draw curves.png: %s: %s", type(error).__name__, error)

        # The story.
        first_step, position = step + 1, batches.get_state()
        ledger.turn_to("compile")

        def take_steps() -> None:
            nonlocal step, state, position
            metrics = None
            if step:
                evaluate()  # an earlier start may have ended in the middle of it
            while step < num_steps:
                stop.check()
                with profiler.step(step + 1):
                    with throughput.waiting_for_input(metrics):
                        batch = next(batches)
                    state, metrics = train_step(state, batch)
                del batch  # its memory can be used again before the next is there
                step, position = step + 1, batches.get_state()
                step_metrics.push(step, metrics)
                watchdog.beat(step)
                if step == first_step:
                    jax.block_until_ready(state)
                    ledger.turn_to("training")
                    accounts.record(step)
                    stop.arm()
                    cleanup.enter_context(preemption.watch(lambda _: stop.ask()))
                    logger.info("first step done %.1f s after the start", time.perf_counter() - start_time)
                    throughput.restart(step)
                if profiler.end_of_step(step, metrics):
                    throughput.restart(step)
                if is_due(config.checkpoint.every_steps):
                    save()
                evaluate()

        def end(error: Exception) -> None:
            """Does what there is to do before an error leaves."""
            if isinstance(error, workdir.LockLostError):
                return  # another process may be writing there
            if isinstance(error, NonFiniteError):
                wait_for_checkpoints()
                last_good = _last_good(checkpoints, error.step)
                saved_to = _save_in_emergency(path, step, state, describe_position())
                if is_main:
                    workdir.write_atomically(path / workdir.FAILURE, json.dumps({"reason": str(error)}) + "\n")
                raise UserError(f"{error} {last_good} {saved_to}") from error
            together = isinstance(error, Stopped) or processes.process_count() == 1
            if step < first_step or not together:
                return
            if isinstance(error, UserError | Stopped):  # nothing is wrong with the state
                save()
                wait_for_checkpoints()
                reason = f"{error}: " if isinstance(error, Stopped) else ""
                logger.info("%sthe state of step %d is saved; run the same command to go on", reason, step)
            else:
                with contextlib.suppress(Exception):  # for the metrics of the last steps
                    step_metrics.drain()
                logger.error("%s", _save_in_emergency(path, step, state, describe_position()))

        try:
            take_steps()
            wait_for_checkpoints()
            draw()
        except Exception as error:
            try:
                end(error)
            except NonFiniteError as worse:  # found by the save
                end(worse)
            raise
        finally:
            accounts.record(step)
        if not is_main:
            return {}
        seconds = time.perf_counter() - start_time
        return write_summary(
            config, path, experiment, step=step, images=position["images"], seconds=seconds, overlap=overlap
        )


def _read_facts(path: workdir.AnyPath) -> RunFacts | None:
    """What the last start recorded; None, with a warning, if that is damaged: this start records it anew."""
    try:
        return read_facts(path)
    except UserError as error:
        logger.warning("%s Whether the data have changed is not known.", error)
        return None


def _check_length(step: int, num_steps: int, path: workdir.AnyPath) -> None:
    """Refuses a run that would be shorter than it already is."""
    if step > num_steps:
        raise UserError(
            f"the run in {path} has done {step:,} steps already, more than the {num_steps:,} that it should have. Set "
            "at least as many (steps, epochs or images), or choose another --workdir for a shorter run."
        )


def _last_good(checkpoints: Checkpoints, bad_step: int) -> str:
    """Where to go on from after the loss of a step was not finite, and how."""
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


def _save_in_emergency(path: workdir.AnyPath, step: int, state: TrainState, position: dict[str, Any]) -> str:
    """Saves a state that may be bad, beside the good ones; says where, or why not. Raises nothing."""
    try:
        with Checkpoints(path / "emergency", keep=1) as emergency:
            emergency.drop_after(step - 1)  # of an earlier failure
            emergency.save(step, state, position)
            emergency.wait()
    except Exception as error:  # whatever it is, what led here matters more
        return f"The state of step {step} could not be saved for a closer look: {error}"
    return (
        f"The state of step {step} is in {path / 'emergency' / str(step)} for a closer look; moved into checkpoints/, "
        "a start goes on from it."
    )
