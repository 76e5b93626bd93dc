r"""Trains, evaluates and saves a model.

    python -m vit_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

A config file may take arguments after a colon, and any of its fields can be set on the command line:

    python -m vit_jax.main --config=configs/cifar10.py:data=/data/cifar10.zip --workdir=runs/cifar10 \
        --config.optimizer.learning_rate=3e-4 --config.model.name=ViT-S/4

Look before you train: --dry_run prints the model, the data, the recipe, the learning rate over the run, and the
parameters with their weight decay. --dry_run=full adds all fields of the config, and lists every array with its
sharding. Nothing is written.

Evaluate without training: --mode=eval measures the run in --workdir, or else --config.weights (a released checkpoint,
a file, the workdir of a run), with all evaluations of the config. With --dry_run it prints weights, model and
data instead.

The same command in the same --workdir resumes exactly where the last start ended. SIGTERM and Ctrl-C save the state and
end the run with status 143 or 130; mistakes end it with status 1 and one message. vit_jax/config.py lists all fields.

On several hosts, start the same command on each, with one workdir for all. On Cloud TPU, SLURM and GKE the processes
find each other; elsewhere pass their addresses (docs/pods.md also explains each exit status to launchers):

    python -m vit_jax.main --config=... --workdir=... --coordinator_address=host0:1234 --num_processes=2 --process_id=0

VIT_JAX_RUN_TOKEN, a secret that you set to the same value on all hosts, keeps strangers out of the run.
"""

import contextlib
import errno
import logging
import os
import sys
import traceback

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from vit_jax import flags as common_flags
from vit_jax.console import lost_reader
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate, format_metrics, weights_to_evaluate
from vit_jax.experiment import build, dry_run, leakage
from vit_jax.experiment.evaluation_only import build_evaluation
from vit_jax.experiment.evaluations import make_setup, open_evaluations, tested_sources
from vit_jax.field_checks import Number
from vit_jax.files import parse_path
from vit_jax.flags import define_config, define_dry_run, report
from vit_jax.multihost import processes
from vit_jax.multihost.signals import Stopped
from vit_jax.run import summary
from vit_jax.run.accounting import Ledger, process_age
from vit_jax.run.compilation_cache import use_compilation_cache
from vit_jax.train import train

_CONFIG = define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder (or gs://bucket/folder) for checkpoints, metrics and results.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "train, or eval to only evaluate.")
_DRY_RUN = define_dry_run()
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool("allow_config_change", False, "Continue a workdir whose config differs.")
_ALLOW_DATA_CHANGE = flags.DEFINE_bool(
    "allow_data_change", False, "Evaluate on the current data although they have changed since training."
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0; the same for all processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_LOST_AFTER = flags.DEFINE_float(
    "lost_after_seconds", 60.0, "Time without a heartbeat after which a process counts as lost."
)


_SECONDS = Number(1, 10**6)


def _check_flags() -> None:
    if not _SECONDS.accepts(_LOST_AFTER.value):
        raise UserError(
            f"--lost_after_seconds must be {_SECONDS.expected}, got {_LOST_AFTER.value}. The default is "
            "--lost_after_seconds=60."
        )
    if _MODE.value == "eval":
        if not _WORKDIR.value and not _CONFIG.value.weights:
            raise UserError("nothing to evaluate: set --config.weights to a checkpoint, or --workdir to that of a run.")
    elif not _DRY_RUN.value and not _WORKDIR.value:
        raise UserError("--workdir is missing, e.g. --workdir=runs/my-run; or pass --dry_run.")


def _set_up_logging() -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout, force=True
    )
    logging.getLogger("vit_jax").setLevel(logging.INFO)
    logging.raiseExceptions = False  # a run continues without a reader (`| head`)
    # Orbax logs tracebacks of its threads through absl; the errors reach us anyway.
    absl_logging.set_verbosity(absl_logging.FATAL)


def main(_: list[str]) -> None:
    """Runs the command."""
    status = _main()
    if status:
        # Everything that can be saved is on the disk. Threads of libraries may still wait for other processes, or print
        # tracebacks because they cannot flush to a full disk.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _main() -> int:
    """Returns the exit status."""
    ledger = Ledger(start_up_seconds=process_age())
    _set_up_logging()
    use_compilation_cache()
    try:
        if _DRY_RUN.value and _MODE.value == "eval":
            _show_evaluation(_CONFIG.value)
            return 0
        if _DRY_RUN.value:
            _show_run(_CONFIG.value)
            return 0
        return _run(ledger)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and lost_reader():
            raise  # for `run_command`
        return _fail(error)


def _show_run(config: ConfigDict) -> None:
    """Prints what would be trained; warns if training and evaluation share examples."""
    built = build.build(config, allow_missing_data=True)
    make_setup(config, built.model, built.step.objective, built.mesh, built.class_names)  # checks the evaluations
    missing: dict[str, str] = {}
    evaluations = open_evaluations(config, built.eval_source, lambda name, error: missing.update({name: str(error)}))
    print(dry_run.dry_run(built, evaluations, missing, full=_DRY_RUN.value == "full"))
    leakage.find_overlap_of_run(built, evaluations)


def _show_evaluation(config: ConfigDict) -> None:
    """Prints what --mode=eval would do."""
    weights = weights_to_evaluate(config.weights, parse_path(_WORKDIR.value) if _WORKDIR.value else None)
    built = build_evaluation(config, weights, allow_missing=True)
    print(dry_run.evaluation_dry_run(config, weights, built, full=_DRY_RUN.value == "full"))
    leakage.find_overlap(tested_sources(built.evaluations), weights)


def _run(ledger: Ledger) -> int:
    processes.initialize(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, lost_after_seconds=_LOST_AFTER.value
    )
    if not processes.is_main_process():
        logging.getLogger("vit_jax").setLevel(logging.WARNING)  # all processes log the same
    if _MODE.value == "eval":
        result = evaluate(_CONFIG.value, _WORKDIR.value or None, allow_data_change=_ALLOW_DATA_CHANGE.value)
        is_main_process = processes.is_main_process()  # after the shutdown, every process is one
        processes.shutdown()
        if is_main_process:
            print(f"\n{format_metrics(result['metrics'])}\n")
        return 0
    workdir = parse_path(_WORKDIR.value or "")
    result, status = {}, 0
    try:
        result = train(
            _CONFIG.value,
            workdir,
            allow_config_change=_ALLOW_CONFIG_CHANGE.value,
            allow_data_change=_ALLOW_DATA_CHANGE.value,
            ledger=ledger,
            owns_process=True,
        )
    except Stopped as stopped:
        status = 128 + stopped.signum
    processes.shutdown()
    if result:
        print(f"\n{summary.format_summary(result)}\n")
        print(f"More in {workdir}: summary.md, curves.png, checkpoints/, tensorboard/")
    return status


def _fail(error: Exception) -> int:
    """Reports an error, to the other processes too; returns the exit status."""
    if lost := processes.lost_peer(error):
        report(lost)
        return lost.exit_status
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        error = UserError(
            f"{error}. Existing checkpoints are intact. Fix the problem and run the same command again to resume from "
            "the newest."
        )
    if isinstance(error, UserError):
        status = report(error)
        processes.announce_failure(str(error), status)
        return status
    traceback.print_exception(error)
    processes.announce_failure(f"{type(error).__name__}: {error}")
    return 1


def run() -> None:
    """Entry point of `python -m vit_jax.main`."""
    common_flags.run(main, _CONFIG, _check_flags)


if __name__ == "__main__":
    run()
