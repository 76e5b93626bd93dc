"""`load`: from a name, an address or a path to weights."""

import dataclasses
import math
import pathlib
import re
import shlex

from vit_jax.data.class_names import DATA_SETS, class_names
from vit_jax.errors import UserError, unknown_name
from vit_jax.files import AnyPath, parse_path
from vit_jax.models import create_model
from vit_jax.models.variants import VARIANTS
from vit_jax.weights.arrays import ArrayFile, DamagedFileError, check_finite, open_arrays
from vit_jax.weights.download import fetch, is_remote
from vit_jax.weights.formats import POSITIONS, find_format
from vit_jax.weights.huggingface import model_file, read_facts
from vit_jax.weights.identify import (
    ModelSpec,
    Shapes,
    check_shapes,
    check_version,
    expected_shapes,
    identify,
    shapes_of,
)
from vit_jax.weights.mapping import Format
from vit_jax.weights.model_weights import Facts, Weights, read_description
from vit_jax.weights.preprocessing import Preprocessing
from vit_jax.weights.released import ReleasedCheckpoint, get_checkpoint, list_checkpoints

_PAPER_SIZE = (224, 224)  # if neither position embeddings nor a description give the image size
_OTHER_LIBRARIES = ("timm", "huggingface")


def load(
    place: str | pathlib.Path,
    *,
    model: str | None = None,
    image_size: tuple[int, int] | None = None,
    allow_nan: bool = False,
    predicts_patches: bool = False,
) -> Weights:
    """Loads weights. All names and shapes are checked before any array is read.

    Args:
      place: name of a released checkpoint (`list_checkpoints("vit*")`); path, http(s):// or gs:// address of a .npz or
        .safetensors file; folder as Hugging Face and timm publish them; or workdir of a run, also in a bucket (its best
        parameters, or else the last).
      model: the expected model, such as "ViT-B/16"; None: any.
      image_size: height and width of the images they were trained on, needed if these were not square.
      allow_nan: whether values may be infinite or not a number.
      predicts_patches: keep a head that predicts patches (`objectives.masked_patches`), and the mask embedding; else
        weights of such a run have no head.

    Raises:
      UserError: the place does not exist, the file is damaged, its layout is unknown, it holds another model than
        requested, or its values are infinite or not a number.
    """
    place = str(place)
    released = get_checkpoint(place) if place in list_checkpoints() else None
    path = _find(place, released)
    if (path / "starts.jsonl").exists():
        from vit_jax.weights.run_weights import read_run

        weights = read_run(path)
    else:
        try:
            weights = _load_file(pathlib.Path(path), released, model, image_size)
        except DamagedFileError as error:
            if released or is_remote(place):
                raise UserError(f"{error} Delete the downloaded one first: rm {shlex.quote(str(path))}") from error
            raise
    if not predicts_patches:
        weights = weights.without_patch_head()
    if model is not None:
        _check_model(weights, model)
    if not allow_nan:
        check_finite(weights.arrays, place)
    return dataclasses.replace(weights, source=place)


def _find(place: str, released: ReleasedCheckpoint | None) -> AnyPath:
    """Returns the local path of a place, after downloading it if needed; for a run in a bucket, the path there."""
    if released:
        return fetch(released.url, sha256=released.sha256)
    if place.startswith("gs://") and not place.endswith((".npz", ".safetensors")):
        workdir = parse_path(place)
        if not (workdir / "starts.jsonl").exists():
            raise UserError(
                f"{place} is not the workdir of a run. For other weights in a bucket, name a .npz or .safetensors file."
            )
        return workdir
    if re.fullmatch(r"[\w+-]+", place) and not pathlib.Path(place).exists():
        raise unknown_name("released checkpoint (and no such file)", place, list_checkpoints())
    return fetch(place)


def _load_file(
    path: pathlib.Path,
    released: ReleasedCheckpoint | None,
    model: str | None,
    image_size: tuple[int, int] | None,
) -> Weights:
    opened = open_arrays(model_file(path) if path.is_dir() else path)
    outline = opened.outline()
    layout = find_format(outline)
    parameters = layout.parameters(outline)
    opened.check(parameters)
    check_version(parameters.values())
    facts = _facts(path, opened, released)
    num_heads, notes = _num_heads(layout, {parameters[name]: opened.shapes[name] for name in parameters}, facts, model)
    shapes = shapes_of(layout.read(outline, num_heads=num_heads))
    spec = facts.spec
    if spec is None:
        spec, more_notes = _identify(layout, shapes, facts, image_size, path)
        notes += more_notes
    size = spec.image_size or facts.image_size or _PAPER_SIZE
    if facts.spec and image_size not in (None, size):
        raise UserError(f"{path} is for images of {size[0]}x{size[1]}, not of {image_size[0]}x{image_size[1]}.")
    _check_arrays(opened, shapes, spec, size, layout)
    if released:
        _check_released(path, released, spec)

    arrays = layout.read(opened.read(parameters), num_heads=num_heads)
    names = facts.class_names if spec.num_classes else None
    data_set = {len(class_names(data)): data for data in DATA_SETS}.get(spec.num_classes)
    if names is None and data_set and not released:
        names = class_names(data_set)
        notes += (f"{spec.num_classes:,} classes: assumed to be those of {data_set}",)
    if names is not None and len(names) != spec.num_classes:
        raise UserError(f"{path}: {len(names)} class names for {spec.num_classes} logits.")
    preprocessing = facts.preprocessing or Preprocessing().at(size)
    return Weights(spec, arrays, preprocessing, names, facts.probabilities, layout.name, notes=facts.notes + notes)


