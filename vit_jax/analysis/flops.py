"""FLOPs and parameters by formula, for every model at any resolution.

    python -m vit_jax.analysis.flops ViT-L/16 R50x1                  # parameters, and FLOPs for an image
    python -m vit_jax.analysis.flops "ViT-B/*" --image_size=384      # patterns; another resolution
    python -m vit_jax.analysis.flops R50+ViT-B/16 --parts            # where they are
    python -m vit_jax.analysis.flops --table6                        # beside the paper's exaFLOPs

Nothing is traced, compiled or allocated: the numbers follow from the attributes of a model and the size of the image.

Counted are matrix products and convolutions, a multiplication and its addition as 2 FLOPs: `[n, a] x [a, b]` is
2 n a b, a convolution 2 x output positions x kernel positions x input channels x output channels, where kernel
positions that fall on padding count like any other. Not counted: biases and other additions, norms, activations,
softmax, pooling, and the standardisation of kernels, which is the same for any number of images. Training takes three
times the forward pass, because each product has two in the backward pass, for the gradients of its two factors.

With 303M images an epoch and without the head that comes to table 6: between 0.97 and 1.04 of the paper's exaFLOPs in
each of its 18 rows. Of the rest we know this:

- The BiT ResNets are 3 to 4 % above the paper. Without the kernel positions that fall on padding they are between
  0.9 % below and 0.4 % above, so that the paper seems to leave these out, as XLA's own count does.
- R50+ViT-L/16 is 3 % below the paper at 7 epochs, and right at 14. The paper's 859 is not half of its 1668; 834 is.
- ViT-B/32 and R50+ViT-B/32 are 2.0 and 1.5 % above the paper; we do not know why.
- A head of JFT's 18,291 classes would add 1 % to R50x1 and less to all others.
"""

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Sequence

import flax.linen as nn

from vit_jax.errors import UserError
from vit_jax.models import create_model, list_models
from vit_jax.models.axial import AxialUnit, AxialVisionTransformer
from vit_jax.models.resnet import EXPANSION, ROOT_WIDTH, BitResNet, BitUnit, HybridUnit
from vit_jax.models.vit import VisionTransformer
from vit_jax.published import paper

CHANNELS = 3  # of an image
TRAIN_PER_FORWARD = 3


@dataclasses.dataclass(frozen=True)
class FlopsRow:
    """What a part of a model costs: FLOPs of a forward pass of one image, and parameters."""

    part: str
    flops: int
    parameters: int


class _Count:
    """Adds up FLOPs and parameters by part."""

    def __init__(self):
        self._parts: dict[str, list[int]] = {}

    def add(self, part: str, *, flops: int = 0, parameters: int = 0) -> None:
        """Adds to a part."""
        total = self._parts.setdefault(part, [0, 0])
        total[0] += flops
        total[1] += parameters

    def dense(self, part: str, positions: int, inputs: int, outputs: int, *, bias: bool = True, times: int = 1) -> None:
        """Adds `times` dense layers that are applied at so many positions.

        A convolution is one too: its inputs are what the kernel sees.
        """
        parameters = inputs * outputs + (outputs if bias else 0)
        self.add(part, flops=times * 2 * positions * inputs * outputs, parameters=times * parameters)

    def norm(self, part: str, width: int, *, times: int = 1) -> None:
        """Adds `times` layer or group norms, a scale and a bias for each channel."""
        self.add(part, parameters=times * 2 * width)

    def rows(self) -> list[FlopsRow]:
        """The parts in the order in which they came, without those that have nothing."""
        return [FlopsRow(part, *total) for part, total in self._parts.items() if any(total)]


