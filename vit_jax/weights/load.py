"""`load` and `save`: from a name, an address or a path to a model's parameters, and back to files."""

import dataclasses
import logging
import math
import pathlib
import re
import shlex
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from vit_jax.data.class_names import DATA_SETS, class_names
from vit_jax.errors import UserError, unknown_name
from vit_jax.json_files import Fields
from vit_jax.models import create_model
from vit_jax.models.vit import VARIANTS, stack_layers
from vit_jax.run.facts import read_facts
from vit_jax.run.workdir import AnyPath, parse
from vit_jax.weights import huggingface
from vit_jax.weights.arrays import read_json, write_arrays, write_folder
from vit_jax.weights.download import fetch
from vit_jax.weights.formats import FORMATS
from vit_jax.weights.huggingface import Facts
from vit_jax.weights.identify import ModelSpec, Shapes, check_shapes, expected_shapes, identify
from vit_jax.weights.mapping import MAX_LAYERS, Arrays, Format, list_names, unstack_arrays
from vit_jax.weights.preprocessing import MAX_SIDE, Preprocessing
from vit_jax.weights.reading import ArrayFile, check_finite, open_arrays
from vit_jax.weights.released import ReleasedCheckpoint, get_checkpoint, list_checkpoints

logger = logging.getLogger(__name__)

_POSITIONS = "Transformer/posembed_input/pos_embedding"
_PAPER_SIZE = (224, 224)  # where neither position embeddings nor a description tell


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's parameters, and what must be known to use them.

    Attributes:
      spec: which model.
      arrays: parameters by our names, flat, layers unrolled, in the dtypes of the file.
      preprocessing: from images to the model's input.
      class_names: of the logits; None where not known.
      probabilities: what makes probabilities of the logits: "softmax", or "sigmoid" for a head that was trained with
        the sigmoid loss; None where not known.
      format: the file's, a key of `formats.FORMATS`, or "run".
      source: where they are from.
      notes: what a user should know, such as what was taken for granted.
    """

    spec: ModelSpec
    arrays: Arrays
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    probabilities: str | None = None
    format: str = "vit"
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as `model.apply({"params": ...})` wants them, layers unrolled."""
        return flax.traverse_util.unflatten_dict(self.arrays, sep="/")

    @property
    def scanned_params(self) -> dict[str, Any]:
        """The parameters for a ViT with `scan_layers=True`."""
        return stack_layers(self.params)

    def without(self, *parts: str) -> "Weights":
        """The same without some parts, such as "head" or "pre_logits".

        Raises:
          UserError: there is no such part.
        """
        for part in parts:
            if not any(name.startswith(part + "/") for name in self.arrays):
                raise UserError(
                    f"there is no {part!r} to leave out; only 'head' and 'pre_logits' can be, where present."
                )
        if strangers := set(parts) - {"head", "pre_logits"}:
            raise UserError(f"a model cannot do without {list_names(strangers)}; only 'head' and 'pre_logits' can go.")
        spec = self.spec
        if "head" in parts:
            spec = dataclasses.replace(spec, num_classes=0)
        if "pre_logits" in parts:
            kept = {name: value for name, value in spec.overrides.items() if name != "pre_logits"}
            spec = dataclasses.replace(spec, overrides=kept)
        arrays = {name: array for name, array in self.arrays.items() if name.split("/")[0] not in parts}
        if "head" in parts:
            return dataclasses.replace(self, spec=spec, arrays=arrays, class_names=None, probabilities=None)
        return dataclasses.replace(self, spec=spec, arrays=arrays)

    def describe(self) -> dict[str, Any]:
        """All but the arrays, JSON-compatible; what `save` keeps beside them."""
        return {
            "model": self.spec.name,
            "num_classes": self.spec.num_classes,
            "overrides": self.spec.overrides,
            "image_size": self.spec.image_size,
            "preprocessing": self.preprocessing.to_json(),
            "class_names": self.class_names,
            "probabilities": self.probabilities,
        }