def _facts(path: pathlib.Path, opened: ArrayFile, released: ReleasedCheckpoint | None) -> Facts:
    if opened.description:
        return read_description(opened)
    if path.is_dir():
        return read_facts(path)
    if released is None:
        return Facts()
    return Facts(
        image_size=(released.image_size, released.image_size),
        preprocessing=released.preprocessing,
        class_names=class_names(released.class_names) if released.class_names else None,
        probabilities=released.probabilities,
    )


def _num_heads(layout: Format, shapes: Shapes, facts: Facts, model: str | None) -> tuple[int | None, tuple[str, ...]]:
    """The number of attention heads, which arrays of other libraries do not show, and a note if it is a guess."""
    if facts.num_heads:
        return facts.num_heads, ()
    if model is not None:
        return getattr(create_model(model, num_classes=0), "num_heads", None), ()
    if layout.name in _OTHER_LIBRARIES:
        width = shapes.get(layout.their_name("embedding/bias"))
        for name, variant in VARIANTS.items():
            if width == (variant.hidden_dim,):
                return variant.num_heads, (f"{variant.num_heads} attention heads: taken from ViT-{name}",)
    return None, ()


def _identify(
    layout: Format, shapes: Shapes, facts: Facts, image_size: tuple[int, int] | None, path: pathlib.Path
) -> tuple[ModelSpec, tuple[str, ...]]:
    """Identifies the model of a file without description; returns notes about assumptions too."""
    spec = identify(shapes, image_size=image_size or _fitting_size(facts.image_size, shapes))
    found = spec.create()
    overrides = {key: value for key, value in layout.attributes.items() if getattr(found, key) != value}
    notes: tuple[str, ...] = ()
    if spec.overrides.get("position_embedding") == "none":
        if layout.name in _OTHER_LIBRARIES:
            raise UserError(f"{path}: {layout.their_name(POSITIONS)} is missing.")
        if layout.name == "big_vision":
            overrides["position_embedding"] = (
                "sincos_2d"  # needs no array; all of big_vision's models have position embeddings
            )
        else:
            notes += ("the file has no position embeddings: taken for a model without; sincos_2d has no arrays either",)
    if layout.name in _OTHER_LIBRARIES and not path.is_dir():
        overrides["gelu"] = "exact"
        notes += ("gelu=exact: the library's default. If the file's folder has a config.json, name the folder",)
    return dataclasses.replace(spec, overrides=spec.overrides | overrides | facts.overrides), notes


def _fitting_size(size: tuple[int, int] | None, shapes: Shapes) -> tuple[int, int] | None:
    """Returns a described image size; None if position embeddings contradict it."""
    positions = shapes.get(POSITIONS)
    if size is None or positions is None:
        return size
    model = identify(shapes, image_size=size).create()
    return size if positions[1] == model.num_prefix_tokens + math.prod(model.grid(*size)) else None


def _check_arrays(opened: ArrayFile, shapes: Shapes, spec: ModelSpec, size: tuple[int, int], layout: Format) -> None:
    """Raises `UserError` unless the arrays are those of the model."""
    try:
        check_shapes(shapes, expected_shapes(spec, size), layout.their_name)
    except UserError as error:
        if not opened.description:
            raise
        raise UserError(f"{opened.path} does not hold {spec}, as {opened.described_in} says: {error}") from error


def _check_released(path: pathlib.Path, released: ReleasedCheckpoint, spec: ModelSpec) -> None:
    """Raises `UserError` unless the file holds the model of its name."""
    expected = create_model(released.model, num_classes=released.num_classes, **released.model_overrides)
    size = (released.image_size, released.image_size)
    if spec.create() != expected or (spec.image_size or size) != size:
        raise UserError(
            f"{path} holds {spec}, where {released.name} is {released.model} with {released.num_classes:,} classes for "
            f"images of {size[0]}x{size[1]}. Delete it to fetch it again: rm {shlex.quote(str(path))}"
        )


def _check_model(weights: Weights, name: str) -> None:
    """Raises `UserError` unless the weights are of the model of that name; the head may be any."""
    if weights.spec.name == name:
        return
    # The name fixes these; all other attributes may be the file's own.
    fixed = ("num_layers", "hidden_dim", "mlp_dim", "num_heads", "resnet", "patch_size", "stages")
    attributes = vars(create_model(name, num_classes=0)).keys() - set(fixed)
    kept = {key: value for key, value in weights.spec.overrides.items() if key in attributes}
    asked = ModelSpec(name, weights.spec.num_classes, kept)
    size = weights.spec.image_size or weights.preprocessing.image_size
    try:
        check_shapes(shapes_of(weights.arrays), expected_shapes(asked, size))
    except UserError as error:
        raise UserError(f"this is {weights.spec}, not {name}: {error}") from error
