"""FLOPs and parameters of every model at any resolution.

    python -m vit_jax.costs.flops ViT-L/16 R50x1                  # parameters, and FLOPs for an image
    python -m vit_jax.costs.flops "ViT-B/*" --image_size=384      # patterns; another resolution
    python -m vit_jax.costs.flops R50+ViT-B/16 --parts            # by part
    python -m vit_jax.costs.flops --table6 --figure13             # beside the paper's exaFLOPs

The model is traced, not compiled, and no device is used: each product in the trace counts by its formula. A ResNet
takes up to 3 seconds. Products with embeddings of relative positions are among the attention products.

The count has matrix products and convolutions, a multiplication and its addition as 2 FLOPs: `[n, a] x [a, b]` is 2 n a
b, a convolution 2 x output positions x kernel positions x input channels x output channels, where kernel positions that
fall on padding count like any other. Not counted: biases and other additions, norms, activations, softmax, pooling, and
the standardisation of kernels, which is the same for any number of images. Training takes three times the forward pass,
because each product has two in the backward pass, for the gradients of its two factors. That is the paper's count; it
includes the gradient of the pixels, which is never computed (0.08 % of ViT-L/16).

With frozen parameters (`train_only`) only computed products count: the forward pass; the gradient of a product's input
if an earlier parameter is trained; the gradient of a kernel if it is trained. Recomputation to save memory (`remat`)
never counts, and dropout and stochastic depth save nothing: masked examples are computed.

With 303M images per epoch and without the head, this gives table 6: between 0.97 and 1.04 of the paper's exaFLOPs in
each of its 18 rows. The differences:

- The BiT ResNets are 3 to 4 % above the paper. Without the kernel positions on padding they are between 0.9 % below
  and 0.4 % above, so the paper seems to leave these out, as XLA's own count does.
- R50+ViT-L/16 is 3 % below the paper at 7 epochs, and equal at 14. Half of the paper's 1668 is 834, not its 859.
- ViT-B/32 and R50+ViT-B/32 are 2.0 and 1.5 % above the paper; we do not know why.
- A head of JFT's 18,291 classes would add 1 % to R50x1 and less to all others.
"""

import argparse
import collections
import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from vit_jax.console import Progress, format_table, run_command
from vit_jax.errors import UserError
from vit_jax.models import create_model, list_models
from vit_jax.paper import tables

TRAIN_PER_FORWARD = 3
# The first pattern found in a parameter's name, or in the module that computes a product, tells its part.
_PARTS = (
    ("MAPHead_0", "attention pooling"),
    ("conv_root|gn_root", "resnet root"),
    (r"\bblock(\d+)/unit", r"resnet block\1"),
    ("^cls$", "class token"),
    ("posembed|relative_embedding", "position embeddings"),
    (r"\bembedding", "patch embedding"),
    (r"MultiHeadDotProductAttention_1/(query|key|value|out)", "attention projections"),
    ("MultiHeadDotProductAttention_1", "attention products"),
    ("MlpBlock", "mlp"),
    ("LayerNorm|norm", "norms"),
    ("pre_logits", "pre-logits"),
    (r"\bhead", "head"),
)
# Tracing for a device that is not there asks no real one.
_MESH = AbstractMesh(
    (1,), ("none",), (AxisType.Auto,), abstract_device=AbstractDevice(device_kind="TPU", num_cores=1, platform="tpu")
)
Trained = Callable[[str], bool]  # whether a parameter is trained, by its name, such as "head/kernel"


@dataclasses.dataclass(frozen=True)
class FlopsRow:
    """FLOPs of a forward pass of one image, and parameters, of a part of a model."""

    part: str
    flops: int
    parameters: int