def from_params(
    name: str,
    params: dict[str, Any],
    *,
    image_size: tuple[int, int] | int,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] | None = None,
    probabilities: str | None = None,
    **overrides: Any,
) -> Weights:
    """Weights from parameters in memory, to save them.

    Args:
      name: of the model, such as "ViT-B/16".
      params: nested; scanned or unrolled layers.
      image_size: of the images that the position embeddings are for, in pixels.
      preprocessing: from images to the model's input; None: resized to a square, values in [-1, 1].
      class_names: of the logits.
      probabilities: "softmax" or "sigmoid", as the loss was; None: not known.
      **overrides: attributes that the model was made with.

    Raises:
      UserError: the parameters are not those of the model.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    arrays = unstack_arrays({path: np.asarray(array) for path, array in flat.items()})
    num_classes = arrays["head/kernel"].shape[-1] if "head/kernel" in arrays else 0
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    kept = {key: value for key, value in overrides.items() if key not in _WAYS_OF_COMPUTING}
    spec = ModelSpec(name, num_classes, kept, size)
    check_shapes(shapes_of(arrays), expected_shapes(spec, size))
    return Weights(spec, arrays, (preprocessing or Preprocessing()).at(size), class_names, probabilities)


# Attributes of a model that leave its parameters and its function as they are.
_WAYS_OF_COMPUTING = ("scan_layers", "remat", "attention", "return_attention", "dtype", "param_dtype")


def load(
    place: str | pathlib.Path,
    *,
    model: str | None = None,
    image_size: tuple[int, int] | None = None,
    format: str | None = None,
    allow_nan: bool = False,
) -> Weights:
    """Loads weights whole, or not at all: all names and shapes are checked first.

    Args:
      place: name of a released checkpoint (`list_checkpoints()`); or path, http(s):// or gs:// address of a .npz or
        .safetensors file; or path of a folder as Hugging Face and timm publish them; or workdir of a run of this
        project, gs:// too (its best parameters, or else the last).
      model: what they should be for, such as "ViT-B/16"; None: told by the arrays.
      image_size: height and width of the images they were trained on, where it was not a square.
      format: a key of `formats.FORMATS`; None: told by the names.
      allow_nan: whether values may be infinite or not a number.

    Raises:
      UserError: no such place, not a whole file, an unknown layout, not the model that was asked for, or values that
        are infinite or not a number.
    """
    place = str(place)
    released = get_checkpoint(place) if place in list_checkpoints() else None
    if place.startswith("gs://") and not place.endswith((".npz", ".safetensors")):
        weights = _load_run(_workdir_in_bucket(place))
    else:
        path = _fetch(place, released)
        is_cached = path.is_file() and path != pathlib.Path(place).expanduser()
        if path.is_dir() and (path / "starts.jsonl").is_file():
            weights = _load_run(path)
        else:
            try:
                weights = _load_file(path, released, model, image_size, format)
            except UserError as error:
                if "etch it again" not in str(error) or not is_cached or "Delete it" in str(error):
                    raise
                message = str(error).removesuffix("Fetch it again.").rstrip()
                raise UserError(f"{message} Delete it to fetch it again: rm {shlex.quote(str(path))}") from error
    if model is not None:
        _check_asked(weights, model)
    if not allow_nan:
        check_finite(weights.arrays, place)
    return dataclasses.replace(weights, source=place)


def _fetch(place: str, released: ReleasedCheckpoint | None) -> pathlib.Path:
    if released:
        return fetch(released.url, sha256=released.sha256)
    if re.fullmatch(r"[\w+-]+", place) and not pathlib.Path(place).exists():
        # Neither a file nor an address nor what a file would be called: a mistyped checkpoint.
        raise unknown_name("released checkpoint (and no such file)", place, list_checkpoints())
    return fetch(place)


def _load_file(
    path: pathlib.Path,
    released: ReleasedCheckpoint | None,
    model: str | None,
    image_size: tuple[int, int] | None,
    format_name: str | None,
) -> Weights:
    facts = huggingface.read_facts(path) if path.is_dir() else Facts()
    file = _file_in(path) if path.is_dir() else path
    opened = open_arrays(file)
    outline = opened.outline()
    layout = find_format(outline, format_name)
    names_of_parameters = layout.parameters(outline)
    opened.check(names_of_parameters)
    spec_given = _described_spec(opened)
    if spec_given:
        facts = _described_facts(opened.description, spec_given)
    num_heads, notes = _num_heads(layout, outline, facts, model)
    shapes = shapes_of(layout.read(outline, num_heads=num_heads))
    spec = spec_given or identify(shapes, image_size=image_size or _fitting_size(facts.image_size, shapes))
    if layout.name == "big_vision" and spec.overrides.get("position_embedding") == "none":
        # It knows no model without, and these need no array.
        spec = dataclasses.replace(spec, overrides=spec.overrides | {"position_embedding": "sincos_2d"})
    if not spec_given:
        model_made = spec.create()
        fixed = {key: value for key, value in layout.attributes.items() if getattr(model_made, key) != value}
        spec = dataclasses.replace(spec, overrides=spec.overrides | fixed | facts.overrides)
    if layout.name == "vit" and not spec_given and spec.overrides.get("position_embedding") == "none":
        notes += ("the file has no position embeddings: taken for a model without; sincos_2d has no arrays either",)
    if layout.name in ("timm", "huggingface") and not path.is_dir() and not spec_given:
        spec = dataclasses.replace(spec, overrides=spec.overrides | {"gelu": "exact"})
        notes += (
            "gelu=exact: the library's own, since no config.json says otherwise; name the folder if there is one",
        )
    if layout.name in ("timm", "huggingface") and spec.overrides.get("position_embedding") == "none":
        raise UserError(f"{file}: {layout.their_name(_POSITIONS)} is missing.")
    size = spec.image_size or facts.image_size or (released and (released.image_size,) * 2) or _PAPER_SIZE
    if spec_given and image_size is not None and tuple(size) != tuple(image_size):
        raise UserError(f"{file} is for images of {size[0]}x{size[1]}, not of {image_size[0]}x{image_size[1]}.")
    _check_arrays(shapes, spec, size, layout, f"{file}" if spec_given else None)
    if released:
        _check_released(path, released, spec)
    # Only now, that all names and shapes are those of the model, its arrays are read.
    ours = layout.read(opened.read(names_of_parameters), num_heads=num_heads)

    preprocessing = facts.preprocessing or (released and released.preprocessing) or Preprocessing().at(size)
    names = facts.class_names
    if names is None and (data := _data_of_head(released, spec)):
        names = class_names(data)
        if not released:
            notes += (f"{spec.num_classes:,} classes: taken to be those of {data}",)
    if not spec.num_classes:
        names = None
    if names is not None and len(names) != spec.num_classes:
        raise UserError(f"{path}: {len(names)} class names for {spec.num_classes} logits.")
    probabilities = facts.probabilities or (released and released.probabilities) or None
    return Weights(spec, ours, preprocessing, names, probabilities, layout.name, notes=facts.notes + notes)


def _file_in(folder: pathlib.Path) -> pathlib.Path:
    try:
        return huggingface.model_file(folder)
    except UserError as error:
        raise UserError(f"{error} Nor has it a starts.jsonl, as the workdir of a run has.") from error


def _check_arrays(
    shapes: Shapes, spec: ModelSpec, size: tuple[int, int], layout: Format, described: str | None
) -> None:
    """Raises unless the arrays are those of the model; `described` is the file whose description says which it is."""
    try:
        check_shapes(shapes, expected_shapes(spec, size), layout.their_name)
    except UserError as error:
        if described is None:
            raise
        where = f"{described}.json" if described.endswith(".npz") else "its header"
        raise UserError(f"{described} does not hold {spec}, as {where} says: {error}") from error


def _check_released(path: pathlib.Path, released: ReleasedCheckpoint, spec: ModelSpec) -> None:
    """Raises unless a file holds what its name says."""
    expected = create_model(released.model, num_classes=released.num_classes, **released.model_overrides)
    size = (released.image_size, released.image_size)
    if spec.create() != expected or (spec.image_size or size) != size:
        raise UserError(
            f"{path} holds {spec}, where {released.name} is {released.model} with {released.num_classes:,} classes for "
            f"images of {size[0]}x{size[1]}. Delete it to fetch it again."
        )


def find_format(arrays: Arrays, name: str | None = None) -> Format:
    """Tells the format by the names of the arrays.

    Raises:
      UserError: none that is known, or the one that was asked for is not.
    """
    if name is not None:
        if name not in FORMATS:
            raise unknown_name("format", name, FORMATS)
        return FORMATS[name]
    if not arrays:
        raise UserError("there are no arrays in it.")
    for layout in FORMATS.values():
        if layout.is_recognised(layout.normalize(arrays)):
            return layout
    raise UserError(
        f"names such as {list_names(arrays)} are those of no format that vit_jax knows: "
        + "; ".join(layout.description for layout in FORMATS.values())
        + "."
    )


def _described_spec(opened: ArrayFile) -> ModelSpec | None:
    """The model that the file itself tells, if this project wrote it."""
    if not opened.description:
        return None
    fields = Fields(opened.description, f"the description of {opened.path}")
    # No attribute of a model is larger than the number of its parameters, nor are there more layers than arrays.
    largest, most_layers = sum(map(math.prod, opened.shapes.values())), min(len(opened.shapes), MAX_LAYERS)
    try:
        given = fields.fields("overrides")
        overrides = _read_attributes(given, largest, most_layers)
        if unknown := sorted(given.values.keys() & set(_WAYS_OF_COMPUTING)):
            raise given.error(unknown[0], "no such attribute")
        size = fields.integers("image_size", None, length=2, at_least=1, at_most=MAX_SIDE)
        spec = ModelSpec(
            fields.text("model"),
            fields.integer("num_classes", at_least=0, at_most=largest),
            overrides,
            None if size is None else (size[0], size[1]),
        )
        numbers = [int(number) for number in re.findall(r"[0-9]{1,18}", spec.name)]
        if max(numbers, default=0) > largest:
            raise fields.error("model", "a model of this file's size")
        spec.create()
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{fields.where} is damaged: {error!r:.200}. Delete or mend it.") from error
    return spec


def _read_attributes(given: Fields, largest: int, most_layers: int) -> dict[str, Any]:
    """Attributes of a model as they were before JSON made lists of tuples; null ones are left out.

    Args:
      given: the attributes.
      largest: the most that a dimension can be.
      most_layers: the most layers, or units of a stage, that there can be.

    Raises:
      UserError: one is not of its type and range.
    """
    for name in ("num_layers", "num_heads", "hidden_dim", "mlp_dim", "patch_size", "width_factor"):
        given.integer(name, None, at_least=1, at_most=most_layers if name == "num_layers" else largest)
    for name in ("stages", "resnet"):
        given.integers(name, None, at_least=1, at_most=most_layers)
    for name in ("name", "pool", "gelu", "position_embedding", "position_embedding_at", "root_padding"):
        given.text(name, None)
    given.flag("pre_logits", None)
    attributes = {name: value for name, value in given.values.items() if value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in attributes.items()}


def _described_facts(description: dict[str, Any], spec: ModelSpec) -> Facts:
    fields = Fields(description, "the description")
    return Facts(
        num_heads=getattr(spec.create(), "num_heads", None),
        image_size=spec.image_size,
        preprocessing=Preprocessing.from_json(fields.fields("preprocessing").values),
        class_names=fields.texts("class_names", None) or None,
        probabilities=fields.text("probabilities", None, choices=("softmax", "sigmoid")),
    )


def _num_heads(layout: Format, arrays: Arrays, facts: Facts, model: str | None) -> tuple[int | None, tuple[str, ...]]:
    """Attention heads, for the layouts whose arrays do not tell; and what was taken for granted."""
    if facts.num_heads:
        return facts.num_heads, ()
    if model is not None:
        return getattr(create_model(model, num_classes=0), "num_heads", None), ()
    if layout.name in ("timm", "huggingface"):
        kernel = next(
            (array for name, array in arrays.items() if re.search(r"patch_embed\w*\.proj\w*\.weight", name)), None
        )
        for name, variant in VARIANTS.items():
            if kernel is not None and variant.hidden_dim == kernel.shape[0]:
                return variant.num_heads, (f"{variant.num_heads} attention heads: taken from ViT-{name}",)
    return None, ()


def _fitting_size(size: tuple[int, int] | None, shapes: Shapes) -> tuple[int, int] | None:
    """A size that stands beside the arrays, unless the position embeddings contradict it."""
    positions = shapes.get("Transformer/posembed_input/pos_embedding")
    if size is None or positions is None:
        return size
    model = identify(shapes, image_size=size).create()
    fits = positions[1] == model.num_prefix_tokens + math.prod(model.grid(*size))
    return size if fits else None


def _data_of_head(released: ReleasedCheckpoint | None, spec: ModelSpec) -> str | None:
    """The data set that the head is for, where class names of it are at hand."""
    if released:
        return released.class_names
    lengths = {len(class_names(data)): data for data in DATA_SETS}
    return lengths.get(spec.num_classes)


def _check_asked(weights: Weights, name: str) -> None:
    """Raises unless the weights are of the model of that name, whatever its head; names the first differences."""
    if weights.spec.name == name:
        return  # with attributes of its own, perhaps
    # What a name does not say is a matter of the file: pool, position embeddings, pre-logits.
    dimensions = ("num_layers", "hidden_dim", "mlp_dim", "num_heads", "resnet", "patch_size", "stages")
    attributes = {key for key in vars(create_model(name, num_classes=0))} - set(dimensions)
    kept = {key: value for key, value in weights.spec.overrides.items() if key in attributes}
    asked = ModelSpec(name, weights.spec.num_classes, kept)
    size = weights.spec.image_size or weights.preprocessing.image_size
    try:
        check_shapes(shapes_of(weights.arrays), expected_shapes(asked, size))
    except UserError as error:
        raise UserError(f"this is {weights.spec}, not {name}: {error}") from error


def _workdir_in_bucket(place: str) -> AnyPath:
    path = parse(place)
    if not (path / "starts.jsonl").exists():
        raise UserError(
            f"{place} is not the workdir of a run. Of files in buckets, .npz and .safetensors can be read: name one."
        )
    return path


def _load_run(workdir: AnyPath) -> Weights:
    """The best parameters of a run of this project, or the last ones where none were kept as the best."""
    from vit_jax.checkpoints import read_parameters

    config = read_json(workdir / "config.json")
    fields = Fields(config, str(workdir / "config.json"))
    if "data" not in config:
        raise UserError(f"{workdir} is the workdir of a run, but config.json is missing or is not that of a run.")
    found = read_parameters(workdir / "best") or read_parameters(workdir / "checkpoints")
    if found is None:
        raise UserError(f"{workdir} has no parameters yet: no checkpoint was saved.")
    _, params, _ = found
    # A config may leave to the weights it begins with what its model is.
    made = workdir / "model.json"
    model = Fields(read_json(made), str(made)) if made.exists() else fields.fields("model")
    largest = sum(leaf.size for leaf in jax.tree.leaves(params))
    overrides = _read_attributes(model, largest, MAX_LAYERS)
    name = overrides.pop("name", None)
    if name is None:
        raise UserError(f"{workdir} does not say which model it trained: model.json is missing or damaged.")
    overrides.pop("num_classes", None)
    for plain in ("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate", "head_bias"):
        overrides.pop(plain, None)  # of training alone
    notes: tuple[str, ...] = ()
    if kept := read_facts(workdir):
        names, loss, preprocessing = kept.class_names, kept.loss, Preprocessing.from_json(kept.preprocessing)
    else:
        data = fields.fields("data")
        names, notes = _class_names_of_old_run(workdir, config)
        loss = fields.text("loss", "softmax", choices=("softmax", "sigmoid"))
        preprocessing = Preprocessing.of_evaluation(
            data.integer("image_size", at_least=1, at_most=MAX_SIDE),
            data.integer("eval_resize_small", None, at_least=1, at_most=MAX_SIDE),
            data.text("eval_resize", "bilinear"),
            data.flag("exif_orientation", False),  # a run without the field turned none
        )
    size = preprocessing.image_size
    weights = from_params(name, params, image_size=size, preprocessing=preprocessing, probabilities=loss, **overrides)
    if names is not None and len(names) != weights.spec.num_classes:
        notes += (f"the head has {weights.spec.num_classes:,} classes, and the data had {len(names):,}: no names",)
        names = None
    return dataclasses.replace(weights, class_names=names, format="run", notes=notes)


def _class_names_of_old_run(workdir: AnyPath, config: dict[str, Any]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Class names of a run that is older than facts.json, and a note that says where they are from.

    They are read from its data set, if the checkpoints say that its files are those that were trained on.
    """
    from vit_jax.checkpoints import read_extra
    from vit_jax.data.sources import open_source

    data = config["data"]
    older = f"{workdir} was written before runs kept the names of their classes, and its data set"
    if data.get("mixture"):
        return None, (f"{older} is a mixture: labels have no names",)
    try:
        source = open_source(
            data["dataset"],
            data["train_split"],
            image_key=data.get("image_key"),
            label_key=data.get("label_key"),
            max_labels=data.get("max_labels"),
        )
    except UserError:
        return None, (f"{older} {data['dataset']!r} is not here: labels have no names",)
    trained_on = ((read_extra(workdir / "checkpoints") or {}).get("data") or {}).get("examples")
    if trained_on != source.fingerprint():
        return None, (f"{older} {data['dataset']!r} has changed since, or may have: labels have no names",)
    if source.class_names is None:
        return None, ()
    return tuple(source.class_names), (f"{older} has not changed: names of classes are from {data['dataset']!r}",)


