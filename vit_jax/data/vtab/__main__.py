"""Lists VTAB's tasks and compares their examples with other people's.

python -m vit_jax.data.vtab list
python -m vit_jax.data.vtab manifest --out=vtab.json
python -m vit_jax.data.vtab manifest --tasks=dtd,pets --out=vtab.json
python -m vit_jax.data.vtab check theirs.json
python -m vit_jax.data.vtab check theirs.json ours.json

A manifest has digests of each task's thousand decoded examples: equal manifests mean the same images and labels.
"""

import argparse
import json
import pathlib
import sys

from vit_jax.console import format_table, run_command
from vit_jax.data.vtab.manifest import differences, make_manifest, read_manifest
from vit_jax.data.vtab.source import find_data
from vit_jax.data.vtab.tasks import TASKS, Task, get_task
from vit_jax.errors import UserError
from vit_jax.files import write_atomically


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the commands."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.data.vtab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | manifest | check")
    commands.add_parser("list", help="lists the tasks and which of them are prepared")
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--tasks", help="separated by commas; default: all that are prepared")
    manifest = commands.add_parser("manifest", parents=[chosen], help="writes digests of each task's thousand examples")
    manifest.add_argument("--out", type=pathlib.Path, required=True, help="the file")
    check = commands.add_parser("check", parents=[chosen], help="compares with a manifest; status 1 if they differ")
    check.add_argument("theirs", type=pathlib.Path, help="a manifest")
    check.add_argument("ours", type=pathlib.Path, nargs="?", help="another; default: the prepared examples")
    return parser


def main(arguments: list[str]) -> int:
    """Runs a command; returns the exit status."""
    args = make_parser().parse_args(arguments)
    try:
        if args.command == "list":
            return _list()
        if args.command == "manifest":
            return _manifest(_choose(args.tasks), args.out)
        return _check(args)
    except BrokenPipeError:  # for `run_command`
        raise
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _list() -> int:
    rows = []
    for task in TASKS.values():
        folder = find_data(task.data)
        rows.append([task.id, task.name, task.group, task.num_classes, task.data.name, folder.name if folder else "-"])
    headings = ("task", "in the paper", "group", "classes", "data set", "prepared")
    print(format_table(headings, rows, markdown=False))
    return 0


def _choose(names: str | None) -> list[Task]:
    if names:
        return [get_task(name) for name in names.split(",")]
    if found := [task for task in TASKS.values() if find_data(task.data)]:
        return found
    raise UserError("no data set of VTAB is prepared. Name tasks with --tasks to see how to prepare them.")


def _manifest(tasks: list[Task], out: pathlib.Path) -> int:
    if not out.parent.is_dir():  # checked before all examples are read
        raise UserError(f"cannot write {out}: there is no folder {out.parent}. Make it, or choose another --out.")
    manifest = make_manifest(tasks)
    write_atomically(out, json.dumps(manifest, indent=1) + "\n")
    for task, entry in manifest["tasks"].items():
        print(f"{task:<21} {entry['digest'][:16]}  {entry['data']}")
    print(f"{len(manifest['tasks'])} of {len(TASKS)} tasks in {out}; decoded by {manifest['decoder']}")
    return 0


def _check(args: argparse.Namespace) -> int:
    theirs = read_manifest(args.theirs)
    if args.ours:
        ours = read_manifest(args.ours)
    else:
        ours = make_manifest(task for task in _choose(args.tasks) if task.id in theirs["tasks"])
    wanted = [task.id for task in _choose(args.tasks)] if args.tasks else [*{**theirs["tasks"], **ours["tasks"]}]
    common = [task for task in wanted if task in ours["tasks"] and task in theirs["tasks"]]
    if not common:
        raise UserError(f"no task to compare with {args.theirs}, which has {', '.join(theirs['tasks']) or 'none'}.")
    lines = [line for task in common for line in differences(ours["tasks"][task], theirs["tasks"][task], task)]
    if lines and ours["decoder"] != theirs["decoder"]:
        lines.append(
            f"decoded by {ours['decoder']} here, by {theirs['decoder']} there, which alone may change a JPEG's pixels"
        )
    if left := [task for task in wanted if task not in common]:
        lines.append(f"not compared, because only one side has them: {', '.join(left)}")
    same = sum(ours["tasks"][task]["digest"] == theirs["tasks"][task]["digest"] for task in common)
    print(*lines, f"{same} of {len(common)} tasks have the same thousand examples in the same order", sep="\n")
    return 0 if same == len(common) else 1


if __name__ == "__main__":
    run_command(main)
