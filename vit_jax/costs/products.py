"""Counts the matrix products of a model, from the pixels to the logits, and those of its backward pass.

The docstring of `flops` defines the count. Functions follow the modules of `vit_jax.models` by parameter names, so that
the backward pass can leave out gradients that frozen parameters do not need.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.errors import UserError
from vit_jax.models.axial import AxialUnit, AxialVisionTransformer
from vit_jax.models.resnet import EXPANSION, ROOT_WIDTH, BitResNet, BitUnit, HybridUnit
from vit_jax.models.vit import VisionTransformer

CHANNELS = 3  # of an image


@dataclasses.dataclass(frozen=True)
class FlopsRow:
    """FLOPs of a forward pass of one image, and parameters, of a part of a model."""

    part: str
    flops: int
    parameters: int


Trained = Callable[[str], bool]  # whether a parameter is trained, by its name, such as "head/kernel"


class Count:
    """Adds up FLOPs and parameters by part, from the pixels to the logits, and the FLOPs of the backward pass.

    Attributes:
      flows: whether the current activations need a gradient, because an earlier parameter is trained.
      backward: FLOPs of the backward pass so far.
    """

    def __init__(self, trained: Trained):
        self._parts: dict[str, list[int]] = {}
        self.trained = trained
        self.flows = False
        self.backward = 0

    def add(self, part: str, *, flops: int = 0, parameters: int = 0, times_backward: int = 0) -> None:
        """Adds to a part. The backward pass has `times_backward` products of the same size."""
        total = self._parts.setdefault(part, [0, 0])
        total[0] += flops
        total[1] += parameters
        self.backward += times_backward * flops

    def array(self, part: str, parameters: int, *names: str) -> None:
        """Adds an array that the model adds to its tokens."""
        self.add(part, parameters=parameters)
        self.flows |= any(map(self.trained, names))

    def dense(
        self, part: str, positions: int, inputs: int, outputs: int, name: str, *, bias: bool = True, flows: bool
    ) -> bool:
        """Adds a dense layer, or a convolution, whose inputs are then all values under the kernel.

        Args:
          part: where to add it.
          positions: number of positions that it is applied to.
          inputs: width of its input.
          outputs: width of its output.
          name: name of the layer, such as "head".
          bias: whether it has one.
          flows: whether its input needs a gradient.

        Returns:
          whether its output needs one.
        """
        kernel = self.trained(f"{name}/kernel")
        parameters = inputs * outputs + (outputs if bias else 0)
        flops = 2 * positions * inputs * outputs
        self.add(part, flops=flops, parameters=parameters, times_backward=flows + kernel)
        return flows or kernel or (bias and self.trained(f"{name}/bias"))

    def norm(self, part: str, width: int, name: str) -> None:
        """Adds a layer or group norm, a scale and a bias for each channel."""
        self.array(part, 2 * width, f"{name}/scale", f"{name}/bias")

    def rows(self) -> list[FlopsRow]:
        """The parts in order, without empty ones."""
        return [FlopsRow(part, *total) for part, total in self._parts.items() if any(total)]


def count_model(model: nn.Module, image_size: int | tuple[int, int], trained: Trained) -> Count:
    """Counts a model; see `flops.count_parts`."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    count = Count(trained)
    if isinstance(model, VisionTransformer):
        features = _vision_transformer(count, model, height, width)
    elif isinstance(model, AxialVisionTransformer):
        features = _axial_vision_transformer(count, model, height, width)
    elif isinstance(model, BitResNet):
        features = _bit_resnet(count, model, height, width)
    else:
        raise UserError(f"no formula for the FLOPs of a {type(model).__name__}.")
    if model.num_classes:
        count.dense("head", 1, features, model.num_classes, "head", flows=count.flows)
    return count


