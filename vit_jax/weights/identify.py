"""Identifies the model of some arrays by their names and shapes."""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.position_embeddings import grid_of
from vit_jax.models.resnet import EXPANSION, ROOT_WIDTH, UNITS_BY_DEPTH
from vit_jax.models.variants import VARIANTS, Variant
from vit_jax.weights.mapping import MAX_LAYERS, Arrays, list_names

Shapes = dict[str, tuple[int, ...]]
_SHOWN = 8  # differences in an error


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model that `create_model` makes.

    Attributes:
      name: such as "ViT-B/16".
      num_classes: width of the head; 0: no head.
      overrides: attributes that the name does not imply, such as `{"pre_logits": True}`.
      image_size: height and width of the images that the position embeddings are for, in pixels; None: any.
    """

    name: str
    num_classes: int
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    image_size: tuple[int, int] | None = None

    def create(self, **overrides: Any) -> Any:
        """Makes the model; arguments override the attributes."""
        return create_model(self.name, **({"num_classes": self.num_classes} | self.overrides | overrides))

    def __str__(self) -> str:
        parts = [self.name, f"{self.num_classes:,} classes" if self.num_classes else "no head"]
        parts += [f"{name}={value}" for name, value in self.overrides.items()]
        if self.image_size:
            parts.append(f"images {self.image_size[0]}x{self.image_size[1]}")
        return ", ".join(parts)


def shapes_of(arrays: Arrays) -> Shapes:
    """Shapes by name."""
    return {name: array.shape for name, array in arrays.items()}


def identify(shapes: Shapes, *, image_size: tuple[int, int] | None = None) -> ModelSpec:
    """Identifies the model by the names and shapes of its parameters.

    Args:
      shapes: by our names, layers unrolled.
      image_size: height and width of the images that the position embeddings are for; None: inferred from the
        embeddings, with a square grid.

    Raises:
      UserError: no model of this project has such parameters.
    """
    try:
        if "root_block/conv_root/kernel" in shapes:
            return _identify_resnet(shapes)
        if "block1/unit01/width_axis/relative_embedding" in shapes:
            return _identify_axial_resnet(shapes)
        if "embedding/kernel" in shapes and any(name.startswith("Transformer/encoderblock_0/") for name in shapes):
            spec = _identify_vit(shapes)
        elif "embedding/kernel" in shapes and any(name.startswith("encoderblock_0/row/") for name in shapes):
            size, overrides = _variant(shapes, "encoderblock_{}/row/")
            spec = ModelSpec(f"Axial-ViT-{size}/{_patch_size(shapes)}", _num_classes(shapes), overrides)
        else:
            raise UserError(f"no model of vit_jax has such arrays: {list_names(shapes)}. See list_models().")
        return dataclasses.replace(spec, image_size=image_size or _image_size(shapes, spec.create()))
    except (IndexError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"the arrays contradict each other or are incomplete: {error!r}. No model has them.") from error


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers the pattern's group has."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _units(shapes: Shapes) -> tuple[int, ...]:
    """Number of units in each stage of a ResNet."""
    num_stages = _count(shapes, r"block([0-9]+)/unit")
    units = tuple(_count(shapes, rf"block{stage}/unit([0-9]+)/") for stage in range(1, num_stages + 1))
    if sum(units) > MAX_LAYERS:
        raise UserError(f"by their names, the arrays are of {sum(units):,} units; at most {MAX_LAYERS} are read.")
    return units


def _patch_size(shapes: Shapes) -> int:
    patch_size = shapes["embedding/kernel"][0]
    if patch_size < 1:
        raise UserError("embedding/kernel is empty: no model has it.")
    return patch_size


def _num_classes(shapes: Shapes) -> int:
    return shapes["head/kernel"][-1] if "head/kernel" in shapes else 0


def _variant(shapes: Shapes, block: str) -> tuple[str, dict[str, int]]:
    """The size of a transformer whose blocks have these names; Ti with its dimensions overridden if no size fits."""
    first = block.format(0)
    try:
        # From biases, because a transposed kernel would go unnoticed.
        (hidden_dim,) = shapes["embedding/bias"]
        num_heads, _ = shapes[first + "MultiHeadDotProductAttention_1/query/bias"]
        (mlp_dim,) = shapes[first + "MlpBlock_3/Dense_0/bias"]
    except KeyError as error:
        raise UserError(f"the model cannot be identified, because {error} is missing.") from error
    except ValueError as error:
        raise UserError(
            f"the model cannot be identified by the shapes of embedding/bias and {first}: {error}."
        ) from error
    if 0 in (hidden_dim, mlp_dim, num_heads) or hidden_dim % num_heads:
        raise UserError(
            f"embedding/bias has {hidden_dim} elements and {first}...query/bias {num_heads} heads: no model has both."
        )
    pattern = block.replace("{}", "([0-9]{1,6})")
    num_layers = 1 + max(int(match[1]) for name in shapes if (match := re.match(pattern, name)))
    if num_layers > min(len(shapes), MAX_LAYERS):
        raise UserError(f"by their names, the arrays are of {num_layers:,} layers; at most {MAX_LAYERS} are read.")
    found = Variant(num_layers, hidden_dim, mlp_dim, num_heads)
    name = next((name for name, variant in VARIANTS.items() if variant == found), None)
    return (name, {}) if name else ("Ti", dataclasses.asdict(found))


def _identify_vit(shapes: Shapes) -> ModelSpec:
    size, dimensions = _variant(shapes, "Transformer/encoderblock_{}/")
    found: dict[str, Any] = dict(dimensions)
    patch_size = _patch_size(shapes)
    if "conv_root/kernel" in shapes:
        key = (_units(shapes), patch_size)
        named = {
            ((), 8): f"R+{size}/16",
            (UNITS_BY_DEPTH[26], 1): "R26+S/32" if size == "S" else f"R26+ViT-{size}/32",
            (UNITS_BY_DEPTH[50], 1): f"R50+ViT-{size}/32",
            ((3, 4, 9), 1): f"R50+ViT-{size}/16",
        }
        name = named.get(key, f"R50+ViT-{size}/16")
        if key not in named:
            found |= {"resnet": key[0], "patch_size": patch_size}
    else:
        name = f"ViT-{size}/{patch_size}"
    if "cls" not in shapes:
        found["pool"] = "map" if "MAPHead_0/probe" in shapes else "gap"
    found |= _position_overrides(shapes)
    if "pre_logits/kernel" in shapes:
        found["pre_logits"] = True
    return ModelSpec(name, _num_classes(shapes), found)


def _position_overrides(shapes: Shapes) -> dict[str, str]:
    at_stem = "Transformer/posembed_input/"
    in_layer = "Transformer/encoderblock_0/posembed/"
    for kind, leaf in (("learned_1d", "pos_embedding"), ("learned_2d", "pos_embedding_x")):
        # Shared embeddings have the stem's name; only a description says that they are shared.
        if at_stem + leaf in shapes:
            return {} if kind == "learned_1d" else {"position_embedding": kind}
        if in_layer + leaf in shapes:
            return {"position_embedding": kind, "position_embedding_at": "every_layer"}
    if "Transformer/relative_embedding" in shapes:
        return {"position_embedding": "relative", "position_embedding_at": "shared"}
    if any(name.endswith("/relative_embedding") for name in shapes):
        return {"position_embedding": "relative"}
    return {"position_embedding": "none"}


def _image_size(shapes: Shapes, model: Any) -> tuple[int, int] | None:
    grid: tuple[int, int] | None = None
    for module in ("Transformer/posembed_input/", "Transformer/encoderblock_0/posembed/", "posembed_input/"):
        if positions := shapes.get(module + "pos_embedding"):
            grid = grid_of(positions[1], model.num_prefix_tokens)
        elif module + "pos_embedding_x" in shapes:
            grid = (shapes[module + "pos_embedding_y"][0], shapes[module + "pos_embedding_x"][0])
    relative = next((shape for name, shape in shapes.items() if name.endswith("relative_embedding")), None)
    if grid is None and relative is not None:  # one for each offset between -(num_tokens - 1) and num_tokens - 1
        grid = grid_of((relative[0] + 1) // 2, model.num_prefix_tokens)
    return grid and (grid[0] * model.pixels_per_token, grid[1] * model.pixels_per_token)


def _stages(shapes: Shapes) -> tuple[int, dict[str, Any]]:
    """The depth of a ResNet, and its number of units in each stage if no depth has these."""
    units = _units(shapes)
    depth = next((depth for depth, known in UNITS_BY_DEPTH.items() if known == units), None)
    return (depth, {}) if depth else (50, {"stages": units})


def _width_factor(width: int) -> int:
    """The width factor of a ResNet whose root is so wide."""
    if width < 1 or width % ROOT_WIDTH:
        raise UserError(f"the ResNet's root is {width} wide; it must be a multiple of {ROOT_WIDTH}.")
    return width // ROOT_WIDTH


def _identify_resnet(shapes: Shapes) -> ModelSpec:
    depth, overrides = _stages(shapes)
    width = shapes["root_block/conv_root/kernel"][-1]
    width_factor = _width_factor(width)
    if shapes.get("block1/unit01/conv3/kernel", (0,))[-1] != EXPANSION * width:
        raise UserError("the ResNet does not have the bottleneck units of BiT.")
    return ModelSpec(f"R{depth}x{width_factor}", _num_classes(shapes), overrides)


def _identify_axial_resnet(shapes: Shapes) -> ModelSpec:
    depth, overrides = _stages(shapes)
    width_factor = _width_factor(shapes["conv_root/kernel"][-1])
    if width_factor != 1:
        overrides["width_factor"] = width_factor
    # Relative embeddings have the size of the first stage's feature map, a quarter of the image.
    axes = ("height_axis", "width_axis")
    rows, columns = ((shapes[f"block1/unit01/{axis}/relative_embedding"][0] + 1) // 2 for axis in axes)
    if min(rows, columns) < 1:
        raise UserError("a relative_embedding is empty: no model has it.")
    return ModelSpec(f"AxialResNet-{depth}", _num_classes(shapes), overrides, (4 * rows, 4 * columns))


def check_version(names: Collection[str]) -> None:
    """Raises `UserError` if the parameters are of a model that this version no longer has.

    Args:
      names: by our names.
    """
    if "root_block/conv_root/kernel" in names and any("/row/query/" in name for name in names):
        raise UserError(
            "this AxialResNet is of an earlier version of vit_jax, which had BiT's units and ViT's attention. This "
            "version has the paper's, which has other parameters. Use the version that trained it, or train it again."
        )


def expected_shapes(spec: ModelSpec, image_size: tuple[int, int]) -> Shapes:
    """Names and shapes of the parameters of a model, without computing anything."""
    model = spec.create()
    if hasattr(model, "scan_layers"):
        model = model.clone(scan_layers=True)  # layers are alike: traces one of them
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    params = jax.eval_shape(lambda images: model.init(jax.random.key(0), images), images)["params"]
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(entry.key for entry in path)
        if "/encoderblock/" in name:
            layers = range(leaf.shape[0])
            shapes |= {name.replace("/encoderblock/", f"/encoderblock_{i}/"): leaf.shape[1:] for i in layers}
        else:
            shapes[name] = leaf.shape
    return shapes


def check_shapes(found: Shapes, expected: Shapes, their_name: Any = lambda name: name) -> None:
    """Compares all names and shapes.

    Args:
      found: in the file, by our names.
      expected: of the model, by our names.
      their_name: maps our name of an array to the file's.

    Raises:
      UserError: they differ; lists the first differences.
    """
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    differing = sorted(name for name in found.keys() & expected.keys() if tuple(found[name]) != tuple(expected[name]))
    if not (missing or extra or differing):
        return
    lines = []
    for what, names in (("missing", missing), ("not of this model", extra)):
        lines += [f"  {what}: {their_name(name)}" for name in names[:_SHOWN]]
        lines += [f"  {what}: {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    for name in differing[:_SHOWN]:
        lines.append(f"  {their_name(name)}: {tuple(found[name])} as {name}, the model has {tuple(expected[name])}")
    lines += [f"  {len(differing) - _SHOWN} more shapes"] if len(differing) > _SHOWN else []
    raise UserError(
        f"the arrays do not fit the model: {len(missing)} missing, {len(extra)} too many, {len(differing)} of "
        "another shape.\n" + "\n".join(lines)
    )
