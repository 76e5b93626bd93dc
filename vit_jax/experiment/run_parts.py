"""Builds the parts that watch, report and save a run, from the config of its experiment."""

from collections.abc import Callable

from vit_jax import sharding
from vit_jax.costs.hardware import describe_machine
from vit_jax.experiment.build import Experiment
from vit_jax.experiment.evaluations import make_evaluations, make_setup
from vit_jax.files import AnyPath
from vit_jax.multihost.watchdog import Watchdog
from vit_jax.run.accounting import Ledger
from vit_jax.run.evaluating import Evaluations
from vit_jax.run.journal import Journal, Throughput
from vit_jax.run.profiling import Profiler
from vit_jax.run.run_checkpoints import RunCheckpoints


def make_journal(experiment: Experiment, workdir: AnyPath, ledger: Ledger, *, ends_process: bool) -> Journal:
    """Makes the journal of a run; with `ends_process` a step that hangs ends the process."""
    config = experiment.config
    machine = describe_machine(list(experiment.mesh.devices.flat))
    return Journal(
        workdir,
        Throughput(ledger, experiment.batch_size, machine, experiment.train_flops),
        Watchdog(config.watchdog_seconds, workdir, owns_process=ends_process),
        Profiler(workdir / "profile", ledger=ledger, **config.profile),
        num_steps=experiment.num_steps,
        log_every_steps=config.log_every_steps,
    )


def make_checkpoints(experiment: Experiment, workdir: AnyPath, journal: Journal) -> RunCheckpoints:
    """Opens the folders of checkpoints of a run."""
    return RunCheckpoints(workdir, journal, **experiment.config.checkpoint)


def make_run_evaluations(
    experiment: Experiment, journal: Journal, checkpoints: RunCheckpoints, before_each_batch: Callable[[], None]
) -> Evaluations:
    """Makes the evaluations of a run; `before_each_batch` may raise to end one."""
    setup = make_setup(
        experiment.config,
        experiment.model,
        experiment.step.objective,
        experiment.mesh,
        experiment.class_names,
        sharding.shardings_of(experiment.step.abstract_state.evaluated),
        before_each_batch,
    )
    return Evaluations(make_evaluations(experiment.config, setup, experiment.eval_source), journal, checkpoints)
