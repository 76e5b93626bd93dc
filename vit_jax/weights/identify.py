"""Which model arrays belong to, told by their names and shapes."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.position_embeddings import grid_of
from vit_jax.models.resnet import EXPANSION, ROOT_WIDTH, UNITS_BY_DEPTH
from vit_jax.models.vit import VARIANTS, Variant
from vit_jax.weights.mapping import MAX_LAYERS

Shapes = dict[str, tuple[int, ...]]
_POSITIONS = "Transformer/posembed_input/pos_embedding"
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model that `create_model` makes.

    Attributes:
      name: such as "ViT-B/16".
      num_classes: width of the head; 0 without head.
      overrides: attributes that the name does not tell, such as `{"pre_logits": True}`.
      image_size: height and width of the images that the position embeddings are for, in pixels; None where there are
        none to tell.
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


def identify(shapes: Shapes, *, image_size: tuple[int, int] | None = None) -> ModelSpec:
    """Tells which model has parameters of these names and shapes.

    Args:
      shapes: by our names, layers unrolled.
      image_size: height and width of the images that the position embeddings are for, where it is known; None: a
        square, as many pixels as there are patches.

    Raises:
      UserError: none of ours.
    """
    try:
        if "root_block/conv_root/kernel" in shapes:
            return _identify_resnet(shapes)
        if "embedding/kernel" in shapes and any(name.startswith("Transformer/encoderblock_0/") for name in shapes):
            return _identify_vit(shapes, image_size)
        if "embedding/kernel" in shapes and any(name.startswith("encoderblock_0/row/") for name in shapes):
            return _identify_axial(shapes, image_size)
    except (IndexError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"the arrays contradict each other or are not whole, so that the model cannot be told: {error!r}."
        ) from error
    raise UserError(
        f"these are no arrays of a model that vit_jax has: {', '.join(sorted(shapes)[:_SHOWN])} ... See list_models()."
    )


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers there are in place of the pattern's group."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _units(shapes: Shapes) -> tuple[int, ...]:
    num_stages = _count(shapes, r"block(\d+)/unit")
    stages = tuple(_count(shapes, rf"block{stage}/unit(\d+)/") for stage in range(1, num_stages + 1))
    if sum(stages) > MAX_LAYERS:
        raise UserError(f"by their names, the arrays are of {sum(stages):,} units; at most {MAX_LAYERS} are read.")
    return stages


def _patch_size(shapes: Shapes) -> int:
    patch_size = shapes["embedding/kernel"][0]
    if patch_size < 1:
        raise UserError("no model: embedding/kernel is empty.")
    return patch_size


def _num_classes(shapes: Shapes) -> int:
    return shapes["head/kernel"][-1] if "head/kernel" in shapes else 0


def _known_variant(given: Variant) -> tuple[str, dict[str, int]]:
    """The size that has all these dimensions; else Ti with all of them as overrides."""
    for name, variant in VARIANTS.items():
        if variant == given:
            return name, {}
    return "Ti", dataclasses.asdict(given)


def _transformer_variant(shapes: Shapes, block: str, layers: str) -> tuple[str, dict[str, int]]:
    try:
        # Of biases, which cannot be transposed unnoticed.
        (hidden_dim,) = shapes["embedding/bias"]
        num_heads, _ = shapes[block + "MultiHeadDotProductAttention_1/query/bias"]
        (mlp_dim,) = shapes[block + "MlpBlock_3/Dense_0/bias"]
    except KeyError as error:
        raise UserError(f"the model cannot be told, because {error} is missing.") from error
    except ValueError as error:
        raise UserError(f"the model cannot be told by the shapes of embedding/bias and {block}: {error}.") from error
    if 0 in (hidden_dim, mlp_dim, num_heads) or hidden_dim % num_heads:
        raise UserError(
            f"no model: embedding/bias is as wide as {hidden_dim}, and {block}...query/bias is of {num_heads} heads."
        )
    num_layers = 1 + max(int(match[1]) for name in shapes if (match := re.match(layers, name)))
    if num_layers > min(len(shapes), MAX_LAYERS):
        raise UserError(f"by their names, the arrays are of {num_layers:,} layers; at most {MAX_LAYERS} are read.")
    return _known_variant(Variant(num_layers, hidden_dim, mlp_dim, num_heads))


def _identify_vit(shapes: Shapes, image_size: tuple[int, int] | None) -> ModelSpec:
    size, overrides = _transformer_variant(shapes, "Transformer/encoderblock_0/", r"Transformer/encoderblock_(\d+)/")
    found: dict[str, Any] = dict(overrides)
    patch_size = _patch_size(shapes)
    if "conv_root/kernel" in shapes:
        stages = _units(shapes)
        named = {
            ((), 8): f"R+{size}/16",
            (UNITS_BY_DEPTH[26], 1): f"R26+ViT-{size}/32",
            (UNITS_BY_DEPTH[50], 1): f"R50+ViT-{size}/32",
            ((3, 4, 9), 1): f"R50+ViT-{size}/16",
        }
        name = named.get((stages, patch_size), f"R50+ViT-{size}/16")
        if (stages, patch_size) not in named:
            found |= {"resnet": stages, "patch_size": patch_size}
        augreg = {"R26+ViT-S/32": "R26+S/32"}
        name = augreg.get(name, name)
    else:
        name = f"ViT-{size}/{patch_size}"
    pool = "cls" if "cls" in shapes else "map" if "MAPHead_0/probe" in shapes else "gap"
    if pool != "cls":
        found["pool"] = pool
    found |= _position_overrides(shapes)
    if "pre_logits/kernel" in shapes:
        found["pre_logits"] = True
    spec = ModelSpec(name, _num_classes(shapes), found)
    return dataclasses.replace(spec, image_size=image_size or _image_size(shapes, spec.create()))


def _image_size(shapes: Shapes, model: Any) -> tuple[int, int] | None:
    for place in ("Transformer/posembed_input/", "Transformer/encoderblock_0/posembed/", "posembed_input/"):
        grid: tuple[int, int] | None = None
        if positions := shapes.get(place + "pos_embedding"):
            grid = grid_of(positions[1], model.num_prefix_tokens)
        elif place + "pos_embedding_x" in shapes:
            grid = (shapes[place + "pos_embedding_y"][0], shapes[place + "pos_embedding_x"][0])
        if grid:
            return grid[0] * model.pixels_per_token, grid[1] * model.pixels_per_token
    for name, shape in shapes.items():
        if name.endswith("relative_embedding"):  # one for each offset between -(num_tokens - 1) and num_tokens - 1
            grid = grid_of((shape[0] + 1) // 2, model.num_prefix_tokens)
            return grid[0] * model.pixels_per_token, grid[1] * model.pixels_per_token
    return None


def _position_overrides(shapes: Shapes) -> dict[str, str]:
    at_stem = "Transformer/posembed_input/"
    in_layer = "Transformer/encoderblock_0/posembed/"
    for kind, leaf in (("learned_1d", "pos_embedding"), ("learned_2d", "pos_embedding_x")):
        # A shared one has the stem's name; whoever wrote the file has to say that it is shared.
        if at_stem + leaf in shapes:
            return {} if kind == "learned_1d" else {"position_embedding": kind}
        if in_layer + leaf in shapes:
            return {"position_embedding": kind, "position_embedding_at": "every_layer"}
    if "Transformer/relative_embedding" in shapes:
        return {"position_embedding": "relative", "position_embedding_at": "shared"}
    if any(name.endswith("/relative_embedding") for name in shapes):
        return {"position_embedding": "relative"}
    return {"position_embedding": "none"}


def _identify_axial(shapes: Shapes, image_size: tuple[int, int] | None) -> ModelSpec:
    size, overrides = _transformer_variant(shapes, "encoderblock_0/row/", r"encoderblock_(\d+)/row/")
    name = f"Axial-ViT-{size}/{_patch_size(shapes)}"
    spec = ModelSpec(name, _num_classes(shapes), dict(overrides))
    return dataclasses.replace(spec, image_size=image_size or _image_size(shapes, spec.create()))


def _identify_resnet(shapes: Shapes) -> ModelSpec:
    stages = _units(shapes)
    width = shapes["root_block/conv_root/kernel"][-1]
    overrides: dict[str, Any] = {}
    depths: dict[tuple[int, ...], int] = {units: depth for depth, units in UNITS_BY_DEPTH.items()}
    if stages not in depths:
        overrides["stages"] = stages
    depth = depths.get(stages, 50)
    if any("/row/" in name for name in shapes):
        # Its relative embeddings tell the size of the first stage's feature map, a quarter of the image.
        rows, columns = ((shapes[f"block1/unit01/{axis}/relative_embedding"][0] + 1) // 2 for axis in ("column", "row"))
        if min(rows, columns) < 1:
            raise UserError("no model: a relative_embedding is empty.")
        return ModelSpec(f"AxialResNet-{depth}", _num_classes(shapes), overrides, (4 * rows, 4 * columns))
    if width % ROOT_WIDTH or "block1/unit01/conv3/kernel" not in shapes:
        raise UserError(f"a ResNet of root width {width} is none of BiT's: they are multiples of {ROOT_WIDTH}.")
    if shapes["block1/unit01/conv3/kernel"][-1] != EXPANSION * width:
        raise UserError("a ResNet, but not of BiT's bottleneck units.")
    return ModelSpec(f"R{depth}x{width // ROOT_WIDTH}", _num_classes(shapes), overrides)


def expected_shapes(spec: ModelSpec, image_size: tuple[int, int]) -> Shapes:
    """Names and shapes of the parameters of a model, without computing anything."""
    model = spec.create()
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    params = jax.eval_shape(lambda images: model.init(jax.random.key(0), images), images)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(entry.key for entry in path): leaf.shape for path, leaf in leaves}


def check_shapes(found: Shapes, expected: Shapes, their_name: Any = lambda name: name) -> None:
    """Compares all names and shapes before anything is used.

    Args:
      found: in the file, by our names.
      expected: of the model, by our names.
      their_name: what the file calls an array of ours.

    Raises:
      UserError: lists the first differences.
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
        f"the arrays are not those of the model: {len(missing)} missing, {len(extra)} too many, {len(differing)} of "
        "another shape.\n" + "\n".join(lines)
    )