class _Products:
    """FLOPs of the products in a trace: of the forward pass by part, and of the whole backward pass."""

    def __init__(self) -> None:
        self.forward: collections.Counter[str] = collections.Counter()
        self.backward = 0

    def count(self, jaxpr: Any, flows: Sequence[bool], scope: str = "", times: int = 1) -> list[bool]:
        """Counts a trace that runs `times`. From which inputs need a gradient (`flows`), finds which outputs do."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # of a closed one
        needed = dict(zip(jaxpr.invars, flows, strict=True))

        def is_needed(variable: Any) -> bool:
            return not hasattr(variable, "val") and needed.get(variable, False)  # literals have a value

        for equation in jaxpr.eqns:
            given = list(map(is_needed, equation.invars))
            name, params = equation.primitive.name, equation.params
            path = f"{scope}/{equation.source_info.name_stack}"
            found = [any(given)] * len(equation.outvars)
            if name in ("dot_general", "conv_general_dilated"):
                flops = 2 * math.prod(equation.outvars[0].aval.shape) * _summed(equation) * times
                self.forward[_part(path)] += flops
                self.backward += sum(given) * flops
            elif name == "cond":  # branches that differ by platform have the same products
                found = self.count(params["branches"][0], given[1:], path, times)
            elif inner := params.get("jaxpr", params.get("call_jaxpr")):
                found = self.count(inner, given, path, times * params.get("length", 1))  # a scan has a length
            needed |= zip(equation.outvars, found, strict=True)
        return list(map(is_needed, jaxpr.outvars))


def _summed(equation: Any) -> int:
    """Number of products that are added up into an element of the result."""
    left, right = (variable.aval.shape for variable in equation.invars)
    numbers = equation.params["dimension_numbers"]
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = numbers
        return math.prod(left[axis] for axis in contracted)
    return math.prod(right) // right[numbers.rhs_spec[0]]


def _part(name: str) -> str:
    matches = ((re.search(pattern, name), part) for pattern, part in _PARTS)
    return next((match.expand(part) for match, part in matches if match), "others")


def _as_pair(image_size: int | tuple[int, int]) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else image_size


@functools.lru_cache(maxsize=1024)
def _initialisation(model: nn.Module, image_size: tuple[int, int]) -> tuple[_Products, Any]:
    """The products of the forward pass, from the trace that initialises the model, and the variables' shapes."""
    with use_abstract_mesh(_MESH):
        trace = jax.make_jaxpr(lambda images: model.init_with_output(jax.random.key(0), images), return_shape=True)
        jaxpr, (_, variables) = trace(_image(image_size))
    products = _Products()
    products.count(jaxpr.jaxpr, [False])
    return products, variables


@functools.lru_cache(maxsize=8)
def _forward_pass(model: nn.Module, image_size: tuple[int, int]) -> Any:
    """The jaxpr of the logits of an image, with the variables as its inputs."""
    with use_abstract_mesh(_MESH):
        logits = jax.make_jaxpr(lambda variables, images: model.apply(variables, images)[0])
        return logits(_initialisation(model, image_size)[1], _image(image_size)).jaxpr


def _image(image_size: tuple[int, int]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)


def _plain(model: nn.Module, scan_layers: bool) -> nn.Module:
    """The same function, computed in the way that is simplest to count; layers that are scanned are traced once."""
    options: dict[str, Any] = {"attention": "einsum", "remat": "none", "scan_layers": scan_layers}
    return model.clone(**{name: value for name, value in options.items() if hasattr(model, name)})


def _sizes(model: nn.Module, image_size: int | tuple[int, int], scan_layers: bool = True) -> dict[str, int]:
    """Sizes of the parameters by name; of scanned layers together."""
    _, variables = _initialisation(_plain(model, scan_layers), _as_pair(image_size))
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return {"/".join(entry.key for entry in path): leaf.size for path, leaf in leaves}


def _products(model: nn.Module, image_size: int | tuple[int, int], trained: Trained | None = None) -> _Products:
    products, image_size = _Products(), _as_pair(image_size)
    if trained is None:
        return _initialisation(_plain(model, scan_layers=True), image_size)[0]
    names = list(_sizes(model, image_size, scan_layers=False))  # layers that are frozen one by one are not alike
    if getattr(model, "scan_layers", False):  # all layers have one name
        names = [re.sub(r"(encoderblock)_\d+", r"\1", name) for name in names]
    jaxpr = _forward_pass(_plain(model, scan_layers=False), image_size)
    products.count(jaxpr, [*map(trained, names), False])
    return products


