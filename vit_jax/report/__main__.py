r"""Compares the results of runs with the paper's.

    python -m vit_jax.report runs/ sweeps/                  # prints tables
    python -m vit_jax.report runs/ sweeps/ --out=report/    # writes them too, and pictures

Finds runs, evaluations (--mode=eval) and sweeps in the folders and below. Prints a line for each setting that has a
result, then those of the paper's tables that have numbers of ours, then all that was found.
A table has the paper's number, ours (mean and standard deviation over seeds) and the difference; notes below it list
the differences from the paper. Folders without results are listed with the reason.

--out writes report.md, a CSV file for each table, and the figures as PNG. docs/report.md shows how it looks.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vit_jax.console import run_command, show_name
from vit_jax.errors import UserError
from vit_jax.files import AnyPath, is_remote, parse_path, write_atomically, write_figure
from vit_jax.flags import report as report_error
from vit_jax.report import figures, model_pictures
from vit_jax.report.collect import FoundRuns, find
from vit_jax.report.figure_tables import figure_tables
from vit_jax.report.hardware_figures import draw_hardware, hardware_tables
from vit_jax.report.listings import results_table, runs_table
from vit_jax.report.markdown import Listing, Table
from vit_jax.report.paper_tables import paper_tables
from vit_jax.report.pretrained import PreTrained, pre_trained_models
from vit_jax.report.studies import Comparison, find_comparisons, study_tables
from vit_jax.report.subjects import Subject, find_subjects

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_IMAGES = "file, folder or pattern of images, for figures 10 and 11 with --out; may be given several times"


def make_report(
    found: FoundRuns, out: AnyPath | None = None, *, show_all: bool = False, images: Sequence[str] = ()
) -> str:
    """Makes the report as markdown; also writes it to the folder `out`, with CSV files and pictures.

    `show_all` includes the paper's tables and pictures without numbers of ours. `images` are files, folders or patterns
    of images for figure 11.

    Raises:
      UserError: the folder cannot be written, or there are no images.
    """
    models, subjects = pre_trained_models(found.models), find_subjects(found.models)
    compared = find_comparisons(subjects)
    tables: list[Table | Listing] = [results_table(found.models)]
    of_paper = [*paper_tables(found.models, models), *figure_tables(models), *study_tables(compared)]
    of_paper += hardware_tables(found.hardware)
    tables += [table for table in sorted(of_paper, key=_order) if table.has_ours or show_all]
    tables.append(runs_table(found.models))
    sections = [table.to_markdown() for table in tables if table.rows]
    if found.left_out:
        sections.append("\n".join(["## Left out", "", *(f"- {line}" for line in found.left_out), ""]))
    if out is not None:
        try:
            if not is_remote(out):
                out.mkdir(parents=True, exist_ok=True)
            for table in filter(lambda each: each.rows, tables):
                write_atomically(out / f"{table.name}.csv", table.to_csv())
            sections += _write_pictures(found, models, subjects, compared, out, show_all=show_all, images=images)
            write_atomically(out / "report.md", "\n".join(["# Report", "", *sections]))
        except OSError as error:
            raise UserError(f"cannot write to {out}: {error.strerror or error}. Choose another --out.") from error
    return "\n".join(sections)


def _write_pictures(
    found: FoundRuns,
    models: Sequence[PreTrained],
    subjects: Sequence[Subject],
    compared: Sequence[Comparison],
    out: AnyPath,
    *,
    show_all: bool,
    images: Sequence[str],
) -> list[str]:
    """Writes the pictures, and returns their sections of the report in the order of the paper."""
    drawn = figures.draw_all(models, compared, show_all=show_all)
    if (speeds := draw_hardware(found.hardware)) is not None:
        drawn["figure_12"] = ("Figure 12: speed and largest batch by image size", speeds)
    texts = dict.fromkeys(drawn, "Notes on our numbers are below the tables.")
    titles = {name: title for name, (title, _) in drawn.items()}
    own, model_texts, model_titles = _pictures_of_models(subjects, compared, images)
    drawn |= {name: (model_titles[name], figure) for name, figure in own.items()}
    texts |= model_texts
    titles |= model_titles
    sections = []
    for name in sorted(texts, key=lambda name: (int(name.split("_")[1]), name)):
        picture = []
        if name in drawn:
            write_figure(out / f"{name}.png", drawn[name][1])
            picture = [f"![{titles[name]}]({name}.png)", ""]
        sections.append("\n".join([f"## {titles[name]}", "", *picture, texts[name], ""]))
    return sections


def _pictures_of_models(
    subjects: Sequence[Subject], compared: Sequence[Comparison], images: Sequence[str]
) -> "tuple[dict[str, Figure], dict[str, str], dict[str, str]]":
    """Draws figures 10 and 11 from the parameters of runs; returns figures, texts and titles by name.

    Parameters may be large. They are read only for the runs of figure 10's page, or if images ask for it.
    """
    networks = model_pictures.networks_of(compared, subjects, "figure_10")
    studied = [each for each in compared if each.study.name == "figure_10"]
    is_page = any(member.model.study == "figure_10" for each in studied for member in each.members)
    how = "Needs parameters{}: add --images=FOLDER, or use `python -m vit_jax.analysis {} --weights={}{}`."
    texts, drawn = {}, {}
    if studied:
        weights = " --weights=".join(folder for folder, _ in networks)
        texts = {"figure_10": how.format("", "positions", weights, "")}
        texts["figure_11"] = how.format(" and images", "distance", networks[0][0], " IMAGE...")
    found = {}
    if networks and (images or is_page):
        found["figure_10"] = model_pictures.draw_figure_10(networks)
    if networks and images:
        found["figure_11"] = model_pictures.draw_figure_11(networks, images)
    for name, (figure, problems) in found.items():
        lines = [f"- Not drawn: {show_name(line)}" for line in problems]
        if figure is not None:
            drawn[name] = figure
            lines.insert(0, "The paper has pictures without numbers.")
        texts[name] = "\n".join(lines)
    return drawn, texts, {name: model_pictures.TITLES[name] for name in texts}


def _order(table: Table) -> tuple[bool, int, str]:
    """Tables come first, figures second, each in the order of the paper."""
    found = re.match(r"(table|figure)_(\d+)", table.name)
    return (table.name.startswith("figure"), int(found[2]) if found else 99, table.name)


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="workdirs of runs or sweeps, or folders of them")
    parser.add_argument("--out", metavar="FOLDER", help="where to write report.md, CSV files and pictures")
    parser.add_argument("--images", action="append", default=[], metavar="IMAGE", help=_IMAGES)
    parser.add_argument("--all", action="store_true", help="include the paper's tables without numbers of ours")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = make_parser().parse_args(arguments)
    try:
        out = parse_path(args.out) if args.out else None
        if args.images and out is None:
            raise UserError("--images are for pictures; give --out=FOLDER too.")
        print(make_report(find(args.workdirs), out, show_all=args.all, images=args.images))
        if out is not None:
            print(f"Written to {out}: report.md, and each table and picture as a file.")
        sys.stdout.flush()
    except BrokenPipeError:  # for `run_command`
        raise
    except (UserError, OSError) as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    run_command(main)