def count_parts(model: nn.Module, image_size: int | tuple[int, int]) -> list[FlopsRow]:
    """FLOPs and parameters of each part of a model.

    Args:
      model: one of `vit_jax.models`.
      image_size: in pixels; height and width, or the side of a square. Images have three channels.

    Raises:
      UserError: the model does not take images of that size, or there is no formula for it.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    count = _Count()
    if isinstance(model, VisionTransformer):
        features = _vision_transformer(count, model, height, width)
    elif isinstance(model, AxialVisionTransformer):
        features = _axial_vision_transformer(count, model, height, width)
    elif isinstance(model, BitResNet):
        features = _bit_resnet(count, model, height, width)
    else:
        raise UserError(f"no formula for the FLOPs of a {type(model).__name__}.")
    if model.num_classes:
        count.dense("head", 1, features, model.num_classes)
    return count.rows()


def forward_flops(model: nn.Module, image_size: int | tuple[int, int]) -> int:
    """FLOPs of a forward pass of one image; see `count_parts`."""
    return sum(row.flops for row in count_parts(model, image_size))


def train_step_flops(model: nn.Module, image_size: int | tuple[int, int]) -> int:
    """FLOPs of training on one image: forward and backward; see `count_parts`."""
    return TRAIN_PER_FORWARD * forward_flops(model, image_size)


def train_exaflops(model: nn.Module, image_size: int | tuple[int, int], num_images: float) -> float:
    """10^18 FLOPs of training on so many images, each epoch counted anew; see `count_parts`."""
    return train_step_flops(model, image_size) * num_images / 1e18


def parameter_count(model: nn.Module, image_size: int | tuple[int, int]) -> int:
    """Number of parameters of the model for images of that size; see `count_parts`."""
    return sum(row.parameters for row in count_parts(model, image_size))


def table6() -> list[tuple[paper.JftScaling, float]]:
    """Each row of the paper's table 6, with the exaFLOPs by the formulas; see the head of this file."""
    return [
        (
            row,
            train_exaflops(
                create_model(row.model, num_classes=0), paper.PRE_TRAINING_SIZE, paper.JFT_IMAGES * row.epochs
            ),
        )
        for row in paper.TABLE_6
    ]


