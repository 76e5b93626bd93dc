"""The parts of a run that watch, report and save it, made from the config of its experiment."""

from vit_jax.costs.hardware import describe_machine
from vit_jax.experiment.build import Experiment
from vit_jax.files import AnyPath
from vit_jax.multihost.watchdog import Watchdog
from vit_jax.run.accounting import Ledger
from vit_jax.run.journal import Journal, Throughput
from vit_jax.run.profiling import Profiler
from vit_jax.run.run_checkpoints import RunCheckpoints


def make_journal(experiment: Experiment, workdir: AnyPath, ledger: Ledger, *, ends_process: bool) -> Journal:
    """Makes the journal of a run.

    Args:
      experiment: of the run.
      workdir: the run's folder.
      ledger: where the time of this start is entered.
      ends_process: whether a step that hangs ends the process.
    """
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
