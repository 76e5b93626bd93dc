r"""Draws the paper's pictures of a model.

    python -m vit_jax.analysis filters   --weights=vit_l32_i21k                  # figure 7, left
    python -m vit_jax.analysis positions --weights=vit_l32_i21k                  # figure 7, centre; figure 10
    python -m vit_jax.analysis distance  --weights=vit_l16_i21k photos/          # figure 7, right; figure 11
    python -m vit_jax.analysis rollout   --weights=vit_l16_i21k cat.jpg dog.jpg  # figures 6 and 14
    python -m vit_jax.analysis masked    --weights=runs/masked photos/           # masked patch prediction (B.1.2)

The weights are those of any ViT or hybrid: a released name, a run's workdir, or a file. A subcommand writes one PNG,
`filters.png` and so on, or --output. Unreadable images are reported and skipped; the exit status is then 1.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

from vit_jax.analysis import attention_distance, filters, masked_predictions, position_similarity, rollout
from vit_jax.analysis.picture_flags import check_output
from vit_jax.console import print_any_text, run_command
from vit_jax.errors import UserError
from vit_jax.run.compilation_cache import use_compilation_cache


@dataclasses.dataclass(frozen=True)
class Picture:
    """A subcommand.

    Attributes:
      help: what it draws.
      add_arguments: adds its flags to a parser; --output is there already.
      run: draws the picture, given the parsed flags, and returns the exit status. It may raise `UserError`.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


PICTURES = {
    "filters": Picture(
        "principal components of the first embedding's filters (figure 7, left)", filters.add_arguments, filters.run
    ),
    "positions": Picture(
        "similarity of position embeddings (figure 7, centre, and figure 10)",
        position_similarity.add_arguments,
        position_similarity.run,
    ),
    "distance": Picture(
        "mean attention distance of each head, in pixels (figure 7, right, and figure 11)",
        attention_distance.add_arguments,
        attention_distance.run,
    ),
    "rollout": Picture("attention rollout over images (figures 6 and 14)", rollout.add_arguments, rollout.run),
    "masked": Picture(
        "prediction of corrupted patches (masked patch prediction, appendix B.1.2)",
        masked_predictions.add_arguments,
        masked_predictions.run,
    ),
}


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.analysis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")
    for name, picture in PICTURES.items():
        subparser = subparsers.add_parser(name, help=picture.help, description=f"Draws the {picture.help}.")
        picture.add_arguments(subparser)
        output = f"{name}.png"
        subparser.add_argument("--output", default=output, help=f"PNG to write (default: {output})")
    args = parser.parse_args(arguments)
    print_any_text()
    try:
        check_output(args.output)
        use_compilation_cache()
        return PICTURES[args.picture].run(args)
    except BrokenPipeError:  # for `run_command`
        raise
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run_command(main)
