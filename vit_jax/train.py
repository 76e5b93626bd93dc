"""The training loop."""

import contextlib
import dataclasses
import logging
from typing import Any

from ml_collections import ConfigDict

from vit_jax.experiment import build as experiments
from vit_jax.experiment import dry_run, leakage
from vit_jax.experiment.evaluations import describe_data
from vit_jax.experiment.run_parts import make_checkpoints, make_journal, make_run_evaluations
from vit_jax.experiment.run_records import describe_facts, record_result, record_start, resume
from vit_jax.files import AnyPath, parse_path
from vit_jax.multihost import processes
from vit_jax.multihost.signals import StopSignal
from vit_jax.run import workdir
from vit_jax.run.accounting import Ledger

logger = logging.getLogger(__name__)


def train(
    config: ConfigDict,
    path: AnyPath | str,
    *,
    allow_config_change: bool = False,
    allow_data_change: bool = False,
    ledger: Ledger | None = None,
    owns_process: bool = False,
) -> dict[str, Any]:
    """Trains, evaluates and saves a model; resumes exactly where an earlier start in the same workdir ended.

    May be called from any thread, and repeatedly in one process. SIGTERM and Ctrl-C save and stop the run only in the
    main thread; docs/library.md says more about use inside another program. With several processes
    (`processes.initialize`), all must call it with the same arguments. The main process writes metrics and results.

    Args:
      config: see `vit_jax.config.base_config`.
      path: the workdir; `vit_jax.run.workdir` lists its files.
      allow_config_change: continue a workdir whose config differs.
      allow_data_change: continue although the evaluation data have changed. Training data must stay the same.
      ledger: records how the time is spent, from the start of the process; None: from this call.
      owns_process: whether the process exists for this run alone. If so, a signal before the first step, a step that
        hangs, or a lost lock in a bucket ends the process.

    Returns:
      The content of `summary.json`; {} in all processes but the main one.

    Raises:
      UserError: something the user can fix.
      Stopped: any of the processes got SIGTERM or SIGINT; the state is saved.
    """
    path, ledger = parse_path(path), ledger or Ledger()
    with contextlib.ExitStack() as cleanup:
        # Build the experiment.
        stop = cleanup.enter_context(StopSignal(owns_process=owns_process))
        experiment = experiments.build(config)
        stop.vote_over(experiment.mesh)

        # Open the workdir.
        on_lost = workdir.end_process if owns_process else stop.fail
        cleanup.enter_context(workdir.opened(path, config, allow_config_change=allow_config_change, on_lost=on_lost))
        logger.info("%s", dry_run.describe_run(experiment))
        ends_process = owns_process or processes.process_count() > 1
        journal = cleanup.enter_context(make_journal(experiment, path, ledger, ends_process=ends_process))
        checkpoints = cleanup.enter_context(make_checkpoints(experiment, path, journal))
        batches = cleanup.enter_context(contextlib.closing(experiment.make_train_batches()))
        evaluations = make_run_evaluations(experiment, journal, checkpoints, stop.check)
        processes.check_same("data", describe_data(experiment.train_source, evaluations))
        overlap = leakage.find_overlap_of_run(experiment, evaluations)

        # Restore, or initialise.
        restored = checkpoints.restore(experiment.step.abstract_state)
        if restored:
            step, state, saved = restored
            facts = resume(experiment, batches, path, step, saved["data"], allow_data_change=allow_data_change)
            logger.info("resumed from the checkpoint of step %d, read in %.1f s", step, ledger.seconds()["restore"])
        else:
            step, state, saved = 0, experiment.init_state(), {}
            facts = describe_facts(experiment)
        experiment = dataclasses.replace(experiment, initial_params=None)  # frees the copy on the host
        record_start(experiment, path, step, facts)
        checkpoints.start(step, same_examples_since=facts.eval_since)
        journal.start(step, saved.get("window"))
        position = batches.get_state()

        # Train.
        try:
            if step:
                evaluations.run_if_due(step, state)  # an earlier start may not have finished it
            for batch in journal.timed(batches):
                stop.check()
                state, metrics = experiment.step(state, batch)
                del batch  # its memory is free before the next one arrives
                step, position = step + 1, batches.get_state()
                journal.end_step(step, metrics)
                stop.arm()  # from now on, a signal saves the state
                checkpoints.save_if_due(step, state, position)
                evaluations.run_if_due(step, state)
            checkpoints.wait()
            journal.finish()
        except Exception as error:
            checkpoints.rescue(error, step, state, position)
            raise
        seconds, images = ledger.total_seconds(), position["images"]
        return record_result(experiment, path, step, images=images, overlap=overlap, seconds=seconds)