def _vision_transformer(count: _Count, model: VisionTransformer, height: int, width: int) -> int:
    """Adds a ViT or hybrid; returns the width of its representation."""
    hidden, depth = model.hidden_dim, model.num_layers
    rows, columns = model.grid(height, width)
    channels = CHANNELS
    if model.resnet is not None:
        channels = _resnet(count, HybridUnit, model.resnet, ROOT_WIDTH, height, width)
        count.norm("resnet root", ROOT_WIDTH)
    count.dense("patch embedding", rows * columns, channels * model.patch_size**2, hidden)
    tokens = rows * columns + model.num_prefix_tokens
    count.add("class token", parameters=model.num_prefix_tokens * hidden)

    kind, place = model.position_embedding, model.position_embedding_at
    if kind == "relative":
        tables = 1 if place == "shared" else depth
        _relative(count, "position embeddings", tokens, tokens, hidden, tables=tables, times=depth)
    else:
        learned = {
            "learned_1d": tokens * hidden,
            "learned_2d": columns * (hidden // 2) + rows * (hidden - hidden // 2),
        }
        tables = depth if place == "every_layer" else 1
        count.add("position embeddings", parameters=tables * learned.get(kind, 0))

    _transformer_layers(count, depth, tokens, tokens, hidden, model.mlp_dim)
    count.norm("norms", hidden)
    if model.pool == "map":
        part = "attention pooling"
        count.add(part, parameters=hidden)  # the query
        _attention(count, part, part, queries=1, keys=tokens, attended=tokens, width=hidden)
        count.norm(part, hidden)
        _mlp(count, part, 1, hidden, model.mlp_dim)
    if model.pre_logits:
        count.dense("pre-logits", 1, hidden, hidden)
    return hidden


def _axial_vision_transformer(count: _Count, model: AxialVisionTransformer, height: int, width: int) -> int:
    """Adds an Axial-ViT; returns the width of its representation."""
    hidden = model.hidden_dim
    rows, columns = model.grid(height, width)
    tokens = rows * columns
    count.dense("patch embedding", tokens, CHANNELS * model.patch_size**2, hidden)
    count.add("position embeddings", parameters=tokens * hidden)
    # One layer attends within rows, which are as long as there are columns, the next within columns.
    for length in (columns, rows):
        _transformer_layers(count, model.num_layers, tokens, length, hidden, model.mlp_dim)
    count.norm("norms", hidden)
    return hidden


def _transformer_layers(count: _Count, depth: int, tokens: int, attended: int, hidden: int, mlp_dim: int) -> None:
    """Adds Transformer layers in which each token attends to so many."""
    attention = {"queries": tokens, "keys": tokens, "attended": attended, "width": hidden, "times": depth}
    _attention(count, "attention projections", "attention products", **attention)
    _mlp(count, "mlp", tokens, hidden, mlp_dim, times=depth)
    count.norm("norms", hidden, times=2 * depth)


def _attention(
    count: _Count,
    projections: str,
    products: str,
    *,
    queries: int,
    keys: int,
    attended: int,
    width: int,
    times: int = 1,
) -> None:
    """Adds `times` layers of attention. How many heads share the width makes no difference.

    Args:
      count: what to add to.
      projections: the part that query, key, value and output projections belong to.
      products: the part that the products of queries with keys and of weights with values belong to.
      queries: how many tokens attend.
      keys: how many tokens are attended to.
      attended: how many of the keys a query attends to.
      width: of the tokens.
      times: how many layers.
    """
    count.dense(projections, queries, width, width, times=2 * times)
    count.dense(projections, keys, width, width, times=2 * times)
    count.add(products, flops=times * 2 * (2 * queries * attended * width))


def _mlp(count: _Count, part: str, tokens: int, hidden: int, mlp_dim: int, *, times: int = 1) -> None:
    """Adds `times` MLPs."""
    count.dense(part, tokens, hidden, mlp_dim, times=times)
    count.dense(part, tokens, mlp_dim, hidden, times=times)


def _relative(
    count: _Count, part: str, queries: int, attended: int, width: int, *, tables: int = 1, times: int = 1
) -> None:
    """Adds embeddings of relative positions: one for each offset, each multiplied with each query."""
    offsets = 2 * attended - 1
    count.add(part, flops=times * 2 * queries * offsets * width, parameters=tables * offsets * width)


def _bit_resnet(count: _Count, model: BitResNet, height: int, width: int) -> int:
    """Adds a BiT ResNet, or one with axial attention; returns the width of its representation."""
    if model.unit_type not in (BitUnit, AxialUnit):
        raise UserError(f"no formula for the FLOPs of a ResNet of {model.unit_type.__name__}s.")
    channels = _resnet(count, model.unit_type, model.stages, ROOT_WIDTH * model.width_factor, height, width)
    count.norm("norms", channels)
    return channels


def _resnet(
    count: _Count, unit_type: type[nn.Module], stages: Sequence[int], root_width: int, height: int, width: int
) -> int:
    """Adds the root and the stages of a ResNet; returns the number of channels of its feature map."""
    size = _halved((height, width))
    count.dense("resnet root", math.prod(size), 7 * 7 * CHANNELS, root_width, bias=False)
    size = _halved(size)  # the max-pooling
    channels = root_width
    for stage, num_units in enumerate(stages):
        unit_width = root_width * 2**stage
        for unit in range(num_units):
            strided = stage > 0 and unit == 0
            _unit(count, f"resnet block{stage + 1}", unit_type, channels, unit_width, size, strided)
            size = _halved(size) if strided else size
            channels = EXPANSION * unit_width
    return channels


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    """Size after a stride of 2: BiT's paddings and "SAME" both round odd numbers up."""
    return -(-size[0] // 2), -(-size[1] // 2)


def _unit(
    count: _Count,
    part: str,
    unit_type: type[nn.Module],
    channels: int,
    width: int,
    size: tuple[int, int],
    strided: bool,
) -> None:
    """Adds a bottleneck unit.

    Args:
      count: what to add to.
      part: what the unit belongs to.
      unit_type: `BitUnit`, `HybridUnit` or `AxialUnit`.
      channels: of the input.
      width: of the middle.
      size: of the input, rows and columns.
      strided: whether it halves the size.
    """
    outputs = EXPANSION * width
    before, after = math.prod(size), math.prod(_halved(size) if strided else size)
    projected = strided or channels != outputs
    count.dense(part, before, channels, width, bias=False)
    if unit_type is AxialUnit:
        # Within rows, then within columns, both before the size is halved.
        for length in reversed(size):
            _attention(count, part, part, queries=before, keys=before, attended=length, width=width)
            _relative(count, part, before, length, width)
    else:
        count.dense(part, after, 3 * 3 * width, width, bias=False)
    count.dense(part, after, width, outputs, bias=False)
    if projected:
        count.dense(part, after, channels, outputs, bias=False)

    count.norm(part, width, times=2)
    if unit_type is HybridUnit:
        count.norm(part, outputs, times=2 if projected else 1)  # after the last convolution, and the projection
    else:
        count.norm(part, channels)  # before the first convolution


def parts_table(model: nn.Module, image_size: int | tuple[int, int]) -> str:
    """Parameters and FLOPs of each part, in a table."""
    rows = count_parts(model, image_size)
    rows.append(FlopsRow("total", sum(row.flops for row in rows), sum(row.parameters for row in rows)))
    total = rows[-1].flops
    lines = [f"{'part':<22} {'parameters':>13} {'GFLOPs':>10} {'share':>7}"]
    lines += [
        f"{row.part:<22} {row.parameters:>13,} {row.flops / 1e9:>10.4f} {row.flops / total:>7.1%}" for row in rows
    ]
    return "\n".join(lines)


def models_table(names: Sequence[str], image_size: int | tuple[int, int], num_classes: int) -> str:
    """Parameters and FLOPs of models, in a table."""
    lines = [f"{'model':<16} {'parameters':>13} {'without head':>13} {'GFLOPs':>10} {'GFLOPs to train':>15}"]
    for name in names:
        model = create_model(name, num_classes=num_classes)
        headless = parameter_count(create_model(name, num_classes=0), image_size)
        lines.append(
            f"{name:<16} {parameter_count(model, image_size):>13,} {headless:>13,} "
            f"{forward_flops(model, image_size) / 1e9:>10.3f} {train_step_flops(model, image_size) / 1e9:>15.3f}"
        )
    return "\n".join(lines)


def table6_table() -> str:
    """The comparison with table 6, in a table."""
    lines = [f"{'model':<13} {'epochs':>6} {'paper':>6} {'formula':>8} {'ratio':>6}"]
    lines += [
        f"{row.model:<13} {row.epochs:>6} {row.exaflops:>6,} {ours:>8,.1f} {ours / row.exaflops:>6.3f}"
        for row, ours in table6()
    ]
    return "\n".join(lines)


def matching_models(patterns: Sequence[str], image_size: int | tuple[int, int]) -> tuple[list[str], list[str]]:
    """Names of models, each once, and those left out because they do not take images of that size.

    Args:
      patterns: shell-style patterns, or names, of which `create_model` takes more than `list_models` lists.
      image_size: see `count_parts`.

    Raises:
      UserError: a name of no model, or of one that does not take the images; a pattern that matches none.
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
                count_parts(model, image_size)
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
        prog="python -m vit_jax.analysis.flops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help='names such as R50x1, or patterns such as "ViT-L/*"')
    parser.add_argument("--image_size", type=_image_size, default=(224, 224), help="224 (the default), or 160x224")
    parser.add_argument("--num_classes", type=int, default=1000, help="width of the head (default: 1000); 0 for none")
    parser.add_argument("--parts", action="store_true", help="a table of the parts of each model")
    parser.add_argument("--table6", action="store_true", help="compare with the paper's pre-training exaFLOPs")
    arguments = parser.parse_args(argv)
    if arguments.num_classes < 0:
        parser.error(f"--num_classes={arguments.num_classes} is less than 0")
    if not arguments.models and not arguments.table6:
        parser.error('name a model, a pattern such as "ViT-*", or --table6')
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
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(sections))
    return 0


if __name__ == "__main__":
    sys.exit(main())