def _vision_transformer(count: Count, model: VisionTransformer, height: int, width: int) -> int:
    """Adds a ViT or hybrid; returns the width of its representation."""
    hidden, depth = model.hidden_dim, model.num_layers
    rows, columns = model.grid(height, width)
    channels = CHANNELS
    if model.resnet is not None:
        channels = _resnet(count, HybridUnit, model.resnet, ROOT_WIDTH, height, width)
    inputs = channels * model.patch_size**2
    count.flows = count.dense("patch embedding", rows * columns, inputs, hidden, "embedding", flows=count.flows)
    tokens = rows * columns + model.num_prefix_tokens
    count.array("class token", model.num_prefix_tokens * hidden, "cls")

    kind, place = model.position_embedding, model.position_embedding_at
    learned = {
        "learned_1d": {"pos_embedding": tokens * hidden},
        "learned_2d": {
            "pos_embedding_x": columns * (hidden // 2), "pos_embedding_y": rows * (hidden - hidden // 2),
        },
    }.get(kind, {})  # fmt: skip
    if place != "every_layer":
        _position_embedding(count, learned, "Transformer/posembed_input")
    shared = "Transformer/relative_embedding" if kind == "relative" and place == "shared" else None
    if shared:
        count.add("position embeddings", parameters=_offsets(tokens) * hidden)
    for layer in range(depth):
        name = "Transformer/encoderblock" + ("" if model.scan_layers else f"_{layer}")
        if place == "every_layer":
            _position_embedding(count, learned, f"{name}/posembed")
        relative = f"{name}/{_ATTENTION}/relative_embedding" if kind == "relative" else None
        _transformer_layer(count, name, tokens, tokens, hidden, model.mlp_dim, table=shared or relative, own=not shared)
    count.norm("norms", hidden, "Transformer/encoder_norm")
    if model.pool == "map":
        part = "attention pooling"
        count.add(part, parameters=hidden)  # the query
        probe = count.trained("MAPHead_0/probe")
        attention: dict[str, Any] = {"queries": 1, "keys": tokens, "attended": tokens, "width": hidden}
        _attention(count, part, part, "MAPHead_0/MultiHeadDotProductAttention_0", **attention, query_flows=probe)
        count.norm(part, hidden, "MAPHead_0/LayerNorm_0")
        _mlp(count, part, "MAPHead_0/MlpBlock_0", 1, hidden, model.mlp_dim)
    if model.pre_logits:
        count.flows = count.dense("pre-logits", 1, hidden, hidden, "pre_logits", flows=count.flows)
    return hidden


def _position_embedding(count: Count, arrays: Mapping[str, int], name: str) -> None:
    """Adds learned position embeddings, by the names of their arrays."""
    for array, size in arrays.items():
        count.array("position embeddings", size, f"{name}/{array}")


def _axial_vision_transformer(count: Count, model: AxialVisionTransformer, height: int, width: int) -> int:
    """Adds an Axial-ViT; returns the width of its representation."""
    hidden = model.hidden_dim
    rows, columns = model.grid(height, width)
    tokens = rows * columns
    inputs = CHANNELS * model.patch_size**2
    count.flows = count.dense("patch embedding", tokens, inputs, hidden, "embedding", flows=False)
    count.array("position embeddings", tokens * hidden, "posembed_input/pos_embedding")
    for layer in range(model.num_layers):
        # One layer attends within rows, which are as long as there are columns, the next within columns.
        for axis, length in (("row", columns), ("column", rows)):
            _transformer_layer(count, f"encoderblock_{layer}/{axis}", tokens, length, hidden, model.mlp_dim)
    count.norm("norms", hidden, "encoder_norm")
    return hidden


_ATTENTION = "MultiHeadDotProductAttention_1"


def _transformer_layer(
    count: Count,
    name: str,
    tokens: int,
    attended: int,
    hidden: int,
    mlp_dim: int,
    *,
    table: str | None = None,
    own: bool = True,
) -> None:
    """Adds a Transformer layer; for `attended`, `table` and `own` see `_attention`."""
    count.norm("norms", hidden, f"{name}/LayerNorm_0")
    sizes: dict[str, Any] = {"queries": tokens, "keys": tokens, "attended": attended, "width": hidden}
    _attention(
        count, "attention projections", "attention products", f"{name}/{_ATTENTION}", **sizes,
        table=table, table_part="position embeddings", own=own,
    )  # fmt: skip
    count.norm("norms", hidden, f"{name}/LayerNorm_2")
    _mlp(count, "mlp", f"{name}/MlpBlock_3", tokens, hidden, mlp_dim)


def _attention(
    count: Count,
    projections: str,
    products: str,
    name: str,
    *,
    queries: int,
    keys: int,
    attended: int,
    width: int,
    query_flows: bool | None = None,
    table: str | None = None,
    table_part: str = "",
    own: bool = True,
) -> None:
    """Adds an attention layer, with any number of heads.

    Args:
      count: the count to add to.
      projections: part of the query, key, value and output projections.
      products: part of the products of queries with keys and of weights with values.
      name: of the layer.
      queries: number of tokens that attend.
      keys: number of tokens attended to.
      attended: number of keys for each query.
      width: of the tokens.
      query_flows: whether the queries' tokens need a gradient, if they are not the keys' tokens.
      table: name of the embeddings of relative positions, one for each offset, each multiplied with each query.
      table_part: part of these embeddings.
      own: whether the layer has its own embeddings.
    """
    flows = count.flows
    query_flows = flows if query_flows is None else query_flows
    query = count.dense(projections, queries, width, width, f"{name}/query", flows=query_flows)
    key = count.dense(projections, keys, width, width, f"{name}/key", flows=flows)
    value = count.dense(projections, keys, width, width, f"{name}/value", flows=flows)
    logits = query or key
    if table:
        offsets, trained = _offsets(attended), count.trained(table)
        flops = 2 * queries * offsets * width
        count.add(table_part, flops=flops, times_backward=query + trained)
        count.add(table_part, parameters=offsets * width if own else 0)
        logits = logits or trained
    product = 2 * queries * attended * width
    count.add(products, flops=product, times_backward=query + key)
    count.add(products, flops=product, times_backward=logits + value)
    count.flows = count.dense(projections, queries, width, width, f"{name}/out", flows=logits or value)


def _offsets(attended: int) -> int:
    """Number of offsets between a query and the keys."""
    return 2 * attended - 1


def _mlp(count: Count, part: str, name: str, tokens: int, hidden: int, mlp_dim: int) -> None:
    """Adds an MLP beside a residual connection."""
    below = count.flows
    inner = count.dense(part, tokens, hidden, mlp_dim, f"{name}/Dense_0", flows=below)
    count.flows = count.dense(part, tokens, mlp_dim, hidden, f"{name}/Dense_1", flows=inner)


def _bit_resnet(count: Count, model: BitResNet, height: int, width: int) -> int:
    """Adds a BiT ResNet, or one with axial attention; returns the width of its representation."""
    if model.unit_type not in (BitUnit, AxialUnit):
        raise UserError(f"no formula for the FLOPs of a ResNet of {model.unit_type.__name__}s.")
    channels = _resnet(count, model.unit_type, model.stages, ROOT_WIDTH * model.width_factor, height, width)
    count.norm("norms", channels, "norm_pre_head")
    return channels


def _resnet(
    count: Count, unit_type: type[nn.Module], stages: Sequence[int], root_width: int, height: int, width: int
) -> int:
    """Adds the root and the stages of a ResNet; returns the number of channels of its feature map."""
    size = _halved((height, width))
    is_hybrid = unit_type is HybridUnit
    root = "conv_root" if is_hybrid else "root_block/conv_root"
    inputs = 7 * 7 * CHANNELS
    count.flows = count.dense("resnet root", math.prod(size), inputs, root_width, root, bias=False, flows=False)
    if is_hybrid:
        count.norm("resnet root", root_width, "gn_root")
    size = _halved(size)  # the max-pooling
    channels = root_width
    for stage, num_units in enumerate(stages):
        unit_width = root_width * 2**stage
        for unit in range(num_units):
            strided = stage > 0 and unit == 0
            name = f"block{stage + 1}/unit{unit + 1:{'' if is_hybrid else '02'}d}"
            _unit(count, f"resnet block{stage + 1}", name, unit_type, channels, unit_width, size, strided)
            size = _halved(size) if strided else size
            channels = EXPANSION * unit_width
    return channels


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    """Size after a stride of 2: BiT's paddings and "SAME" both round odd numbers up."""
    return -(-size[0] // 2), -(-size[1] // 2)


def _unit(
    count: Count,
    part: str,
    name: str,
    unit_type: type[nn.Module],
    channels: int,
    width: int,
    size: tuple[int, int],
    strided: bool,
) -> None:
    """Adds a bottleneck unit.

    Args:
      count: the count to add to.
      part: where to add it.
      name: of the unit.
      unit_type: `BitUnit`, `HybridUnit` or `AxialUnit`.
      channels: of the input.
      width: of the middle.
      size: of the input, rows and columns.
      strided: whether it halves the size.
    """
    outputs = EXPANSION * width
    before, after = math.prod(size), math.prod(_halved(size) if strided else size)
    norm_first = unit_type is not HybridUnit

    def convolve(layer: str, positions: int, inputs: int, channels: int) -> None:
        count.flows = count.dense(part, positions, inputs, channels, f"{name}/{layer}", bias=False, flows=count.flows)

    beside = count.flows  # along the residual connection
    if norm_first:
        count.norm(part, channels, f"{name}/gn1")
    below = count.flows
    if strided or channels != outputs:
        convolve("conv_proj", after, channels, outputs)
        if not norm_first:
            count.norm(part, outputs, f"{name}/gn_proj")
        beside, count.flows = count.flows, below
    convolve("conv1", before, channels, width)
    count.norm(part, width, f"{name}/{'gn2' if norm_first else 'gn1'}")
    if unit_type is AxialUnit:
        # Within rows, then within columns, both before the size is halved.
        for axis, length in zip(("row", "column"), reversed(size), strict=True):
            sizes: dict[str, Any] = {"queries": before, "keys": before, "attended": length, "width": width}
            table = f"{name}/{axis}/relative_embedding"
            _attention(count, part, part, f"{name}/{axis}", **sizes, table=table, table_part=part)
    else:
        convolve("conv2", after, 3 * 3 * width, width)
    count.norm(part, width, f"{name}/{'gn3' if norm_first else 'gn2'}")
    convolve("conv3", after, width, outputs)
    if not norm_first:
        count.norm(part, outputs, f"{name}/gn3")
    count.flows |= beside