def count_parts(model: nn.Module, image_size: int | tuple[int, int]) -> list[FlopsRow]:
    """FLOPs and parameters of each part of a model.

    Args:
      model: as `vit_jax.models.create_model` makes it.
      image_size: in pixels; height and width, or the side of a square. Images have three channels.

    Raises:
      UserError: the model does not accept images of that size.
    """
    products = _products(model, image_size)
    parameters: collections.Counter[str] = collections.Counter()
    for name, size in _sizes(model, image_size).items():
        parameters[_part(name)] += size
    parts = dict.fromkeys([*products.forward, *parameters])
    return [FlopsRow(part, products.forward[part], parameters[part]) for part in parts]


def forward_flops(model: nn.Module, image_size: int | tuple[int, int]) -> int:
    """FLOPs of a forward pass of one image; see `count_parts`."""
    return sum(row.flops for row in count_parts(model, image_size))


def train_step_flops(model: nn.Module, image_size: int | tuple[int, int], trained: Trained | None = None) -> int:
    """FLOPs of training on one image: forward and backward; see `count_parts`.

    Args:
      model: as in `count_parts`.
      image_size: as in `count_parts`.
      trained: whether a parameter is trained, by its name, as from `optimizers.is_trained`; then only computed products
        count. None: all are, and the count is the paper's, three times the forward pass.
    """
    if trained is None:
        return TRAIN_PER_FORWARD * forward_flops(model, image_size)
    products = _products(model, image_size, trained)
    return products.forward.total() + products.backward


def train_exaflops(
    model: nn.Module, image_size: int | tuple[int, int], num_images: float, trained: Trained | None = None
) -> float:
    """10^18 FLOPs of training on a number of images, with repetitions; see `train_step_flops`."""
    return train_step_flops(model, image_size, trained) * num_images / 1e18


def parameter_count(model: nn.Module, image_size: int | tuple[int, int]) -> int:
    """Number of parameters of the model for an image size; see `count_parts`."""
    return sum(_sizes(model, image_size).values())


def pre_training_exaflops(name: str, epochs: int) -> float:
    """Counts the exaFLOPs of pre-training a model on JFT-300M, without the head."""
    model = create_model(name, num_classes=0)
    return train_exaflops(model, tables.PRE_TRAINING_SIZE, tables.JFT_IMAGES * epochs)


def table6() -> list[tuple[tables.JftScaling, float]]:
    """Each row of the paper's table 6, with the exaFLOPs by formula."""
    return [(row, pre_training_exaflops(row.model, row.epochs)) for row in tables.TABLE_6]


def figure13(epochs: int = 7) -> list[tuple[str, float | None, float, float]]:
    """Compares the models of the paper's figure 13, of which it prints no numbers.

    Args:
      epochs: of JFT-300M. The paper does not say how many; 7 are those of the same models in table 6.

    Returns:
      For each model: its name, its exaFLOPs in table 6 or None, those by formula, and the formula's divided by those of
      the counterpart without axial attention.
    """
    published = {row.model: row.exaflops for row in tables.TABLE_6 if row.epochs == epochs}
    rows: list[tuple[str, float | None, float, float]] = []
    for axial, plain in tables.FIGURE_13_COUNTERPARTS.items():
        reference = pre_training_exaflops(plain, epochs)
        for name in (plain, axial):
            ours = pre_training_exaflops(name, epochs)
            rows.append((name, published.get(name), ours, ours / reference))
    return rows


def parts_table(model: nn.Module, image_size: int | tuple[int, int]) -> str:
    """Parameters and FLOPs of each part, in a table."""
    rows = count_parts(model, image_size)
    rows.append(FlopsRow("total", sum(row.flops for row in rows), sum(row.parameters for row in rows)))
    total = rows[-1].flops
    cells = [(row.part, f"{row.parameters:,}", f"{row.flops / 1e9:.4f}", f"{row.flops / total:.1%}") for row in rows]
    return format_table(("part", "parameters", "GFLOPs", "share"), cells, markdown=False)


def models_table(names: Sequence[str], image_size: int | tuple[int, int], num_classes: int) -> str:
    """Parameters and FLOPs of models, in a table."""
    rows = []
    with Progress("count", len(names), unit="models") as progress:
        for name in names:
            model = create_model(name, num_classes=num_classes)
            headless = sum(size for each, size in _sizes(model, image_size).items() if not each.startswith("head/"))
            forward, train = forward_flops(model, image_size) / 1e9, train_step_flops(model, image_size) / 1e9
            parameters = parameter_count(model, image_size)
            rows.append((name, f"{parameters:,}", f"{headless:,}", f"{forward:,.3f}", f"{train:,.3f}"))
            progress.add()
    headings = ("model", "parameters", "without head", "GFLOPs", "GFLOPs to train")
    return format_table(headings, rows, markdown=False)


