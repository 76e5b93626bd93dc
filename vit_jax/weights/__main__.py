"""Converts weights between formats, and looks into files.

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

from vit_jax.console import run_command
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
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 384 or 224x384 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def make_parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | inspect | convert")

    names = commands.add_parser("list", help="released checkpoints by name")
    names.add_argument("pattern", nargs="?", default="*", help="shell-style, such as 'augreg_*_384' (default: all)")

    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("source", metavar="SRC", help=_PLACE)
    source.add_argument("--model", help="what SRC should hold, such as ViT-B/16; else told by its arrays")
    source.add_argument(
        "--image_size", type=_size, help="of the images SRC was trained on, HEIGHTxWIDTH, where they were not square"
    )

    inspect = commands.add_parser(
        "inspect", parents=[source], help="names, shapes and norms, and the model that a file is believed to hold"
    )
    inspect.add_argument("--short", action="store_true", help="without the table of arrays")

    convert = commands.add_parser("convert", parents=[source], help="from any known format to another")
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
            _list(args.pattern)
            return 0
        weights = load(args.source, model=args.model, image_size=args.image_size, allow_nan=args.command == "inspect")
        if args.command == "inspect":
            if not args.short:
                _print_arrays(weights.arrays)
            _print_facts(weights)
            return 0
        weights = weights.without(*filter(None, args.drop.split(",")))
        written = save(weights, args.destination, to=args.to)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for note in weights.notes:
        print(f"note: {note}")
    print(f"{weights.spec}: {len(weights.arrays)} arrays from {args.source} ({weights.format}) to {written}")
    return 0


def _list(pattern: str) -> None:
    names = list_checkpoints(pattern)
    if not names:
        raise UserError(f"no released checkpoint matches {pattern!r}.")
    print(f"{'name':<32} {'model':<14} {'image':>5} {'classes':>7}  {'top-1 %':>7}  file")
    for name in names:
        checkpoint = get_checkpoint(name)
        accuracy = (checkpoint.published_accuracy or {}).get("imagenet2012")
        shown = f"{accuracy:.2f}" if accuracy and checkpoint.num_classes == 1000 else ""
        print(
            f"{name:<32} {checkpoint.model:<14} {checkpoint.image_size:>5} {checkpoint.num_classes:>7,}  {shown:>7}  "
            f"{checkpoint.url}"
        )


def _print_arrays(arrays: dict[str, np.ndarray]) -> None:
    width = max(len(name) for name in arrays)
    print(f"{'name':<{width}}  {'shape':<20} {'dtype':<9} {'norm':>10} {'mean':>10} {'std':>10}")
    for name, array in arrays.items():
        values = array.astype(np.float64)
        shape = "x".join(map(str, array.shape))
        print(
            f"{name:<{width}}  {shape:<20} {array.dtype!s:<9} {np.linalg.norm(values):>10.4g} {values.mean():>10.3g} "
            f"{values.std():>10.3g}"
        )
    print()


def _print_facts(weights: Weights) -> None:
    total = sum(array.size for array in weights.arrays.values())
    head = sum(array.size for name, array in weights.arrays.items() if name.startswith("head/"))
    bad = [name for name, array in weights.arrays.items() if not np.isfinite(array.astype(np.float32)).all()]
    zero_head = head and not any(array.any() for name, array in weights.arrays.items() if name == "head/kernel")
    preprocessing = weights.preprocessing
    names = weights.class_names
    rows = [
        ("model", str(weights.spec)),
        ("format", weights.format),
        ("parameters", f"{total:,}; head left out {total - head:,}"),
        (
            "images",
            f"{preprocessing.image_size[0]}x{preprocessing.image_size[1]}, {preprocessing.resize}, "
            f"{preprocessing.interpolation}, mean {preprocessing.mean}, std {preprocessing.std}",
        ),
        *([("probability", weights.probabilities)] if weights.probabilities else []),
        ("classes", ", ".join(f"{name!r}" for name in names[:3]) + ", ..." if names else "names not known"),
        *[("note", note) for note in weights.notes],
    ]
    if zero_head:
        rows.append(("note", "the head's kernel is all zeros: every image gets the same logits"))
    if bad:
        rows.append(("WARNING", f"not finite: {', '.join(bad[:5])}"))
    for key, value in rows:
        print(f"{key:<11} {value}")


if __name__ == "__main__":
    run_command(main)