def save(weights: Weights, path: str | pathlib.Path, *, to: str | None = None) -> pathlib.Path:
    """Saves weights; the file is there as a whole or not at all.

    Args:
      weights: from `load` or `from_params`.
      path: a .npz file; for timm a .safetensors file or a folder; for Hugging Face a folder.
      to: "vit", "bit" or "axial" (the released .npz layout of these models), "big_vision", "timm" or "huggingface";
        None: the released layout.

    Returns:
      Where the arrays are.

    Raises:
      UserError: the format has no place for some array or for the preprocessing, or the disk is full. Then nothing is
        written. What else the format cannot say is logged as a warning.
    """
    path = pathlib.Path(path)
    layout = _layout_for(weights.spec, to)
    spec = weights.spec
    if layout.name == "huggingface" and not re.fullmatch(r"ViT-\w+/\d+", spec.name):
        raise UserError(f"Hugging Face's ViT is none with a ResNet; {spec.name} can be saved --to=vit or --to=timm.")
    if layout.name == "huggingface" and getattr(spec.create(), "pool", None) != "cls":
        raise UserError(f"Hugging Face's ViT has a class token; {spec} can be saved --to=vit or --to=timm.")
    is_timm = layout.name in ("timm", "timm_bit")
    if is_timm and path.suffix != ".safetensors":
        huggingface.timm_name(spec)  # raises if there is none
    if layout.name != "vit" and spec.overrides.get("position_embedding_at", "stem") != "stem":
        raise UserError(f"{layout.description} has position embeddings at the stem alone; save {spec} --to=vit.")
    kinds = {"vit": None, "big_vision": ("learned_1d", "sincos_2d")}.get(layout.name, ("learned_1d",))
    if kinds and spec.overrides.get("position_embedding", "learned_1d") not in kinds:
        raise UserError(f"{layout.description} has no such position embeddings; save {spec} --to=vit.")
    made = spec.create()
    for attribute, value in layout.attributes.items():
        if getattr(made, attribute) != value:
            raise UserError(
                f"a {layout.description} is of a model with {attribute}={value!r}; this one has "
                f"{getattr(made, attribute)!r} and would compute something else there. Save it without --to."
            )
    arrays = layout.write(weights.arrays)

    if layout.name == "huggingface" or (is_timm and path.suffix != ".safetensors"):
        if path.suffix in (".npz", ".safetensors"):
            raise UserError(f"{layout.description} is a folder; name one instead of {path.name}.")
        describe = (
            huggingface.describe_for_huggingface if layout.name == "huggingface" else huggingface.describe_for_timm
        )
        described, notes = describe(spec, weights.preprocessing, weights.class_names, weights.probabilities)
        file = path / huggingface.MODEL_FILE
        write_folder(file, arrays, weights.describe(), described)
    else:
        wanted = ".safetensors" if is_timm else ".npz"
        if path.suffix != wanted:
            raise UserError(f"{layout.description} is a {wanted} file; name it so instead of {path.name!r}.")
        file, notes = path, _notes_of_file(layout, made, path)
        write_arrays(file, arrays, weights.describe())
    for note in notes:
        logger.warning("note: %s", note)
    return file


