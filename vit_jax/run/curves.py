"""Training curves as a picture.

    python -m vit_jax.curves WORKDIR [WORKDIR...] [--output=curves.png]

Draws loss and accuracy over steps, for training (averaged over the logging window) and evaluations. Several workdirs
share one picture.
"""

import argparse
import io
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.console import print_any_text, run_command, show_name
from vit_jax.errors import UserError
from vit_jax.files import AnyPath, parse_path, write_atomically
from vit_jax.run.metrics import read_jsonl

_SAME_COLORS = 10  # number of runs after which matplotlib's colours repeat
_COLUMNS = 1100  # of the legend, in points of text over the width of the picture
_AXIS_HEIGHT = 220.0  # in points, roughly
_VALUE_HEIGHT = 11.0  # of a number beside an axis, in points
_MOST_VALUES = 18  # number of values that fit there


def plot_curves(workdirs: Sequence[AnyPath | str], output: AnyPath | str) -> None:
    """Writes a PNG with the curves of one or more runs.

    Raises:
      FileNotFoundError: a workdir without metrics.
    """
    picture = io.BytesIO()
    draw_curves(workdirs).savefig(picture, format="png", dpi=120)
    write_atomically(parse_path(output), picture.getvalue())


def draw_curves(workdirs: Sequence[AnyPath | str]) -> Any:
    """Draws the curves of one or more runs as a matplotlib figure.

    Legend and final values are outside the axes, where no curve runs.

    Raises:
      FileNotFoundError: a workdir without metrics.
    """
    import matplotlib
    from matplotlib.figure import Figure

    paths = [parse_path(each) for each in workdirs]
    many = matplotlib.colormaps["turbo"].resampled(len(paths))
    names = _distinct_names(paths)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = dict(zip(("loss", "accuracy"), figure.subplots(1, 2), strict=True))
    shown: dict[str, Any] = {}  # a line for each entry of the legend
    ends: dict[str, list[tuple[float, Any]]] = {metric: [] for metric in axes}  # last values of evaluations
    for number, path in enumerate(paths):
        rows = read_jsonl(path / "metrics.jsonl")
        if not rows:
            raise FileNotFoundError(f"no metrics in {path}; is it the --workdir of a run?")
        color = f"C{number}" if len(paths) <= _SAME_COLORS else many(number)
        for name in sorted({name for row in rows for name in row}):
            split, _, metric = name.partition("/")
            if metric not in axes or split == "time":
                continue
            steps, values = zip(*[(row["step"], row[name]) for row in rows if name in row], strict=True)
            is_train = split == "train"
            (line,) = axes[metric].plot(
                *(steps, values, "-" if is_train else "o--"), color=color, alpha=0.6 if is_train else 1, ms=4
            )
            shown.setdefault(split if len(paths) == 1 else f"{names[number]}: {split}", line)
            if not is_train:
                ends[metric] += [(values[-1], color)] if math.isfinite(values[-1]) else []
    axes["accuracy"].set_ylim(0, 1.02)
    for metric, axis in axes.items():
        axis.set(xlabel="step", ylabel=metric)
        axis.grid(alpha=0.3)
        _write_values(axis, ends[metric])
    if shown:
        _add_legend(figure, shown)
    return figure


def _distinct_names(paths: Sequence[AnyPath]) -> list[str]:
    """The last parts of the paths, as many as distinguish them."""
    for count in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [show_name(name) for name in names]


def _write_values(axis: Any, ends: Sequence[tuple[float, Any]]) -> None:
    """Writes values to the right of an axis, at their heights or as near as there is room."""
    if len(ends) > _MOST_VALUES:
        return
    low, high = axis.get_ylim()
    ends = sorted(ends, key=lambda end: end[0])
    places, free = [], 0.0
    for value, _ in ends:  # pushed up by those below, then down again by the top
        places.append(max((value - low) / (high - low) * _AXIS_HEIGHT, free))
        free = places[-1] + _VALUE_HEIGHT
    free = _AXIS_HEIGHT
    for (value, color), wanted in zip(reversed(ends), reversed(places), strict=True):
        place = min(wanted, free)
        free = place - _VALUE_HEIGHT
        axis.annotate(
            f"{value:.4g}",
            (1, place / _AXIS_HEIGHT),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
            annotation_clip=False,
        )


def _add_legend(figure: Any, shown: Mapping[str, Any]) -> None:
    """Adds a legend below the axes; the picture grows by its height."""
    # Matplotlib hides entries that begin with "_".
    labels = [f"./{label}" if label.startswith("_") else label for label in shown]
    columns = max(1, min(len(labels), round(_COLUMNS / (60 + 7 * max(map(len, labels))))))
    figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(labels) // columns))
    legend = figure.legend(shown.values(), labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="the --workdir of a run")
    parser.add_argument("--output", help="PNG to write (default: curves.png in the first workdir)")
    arguments = parser.parse_args(argv)
    print_any_text()
    try:
        output = parse_path(arguments.output) if arguments.output else parse_path(arguments.workdirs[0]) / "curves.png"
        plot_curves(arguments.workdirs, output)
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    run_command(main)
