"""Training curves as a picture.

    python -m vit_jax.curves WORKDIR [WORKDIR...] [--output=curves.png]

Draws loss and accuracy over steps, for training (averaged over the logging window) and evaluations. Several workdirs
share one picture.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from vit_jax.console import print_any_text, run_command, show_name
from vit_jax.errors import UserError
from vit_jax.files import AnyPath, parse_path, write_figure
from vit_jax.run.metrics import read_jsonl

_SAME_COLORS = 10  # number of runs after which matplotlib's colours repeat
_COLUMNS = 1100  # of the legend, in points of text over the width of the picture


def plot_curves(workdirs: Sequence[AnyPath | str], output: AnyPath | str) -> None:
    """Writes a PNG with the curves of one or more runs; raises `FileNotFoundError` if one has no metrics."""
    write_figure(output, draw_curves(workdirs))


def draw_curves(workdirs: Sequence[AnyPath | str]) -> Any:
    """Draws the curves of runs as a matplotlib figure, final values in the legend; raises as `plot_curves` does."""
    import matplotlib
    from matplotlib.figure import Figure

    paths = [parse_path(each) for each in workdirs]
    many = matplotlib.colormaps["turbo"].resampled(len(paths))
    names = _distinct_names(paths)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = dict(zip(("loss", "accuracy"), figure.subplots(1, 2), strict=True))
    lines: dict[str, Any] = {}  # one for each entry of the legend
    last: dict[str, list[str]] = {}  # values of evaluations
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
            style = {"alpha": 0.6} if is_train else {"marker": "o", "linestyle": "--"}
            (line,) = axes[metric].plot(steps, values, color=color, ms=4, **style)
            label = f"{names[number]}: {split}" if len(paths) > 1 else split
            lines.setdefault(label, line)
            last.setdefault(label, []).extend([] if is_train else [f"{metric} {values[-1]:.4g}"])
    axes["accuracy"].set_ylim(0, 1.02)
    for metric, axis in axes.items():
        axis.set(xlabel="step", ylabel=metric)
        axis.grid(alpha=0.3)
    if lines:
        labels = [f"{label} ({', '.join(values)})" if values else label for label, values in last.items()]
        columns = max(1, min(len(labels), round(_COLUMNS / (60 + 7 * max(map(len, labels))))))
        figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(labels) // columns))  # for the legend
        legend = figure.legend(lines.values(), labels, loc="outside lower center", ncols=columns, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _distinct_names(paths: Sequence[AnyPath]) -> list[str]:
    """The last parts of the paths, as many as distinguish them."""
    for count in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [show_name(name) for name in names]


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
