"""Training curves as a picture.

    python -m vit_jax.curves WORKDIR [WORKDIR...] [--output=curves.png]

Draws loss and accuracy over steps, of training (averaged over the logging window) and of evaluations. Several workdirs
come into one picture.
"""

import argparse
import io
import sys
from collections.abc import Sequence

from vit_jax.errors import UserError
from vit_jax.metrics import read_jsonl
from vit_jax.workdir import AnyPath, parse, write_atomically


def plot_curves(workdirs: Sequence[AnyPath], output: AnyPath) -> None:
    """Writes a PNG with the curves of one or more runs.

    Raises:
      FileNotFoundError: a workdir without metrics.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for number, workdir in enumerate(workdirs):
        rows = read_jsonl(workdir / "metrics.jsonl")
        if not rows:
            raise FileNotFoundError(f"no metrics in {workdir}; is it the --workdir of a run?")
        color = f"C{number}"
        names = sorted({name for row in rows for name in row})
        for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
            for name in names:
                split, _, rest = name.partition("/")
                if rest != metric or split == "time":
                    continue
                steps, values = zip(*[(row["step"], row[name]) for row in rows if name in row], strict=True)
                label = split if len(workdirs) == 1 else f"{workdir.name}: {split}"
                style = "-" if split == "train" else "o--"
                axis.plot(steps, values, style, color=color, alpha=0.6 if split == "train" else 1, ms=4, label=label)
                if split != "train":
                    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": color, "linewidth": 0.6}
                    axis.annotate(
                        f"{values[-1]:.4g}",
                        (steps[-1], values[-1]),
                        xytext=(0, 10 if metric == "loss" else -16),
                        textcoords="offset points",
                        ha="right",
                        fontsize=9,
                        color=color,
                        bbox=box,
                    )
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
        axis.set(xlabel="step", ylabel=metric)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(loc="upper right" if metric == "loss" else "lower right")  # "best" is slow with many points
    axes[1].set_ylim(0, 1.02)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(output, picture.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="the --workdir of a run")
    parser.add_argument("--output", help="PNG to write (default: curves.png in the first workdir)")
    arguments = parser.parse_args(argv)
    try:
        workdirs = [parse(each) for each in arguments.workdirs]
        output = parse(arguments.output) if arguments.output else workdirs[0] / "curves.png"
        plot_curves(workdirs, output)
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
