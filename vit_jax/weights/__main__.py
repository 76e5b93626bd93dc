"""Lists released weights, looks into files, and converts between formats.

python -m vit_jax.weights list 'augreg_*'
python -m vit_jax.weights inspect vit_b16_i21k_in1k_384
python -m vit_jax.weights convert augreg_b16_i21k_in1k_384 b16/ --to=huggingface
python -m vit_jax.weights convert runs/quickstart quickstart.npz
"""

import argparse
import pathlib
import re
import sys

import numpy as np

from vit_jax.console import format_table, run_command
from vit_jax.errors import UserError
from vit_jax.weights import Weights, get_checkpoint, list_checkpoints, load, save

_TO = ("vit", "bit", "axial", "big_vision", "timm", "huggingface")
_PLACE = (
    "name of a released checkpoint (see `list`), path or address (http://, https://, gs://) of a .npz or .safetensors "
    "file, folder as Hugging Face and timm publish them, or a run's --workdir"
)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 384 or 224x384 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the commands."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | inspect | convert")

    names = commands.add_parser("list", help="released checkpoints")
    names.add_argument("pattern", nargs="?", default="*", help="shell-style, such as 'augreg_*_384' (default: all)")

    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("source", metavar="SRC", help=_PLACE)
    source.add_argument("--model", help="the expected model of SRC, such as ViT-B/16 (default: any)")
    source.add_argument(
        "--image_size", type=_size, help="HEIGHTxWIDTH of the images SRC was trained on, if they were not square"
    )

    inspect = commands.add_parser("inspect", parents=[source], help="model, names, shapes and norms of the arrays")
    inspect.add_argument("--short", action="store_true", help="without the table of arrays")

    convert = commands.add_parser("convert", parents=[source], help="to another format")
    convert.add_argument(
        "destination",
        metavar="DST",
        type=pathlib.Path,
        help=".npz file; --to=timm: .safetensors file or folder; --to=huggingface: folder",
    )
    convert.add_argument("--to", choices=_TO, help="default: the released .npz layout of the model")
    convert.add_argument("--drop", default="", help="parts to leave out: head, pre_logits or head,pre_logits")
    return parser


def main(arguments: list[str]) -> int:
    """Runs a command; returns the exit status."""
    args = make_parser().parse_args(arguments)
    try:
        if args.command == "list":
            print(_list(args.pattern))
            return 0
        weights = load(args.source, model=args.model, image_size=args.image_size, allow_nan=args.command == "inspect")
        if args.command == "inspect":
            print(_describe(weights, with_arrays=not args.short))
            return 0
        weights = weights.without(*filter(None, args.drop.split(",")))
        written = save(weights, args.destination, to=args.to)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for note in weights.notes:
        print(f"note: {note}")
    print(f"{weights.spec}: {len(weights.arrays)} arrays from {args.source} ({weights.format}) to {written}")
    return 0


def _list(pattern: str) -> str:
    checkpoints = [get_checkpoint(name) for name in list_checkpoints(pattern)]
    if not checkpoints:
        raise UserError(f"no released checkpoint matches {pattern!r}.")
    rows = []
    for each in checkpoints:
        accuracy = (each.published_accuracy or {}).get("imagenet2012")
        top_1 = f"{accuracy:.2f}" if accuracy and each.num_classes == 1000 else ""
        rows.append((each.name, each.model, each.image_size, f"{each.num_classes:,}", top_1, each.url))
    return format_table(("name", "model", "image", "classes", "top-1 %", "file"), rows, markdown=False)


def _describe(weights: Weights, *, with_arrays: bool) -> str:
    arrays = weights.arrays
    total = sum(array.size for array in arrays.values())
    head = sum(array.size for name, array in arrays.items() if name.startswith("head/"))
    preprocessing, names = weights.preprocessing, weights.class_names
    height, width = preprocessing.image_size
    facts = [
        ("model", str(weights.spec)),
        ("format", weights.format),
        ("parameters", f"{total:,}; {total - head:,} without the head"),
        (
            "images",
            f"{height}x{width}, {preprocessing.resize}, {preprocessing.interpolation}, mean {preprocessing.mean}, std "
            f"{preprocessing.std}",
        ),
        *([("probability", weights.probabilities)] if weights.probabilities else []),
        ("classes", ", ".join(f"{name!r}" for name in names[:3]) + ", ..." if names else "names not known"),
        *[("note", note) for note in weights.notes],
    ]
    if head and not arrays["head/kernel"].any():
        facts.append(("note", "the head's kernel is all zeros: every image gets the same logits"))
    if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        facts.append(("WARNING", f"not finite: {', '.join(bad[:5])}"))
    lines = [f"{key:<11} {value}" for key, value in facts]
    if not with_arrays:
        return "\n".join(lines)
    rows = []
    for name, array in arrays.items():
        values = array.astype(np.float64)
        numbers = (f"{np.linalg.norm(values):.4g}", f"{values.mean():.3g}", f"{values.std():.3g}")
        rows.append((name, "x".join(map(str, array.shape)), array.dtype, *numbers))
    table = format_table(("name", "shape", "dtype", "norm", "mean", "std"), rows, num_left=3, markdown=False)
    return "\n".join([table, "", *lines])


if __name__ == "__main__":
    run_command(main)