def _notes_of_file(layout: Format, model: Any, path: pathlib.Path) -> list[str]:
    """What others do not know of a single file."""
    if layout.name in ("timm", "timm_bit"):
        return ["timm reads neither preprocessing nor class names of a single file; name a folder to write them too"]
    if layout.name in ("big_vision", "big_vision_bit"):
        return [f"big_vision has no place for preprocessing and class names; {path.name}.json has them, for vit_jax"]
    if getattr(model, "root_padding", "zeros") != "zeros":
        return [
            f"{path.name}.json says that the root is padded with the lowest number; released code of BiT, which does "
            "not read it, pads with zeros"
        ]
    return []


def _layout_for(spec: ModelSpec, to: str | None) -> Format:
    is_bit = re.fullmatch(r"R\d+x\d+", spec.name) is not None
    is_axial = spec.name.startswith("Axial")
    own = "bit" if is_bit else "axial" if is_axial else "vit"
    if to in (None, "npz", own):
        return FORMATS[own]
    choices = {"timm": "timm_bit" if is_bit else "timm", "big_vision": "big_vision_bit" if is_bit else "big_vision"}
    choices["huggingface"] = "huggingface"
    if to not in choices:
        raise unknown_name("format to write", str(to), [own, *choices])
    if is_axial or (is_bit and to == "huggingface"):
        raise UserError(f"{to} has no model like {spec.name}. Save it --to={own}.")
    return FORMATS[choices[to]]


def shapes_of(arrays: Arrays) -> Shapes:
    """Shapes by name."""
    return {name: array.shape for name, array in arrays.items()}