def table6_table() -> str:
    """The comparison with table 6, in a table."""
    rows = [
        (row.model, row.epochs, f"{row.exaflops:,}", f"{ours:,.1f}", f"{ours / row.exaflops:.3f}")
        for row, ours in table6()
    ]
    return format_table(("model", "epochs", "paper", "formula", "ratio"), rows, markdown=False)


def figure13_table() -> str:
    """The models of figure 13, in a table."""
    rows = [
        (name, "-" if paper is None else f"{paper:,}", f"{ours:,.1f}", f"{ratio:.2f}")
        for name, paper, ours, ratio in figure13()
    ]
    return format_table(("model", "table 6", "formula", "to counterpart"), rows, markdown=False)


def matching_models(patterns: Sequence[str], image_size: int | tuple[int, int]) -> tuple[list[str], list[str]]:
    """Names of models, and of those left out because they do not take images of that size.

    Args:
      patterns: shell-style patterns of `list_models`, or names that `create_model` takes.
      image_size: see `count_parts`.

    Raises:
      UserError: a name is unknown or of a model that does not take the images, or a pattern matches none.
    """
    names: dict[str, bool] = {}
    for pattern in patterns:
        is_pattern = any(character in pattern for character in "*?[")
        matches = list_models(pattern) if is_pattern else [pattern]
        if not matches:
            raise UserError(f"no model matches {pattern!r}. Known: {', '.join(list_models())}.")
        for name in matches:
            model = create_model(name, num_classes=0)
            try:
                if hasattr(model, "grid"):
                    model.grid(*_as_pair(image_size))
            except UserError as error:
                if not is_pattern:
                    raise UserError(f"{name}: {error}") from None
                names.setdefault(name, False)
            else:
                names[name] = True
    return [name for name, fits in names.items() if fits], [name for name, fits in names.items() if not fits]


def _image_size(text: str) -> tuple[int, int]:
    """Parses an image size of the command line."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a side, such as 224, nor height x width, such as 160x224"
        )
    return int(match[1]), int(match[2] or match[1])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.costs.flops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help='names such as R50x1, or patterns such as "ViT-L/*"')
    parser.add_argument("--image_size", type=_image_size, default=(224, 224), help="224 (the default), or 160x224")
    parser.add_argument("--num_classes", type=int, default=1000, help="width of the head (default: 1000); 0 for none")
    parser.add_argument("--parts", action="store_true", help="a table of the parts of each model")
    parser.add_argument("--table6", action="store_true", help="compare with the paper's pre-training exaFLOPs")
    parser.add_argument("--figure13", action="store_true", help="the axial models' exaFLOPs beside their counterparts'")
    arguments = parser.parse_args(argv)
    if arguments.num_classes < 0:
        parser.error(f"--num_classes={arguments.num_classes} is less than 0")
    if not (arguments.models or arguments.table6 or arguments.figure13):
        parser.error('name a model, a pattern such as "ViT-*", --table6 or --figure13')
    try:
        size, num_classes = arguments.image_size, arguments.num_classes
        names, left_out = matching_models(arguments.models, size)
        sections = []
        if names:
            sections.append(
                f"images of {size[0]} x {size[1]}, {num_classes:,} classes; FLOPs of an image, multiply-add = 2\n"
                + models_table(names, size, num_classes)
            )
        if left_out:
            sections.append(f"left out, because their patches do not tile such images: {', '.join(left_out)}")
        if arguments.parts:
            sections += [f"{name}\n" + parts_table(create_model(name, num_classes=num_classes), size) for name in names]
        if arguments.table6:
            sections.append("exaFLOPs of pre-training on JFT-300M (table 6)\n" + table6_table())
        if arguments.figure13:
            sections.append("exaFLOPs of 7 epochs of JFT-300M (the models of figure 13)\n" + figure13_table())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(sections))
    return 0


if __name__ == "__main__":
    run_command(main)
