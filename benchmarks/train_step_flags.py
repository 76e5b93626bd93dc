"""The flags of the train step benchmark."""

import argparse
import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.candidates import Settings, has_torch_and_timm
from benchmarks.matmul import MATMUL_SIZES
from vit_jax.errors import UserError, unknown_name


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to measure, as `create_model` names it; `batch` None: to be found."""

    name: str
    batch: int | None


def parse_value(text: str) -> Any:
    """`3` is an int, `0.1` a float, `true` a bool, all else a string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def parse_overrides(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """Attributes of a model from `key=value`s."""
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UserError(f"{flag}: expected key=value, got {text!r}, as in {flag} scan_layers=true.")
        if key == "dtype":
            raise UserError(f"{flag}: dtype has its own flag, which timm follows too: --dtype={value}.")
        overrides[key] = parse_value(value)
    return overrides


def parse_variants(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Variants from `NAME:key=value,key=value`s."""
    variants = {}
    for text in texts:
        name, _, rest = text.partition(":")
        if not name or not rest:
            raise UserError(f"--variant: expected NAME:key=value,key=value, got {text!r}, as in scan:scan_layers=true.")
        if name in variants:
            raise UserError(f"--variant: the name {name!r} is given twice.")
        variants[name] = parse_overrides(rest.split(","), "--variant")
    return variants


def parse_batch(text: str, flag: str) -> int | None:
    """A positive number, or None for "auto"."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{flag}: expected a positive number or 'auto', got {text!r}.")
    return int(text)


def parse_model(text: str, batch: str) -> Model:
    """A model from `name`, or `name@batch`."""
    name, at, own = text.partition("@")
    return Model(name, parse_batch(own, f"--models {text}") if at else parse_batch(batch, "--batch"))


def make_parser(description: str) -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    help_of_models = "names that create_model takes, each with its own batch if it needs one"
    add("--models", nargs="+", default=["ViT-S/16"], metavar="NAME[@BATCH]", help=help_of_models)
    help_of_batch = "images of a step; auto: doubled from 8 while memory suffices and speed grows by 3 %%"
    add("--batch", default="32", help=help_of_batch)
    add("--image_size", type=int, default=224)
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    add("--what", default="forward,train", help="forward, train, or both")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="attributes of all models")
    help_of_variant = "measure ours with these attributes as well; may be repeated"
    add("--variant", action="append", default=[], metavar="NAME:KEY=VALUE,...", help=help_of_variant)
    add("--rounds", type=int, default=7, help="turns of each candidate")
    add("--steps", default="auto", help="of a turn; auto: as many as fill a second, at least 3")
    help_of_timm = "auto: beside ours if torch and timm are installed and the device is a CPU or a GPU"
    add("--timm", choices=["auto", "never", "only"], default="auto", help=help_of_timm)
    help_of_compile = "measure timm compiled as well; MODE is torch.compile's, such as max-autotune"
    add("--torch_compile", nargs="?", const="default", metavar="MODE", help=help_of_compile)
    help_of_sizes = "of the matrix products to compare with"
    add("--matmul_sizes", type=int, nargs="+", default=list(MATMUL_SIZES), help=help_of_sizes)
    add("--json", type=pathlib.Path, help="file for all rows and facts")
    add("--tune", help=argparse.SUPPRESS)  # a process of --batch=auto: JSON [model, variant]
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Checks the flags and adds what they mean: `settings`, `overrides`, `variants`, and lists for `models` and `what`.

    Raises:
      UserError: a flag has a bad value.
    """
    for name in ("image_size", "rounds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    if min(arguments.matmul_sizes) < 1:
        raise UserError(f"--matmul_sizes must be positive, got {arguments.matmul_sizes}.")
    arguments.matmul_sizes.sort()
    arguments.what = arguments.what.split(",")
    for what in arguments.what:
        if what not in ("forward", "train"):
            raise unknown_name("task", what, ["forward", "train"])
    steps = parse_batch(arguments.steps, "--steps")
    arguments.models = [parse_model(text, arguments.batch) for text in arguments.models]
    arguments.overrides = parse_overrides(arguments.set, "--set")
    arguments.variants = parse_variants(arguments.variant)
    if arguments.timm == "only" and not has_torch_and_timm():
        raise UserError("--timm=only needs torch and timm: pip install torch timm.")
    if arguments.timm == "auto" and not has_torch_and_timm():
        arguments.timm = "never"
    arguments.settings = Settings(arguments.image_size, arguments.dtype, steps, timm_alone=arguments.timm == "only")
