r"""Runs a config with several values, chooses the best on a validation part, and repeats the final run over seeds.

    python -m vit_jax.sweep --config=configs/quickstart.py --workdir=sweeps/quickstart \
        --config.data.train_split='train[:90%]' --config.data.eval_split='train[90%:]' \
        --grid=optimizer.learning_rate=0.001,0.003,0.01 --final=data.train_split=train,data.eval_split=test --seeds=3

--grid may be given several times, once a field: every combination is tried. A config file that defines get_sweep beside
get_config needs --config and --workdir alone; docs/sweeps.md shows how. --config.<field>=<value> is for all runs, as in
training.

Each run is one of `python -m vit_jax.main`, in a process and a workdir of its own. The same command resumes a sweep:
finished runs stay, others resume from their checkpoints, and the grid may have grown. A run that diverges or fails is
listed in the table, and the others continue; the next start tries those again that failed without having diverged.

For many machines, --print_commands prints the commands that can be run now, independent of each other: first those that
choose, then those of the final runs. --collect runs nothing, and reports what is there.

The results are in sweep.json and sweep.md. Exit status: 0 if all runs are there that the result needs, 1 if not or for
a mistake, 143 or 130 when ended by SIGTERM or Ctrl-C.
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence

from vit_jax.console import run_command
from vit_jax.data.sources import MissingDataError, find_path
from vit_jax.errors import UserError
from vit_jax.experiment.data import open_data, training_data_sets
from vit_jax.files import AnyPath, is_remote, parse_path, write_atomically
from vit_jax.flags import report
from vit_jax.json_files import read_object
from vit_jax.multihost.signals import Stopped
from vit_jax.run.workdir import FAILURE, locked
from vit_jax.sweep import Sweep, results
from vit_jax.sweep.spec import parse_final, parse_grid
from vit_jax.sweep.subprocesses import Children, FailedRunError
from vit_jax.sweep.trials import SweepRun, SweepTask, call, field_of, load_module, make_tasks, sweeps_of

logger = logging.getLogger("vit_jax.sweep")  # also as a command

_DESCRIPTION = "sweep_config.json"


def run_sweep(tasks: Sequence[SweepTask], path: AnyPath, train: Callable[[SweepRun], None]) -> list[results.TaskResult]:
    """Trains what is missing, writes `sweep.json` and `sweep.md`, and returns a result for each task.

    `train` trains a run in its workdir, and raises `FailedRunError` if it fails. Raises `UserError` if there is no such
    metric, or the folder cannot be written, and `Stopped` by a signal.
    """

    def train_all(runs: Sequence[SweepRun]) -> None:
        due = [run for run in runs if run.read().is_due]
        for number, run in enumerate(due, 1):
            logger.info("[%d/%d] %s", number, len(due), run.path)
            (run.path / FAILURE).unlink(missing_ok=True)
            try:
                train(run)
            except FailedRunError as error:
                logger.info("[%d/%d] failed: %s", number, len(due), error)
                run.record_failure(str(error))
            run.check_metric()  # after the first run rather than after all of them

    tasks = results.begin(tasks)
    with locked(path):
        remember(tasks, path)
        try:
            for number in range(len(tasks)):
                if tasks[number].is_waiting:
                    tasks = results.begin(tasks)  # by now the tasks before it have chosen, or never will
                    remember(tasks, path)
                task = tasks[number]
                train_all(task.trials)
                if (chosen := results.collect(task).chosen) is not None:
                    train_all(task.final_runs(chosen))
        finally:
            collected = _write_results(tasks, path)
    return collected


def check_data(tasks: Sequence[SweepTask]) -> None:
    """Raises `MissingDataError` if a sweep has runs to train, and none of its tasks has its training data here."""
    for sweep in sweeps_of(tasks):
        open_tasks = [task for task in tasks if task.sweep is sweep and not results.collect(task).is_complete]
        missing = [_missing_data(task) for task in open_tasks]
        if missing and all(missing):
            raise missing[0] or UserError("the training data are missing.")


def _missing_data(task: SweepTask) -> MissingDataError | None:
    data = task.base.data
    for dataset, _ in training_data_sets(data):
        if find_path(dataset) is None:  # such as "digits", which has no path, or missing
            try:
                open_data(data, dataset, data.train_split)
            except MissingDataError as error:
                return error
    return None


def _write_results(tasks: Sequence[SweepTask], path: AnyPath) -> list[results.TaskResult]:
    collected = [results.collect(task) for task in results.begin(tasks)]
    results.write(collected, path)
    return collected


def remember(tasks: Sequence[SweepTask], path: AnyPath) -> None:
    """Records what the sweep tries; raises `UserError` if the folder has runs of anything else."""
    _check_folder(tasks, path)
    tried = {str(run.path.relative_to(path)): run.overrides for task in tasks for run in task.trials}
    file = path / _DESCRIPTION
    before = read_object(file).get("tried", {}) if file.exists() else {}
    # Runs that began with weights of values that are no longer chosen, or not yet again, stay in their folder.
    others = {folder: values for folder, values in before.items() if _begins_otherwise(path / folder, tasks)}
    tried = others | tried
    if lost := [f"  {folder}" for folder in before if folder not in tried and (path / folder).exists()]:
        raise UserError(
            f"{path} has runs of a sweep that tried more; they would be left out:\n"
            + "\n".join(lost)
            + "\nA grid may grow: add their values to it; or choose another --workdir, or remove these folders."
        )
    *earlier, sweep = [dataclasses.asdict(each) for each in sweeps_of(tasks)]
    before_it = {"earlier": earlier} if earlier else {}
    content = {
        "config": [task.place for task in tasks],
        "arguments": tasks[0].arguments,
        **sweep,
        **before_it,
        "tried": tried,
    }
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(content, indent=2) + "\n")


def _begins_otherwise(run: AnyPath, tasks: Sequence[SweepTask]) -> bool:
    """Whether a run is in the folder of a task that begins with weights, but not among its present runs."""
    for task in tasks:
        if task.before is None:
            continue
        own = task.path if task.is_waiting or not task.before.trials else task.path.parent
        if own in run.parents:
            return task.is_waiting or task.path not in run.parents
    return False


def _check_folder(tasks: Sequence[SweepTask], path: AnyPath) -> None:
    """Checks that a sweep's runs do not mix with a run's files or another sweep's runs; raises `UserError` if they do.

    A sweep may be in the folder of another one, beside its runs.
    """
    if (path / "starts.jsonl").exists():
        raise UserError(f"{path} is the workdir of a run. Choose another --workdir for the sweep.")
    for task in tasks:
        if task.path != path and (task.path / _DESCRIPTION).exists():
            raise UserError(
                f"{task.path}, where the runs of {task.name} would be, is the folder of another sweep. Choose another "
                "--workdir."
            )
    for parent in () if is_remote(path) else path.absolute().parents:
        if (file := parent / _DESCRIPTION).exists():
            own = {folder.split("/")[0] for folder in ("final", *read_object(file).get("tried", {}))}
            if path.absolute().relative_to(parent).parts[0] in own:
                raise UserError(
                    f"{path} is where the sweep in {parent} has its own runs. Choose a folder beside them as --workdir."
                )


def make_sweep(args: argparse.Namespace) -> list[Sweep]:
    """Returns the config file's sweeps, with the flags' changes; raises `UserError` if there is nothing to do.

    Of several sweeps, the flags change the last, and --seeds also those before it that have more than one seed.
    """
    module = load_module(args.config)
    described = call(module, "get_sweep", args.config) if hasattr(module, "get_sweep") else None
    if described is None and not args.grid and args.seeds is None:
        raise UserError(
            f"there is nothing to sweep over: {args.config} defines no get_sweep. Give --grid, for example "
            "--grid=optimizer.learning_rate=0.003,0.01, or --seeds=3 to repeat the run."
        )
    given = {
        "seeds": args.seeds,
        "metric": args.metric,
        "choose": parse_grid(args.grid) if args.grid else None,
        "final": None if args.final is None else parse_final(args.final),
    }
    changes = {name: value for name, value in given.items() if value is not None}
    *earlier, last = [described or Sweep()] if isinstance(described, Sweep | None) else described
    seeds = changes.get("seeds")
    if seeds is not None:
        earlier = [each if each.seeds == 1 else dataclasses.replace(each, seeds=max(seeds, 1)) for each in earlier]
    return [*earlier, dataclasses.replace(last, **changes)]


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the arguments, without --config.<field>."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="config file, such as configs/quickstart.py")
    parser.add_argument("--workdir", required=True, help="folder (or gs://bucket/folder) of the sweep")
    parser.add_argument("--grid", action="append", metavar="FIELD=VALUE,VALUE,...", help="values to choose from")
    parser.add_argument("--final", metavar="FIELD=VALUE,FIELD=VALUE,...", help="fields of the final runs")
    parser.add_argument("--seeds", type=int, help="final runs (default: 3); 0 to only choose")
    parser.add_argument("--metric", help="metric for choosing (default: accuracy, on the evaluation split)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--print_commands", action="store_true", help="print the commands that can be run now")
    action.add_argument("--collect", action="store_true", help="report existing results, run nothing")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    args, fields = make_parser().parse_known_args(arguments)
    try:
        for field in fields:
            field_of(field)
        path = parse_path(args.workdir)
        tasks = make_tasks(make_sweep(args), args.config, fields, path)
        if args.print_commands:
            tasks = results.begin(tasks)
            remember(tasks, path)
            for result in map(results.collect, tasks):
                for run in result.due:
                    print(run.command_line())
            return 0
        if args.collect:
            tasks = results.begin(tasks)
            remember(tasks, path)
            collected = _write_results(tasks, path)
        else:
            check_data(tasks)
            with Children() as children:
                collected = run_sweep(tasks, path, children.train)
        return _print_results(collected, path)
    except BrokenPipeError:  # for `run_command`
        raise
    except Stopped as stopped:
        logger.info("%s: run the same command to resume", stopped)
        return 128 + stopped.signum
    except (UserError, OSError) as error:
        return report(error)


def _print_results(collected: Sequence[results.TaskResult], path: AnyPath) -> int:
    """Prints the tables and the commands of missing runs; returns the exit status."""
    print(f"\n{results.to_markdown(collected)}")
    print(f"More in {path}: sweep.md, sweep.json, and a folder for each run. {_describe_space(collected)}".rstrip())
    due = [run.command_line() for result in collected for run in result.due]
    if due:
        print("\nStill to be run, here by the same command again, or anywhere by:", *due, sep="\n  ")
    sys.stdout.flush()
    incomplete = [result for result in collected if not result.is_complete]
    if not incomplete:
        return 0
    if num_due := sum(len(result.due) for result in incomplete):
        hint = f"{num_due} run{'s' * (num_due > 1)} can be run now"
    else:
        runs = [run for result in incomplete for run in (*result.trials, *result.final)]
        lost = ", ".join(str(each.run.path) for each in runs if each.status in ("diverged", "unusable"))
        hint = f"runs that diverged, or are unusable, are not tried again unless their folders are removed: {lost}"
    return report(UserError(f"incomplete: {', '.join(result.task.name for result in incomplete)}; {hint}."))


def _describe_space(collected: Sequence[results.TaskResult]) -> str:
    """Says how much disk space the parameters and states of trials take."""
    paths = [trial.run.path for result in collected for trial in result.trials if not is_remote(trial.run.path)]
    folders = [path / name for path in paths for name in ("checkpoints", "best", "emergency")]
    total = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    return f"Checkpoints of the trials take {total / 1e6:,.1f} MB; without them, their results stay." if total else ""


if __name__ == "__main__":
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout, force=True
    )
    logging.getLogger("vit_jax").setLevel(logging.INFO)
    run_command(main)
