"""Every field of a config, with its default and its allowed values.

A config file starts from `base_config()` and assigns what it changes. An unknown field is an error that suggests the
nearest known one. `check_fields` compares every field with its entry in `CHECKS`.
"""

import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vit_jax import field_checks as checks
from vit_jax.console import quote_argument
from vit_jax.data.imagenet_test_sets import IMAGENET_TEST_SETS
from vit_jax.errors import UserError, unknown_name
from vit_jax.evaluators.registry import TYPES, default_entries, fields_of
from vit_jax.field_checks import Check, Number, Several, Value


def base_config() -> ConfigDict:
    """Returns all fields. `placeholder(type)` is None until assigned."""
    config = ConfigDict()
    config.seed = 0

    # Pre-trained weights: name of a released checkpoint, a file, a folder, an address, or the workdir of a run
    # (docs/weights.md). The head is new, position embeddings are interpolated to the image size, and the weights set
    # the fields of the model that are None.
    config.weights = placeholder(str)
    config.keep_head = False  # keep the head of the weights, for the same classes
    # Patterns, matched anywhere in the names of parameters; only these are trained. (): all are; ("^head/",) is a
    # linear probe.
    config.train_only = ()

    config.model = ConfigDict()
    config.model.name = "ViT-B/16"  # see vit_jax.models.list_models(); None: that of the weights
    config.model.num_classes = placeholder(int)  # None: the data set's number
    config.model.num_layers = placeholder(int)  # these four: None: by the model's name
    config.model.hidden_dim = placeholder(int)
    config.model.mlp_dim = placeholder(int)
    config.model.num_heads = placeholder(int)
    config.model.stages = placeholder(tuple)  # of a ResNet: units of each stage; None: by the model's name
    config.model.resnet = placeholder(tuple)  # the same of a hybrid's ResNet; (): only its root
    config.model.root_padding = placeholder(str)  # of a ResNet: "zeros" (the default); "lowest", as big_vision's BiT
    config.model.pool = placeholder(
        str
    )  # "cls" (the default): class token; "gap": mean of all tokens; "map": attention
    # The position embedding, "learned_1d" (the default), "learned_2d", "relative", "sincos_2d" or "none", and where it
    # is added, "stem" (the default), "every_layer" or "shared" (table 8).
    config.model.position_embedding = placeholder(str)
    config.model.position_embedding_at = placeholder(str)
    config.model.pre_logits = placeholder(bool)  # hidden tanh layer of the pre-training head; none by default
    config.model.head_bias = placeholder(float)  # initial bias of the head; 0 by default
    config.model.dropout_rate = placeholder(float)  # 0 by default
    config.model.attention_dropout_rate = placeholder(float)  # 0 by default
    config.model.stochastic_depth_rate = placeholder(float)  # of the last layer, growing from the first; 0 by default
    # "auto" (the default), "einsum", "xla", "cudnn" (NVIDIA GPUs), or "half_logits" (faster on TPU, less exact); with
    # attention dropout one of the first two.
    config.model.attention = placeholder(str)
    config.model.dtype = "float32"  # of the computation; "bfloat16" on TPU and GPU
    config.model.param_dtype = "float32"
    config.model.scan_layers = placeholder(bool)  # loop over stacked layers, which compiles faster; not by default
    config.model.remat = placeholder(str)  # "none" (the default), "dots" or "full": saves memory, costs time

    config.data = ConfigDict()
    config.data.dataset = "digits"  # "digits", "tfds:<name>", or a path or pattern of files: see docs/data_sets.md
    config.data.mixture = ()  # pairs (data set, weight) to train on instead; each has train_split
    config.data.train_split = "train"  # slices as in TFDS: "train[:99%]"
    config.data.eval_split = placeholder(str)  # None: no evaluation
    config.data.eval_labels = placeholder(str)  # path of real.json: evaluate against the ReaL labels of ImageNet
    config.data.image_key = placeholder(str)  # these two: features of records, if their names are unusual
    config.data.label_key = placeholder(str)
    config.data.max_labels = placeholder(int)  # largest number of labels of an image; None: the data set's, else 1
    config.data.image_size = 224  # pixels
    # Whether to turn images as their EXIF says. None: those in folders and zip files, but not those in records, as in
    # TensorFlow (docs/images.md).
    config.data.exif_orientation = placeholder(bool)
    config.data.inception_crop = True  # random crop of random area and aspect ratio
    config.data.crop_min_area = 0.05  # smallest share of the image in a crop
    config.data.random_crop_from = placeholder(int)  # resize to a square of this side, crop at random; not Inception's
    config.data.flip = True
    config.data.resize = "bilinear"  # "bilinear" (without antialiasing, as the paper), "area" or "bicubic"
    config.data.randaugment_layers = 0  # RandAugment: operations per image; 0 for none (AugReg, DeiT: 2)
    config.data.randaugment_magnitude = 15.0  # AugReg: 0, 10, 15 or 20, see randaugment.AUGREG; DeiT: 9
    config.data.randaugment_magnitude_std = 0.0  # DeiT: 0.5
    config.data.randaugment_operations = "tensorflow"  # AugReg's; DeiT: "timm". Made for about 224 pixels
    config.data.eval_resize_small = placeholder(int)  # resize the shorter side, crop the centre; None: resize to square
    config.data.eval_resize = "bilinear"  # see resize
    config.data.expected_train_images = placeholder(int)  # checked against the data set; lets a plan do without it
    config.data.expected_within = 0.0  # relative difference that is allowed
    config.data.how_to_prepare = ""  # shown when the data set is missing
    config.data.num_threads = placeholder(
        int
    )  # decoding threads, in each worker process if there are any; None: all cores
    config.data.num_workers = 0  # worker processes, for hosts with more than about 15 cores; 0: none
    config.data.prefetch = 2  # batches
    config.data.max_bad_records = 0  # number of unreadable images to skip; more are an error

    config.batch_size = 4096  # images in a step, over all devices
    config.accumulation_steps = 1  # number of parts in which a batch is computed
    config.epochs = placeholder(float)  # length of the run: set one of epochs, steps and images
    config.steps = placeholder(int)
    config.images = placeholder(int)
    config.objective = "classification"  # see vit_jax/experiment/objective.py
    config.loss = "softmax"  # "softmax" or "sigmoid"
    config.label_smoothing = 0.0
    config.mixup_alpha = 0.0  # AugReg: 0.2, 0.5 or 0.8; BiT: 0.1
    config.cutmix_alpha = 0.0  # DeiT: 1.0, with mixup 0.8

    config.masked_patches = ConfigDict()  # of the objective "masked_patches"
    config.masked_patches.target = "mean_colour"  # "mean_colour", "downsized" or "pixels"
    config.masked_patches.corruption_rate = 0.5  # share of the patches of each image

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # "adamw", "sgd", "adafactor", "lamb", "lion" or "muon"
    config.optimizer.learning_rate = 1e-3  # base, reached after the warm-up
    config.optimizer.schedule = "cosine"  # "linear", "cosine", "constant" or "drops"
    config.optimizer.warmup_steps = 0
    config.optimizer.end_learning_rate = 0.0
    config.optimizer.drop_at = ()  # of schedule "drops": shares of the run after which the rate is divided by 10
    config.optimizer.weight_decay = 0.0  # kernels only; times the learning rate at every step
    config.optimizer.clip_norm = placeholder(float)  # global norm of the gradient; None: no clipping
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999  # Lion's authors use 0.99
    config.optimizer.eps = 1e-8  # usual for LAMB: 1e-6
    config.optimizer.layer_decay = placeholder(float)  # learning rate of a layer relative to the layer above
    config.optimizer.momentum = 0.9  # of SGD and Muon (whose authors use 0.95)
    config.optimizer.momentum_dtype = "float32"  # of the momentum, or the first moment

    config.polyak_decay = placeholder(float)  # evaluate an average of the parameters; the paper: 0.9999

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices over which the batch is split; -1: all devices, divided by the other axis
    config.mesh.model = 1  # devices that share each layer's heads and hidden units (sharding "fsdp+tensor")
    config.sharding = "replicated"  # "replicated", "fsdp" or "fsdp+tensor": see docs/sharding.md
    config.sharding_rules = ()  # pairs (pattern of parameter names, axes), before the preset's
    config.rng = "threefry2x32"  # for dropout and mixing; "rbg" is faster on TPU, but depends on the number of devices

    config.compiler_options = ()  # XLA's options for the training step, pairs (name, value): docs/tpu_speed.md

    # Evaluations by name: each entry has a type, every_steps (None: at the end only), and the fields of its type
    # (vit_jax/evaluators/registry.py). Every config has entries for data.eval_split ("eval_split"), ImageNet's other
    # test sets ("real", "imagenet_v2", ...) and few-shot accuracy ("fewshot"); those without data are left out.
    config.evals = ConfigDict(default_entries())
    config.eval_batch_size = placeholder(int)  # None: batch_size
    config.log_every_steps = 50
    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep = 2  # number of newest checkpoints to keep
    config.checkpoint.keep_best = True  # keep the best parameters too
    # The metric to maximise for the best parameters, such as "fewshot/cifar10/pre_logits/5shot"; None: the accuracy on
    # data.eval_split.
    config.checkpoint.best_metric = placeholder(str)

    config.watchdog_seconds = 1800.0  # a longer step counts as hung: stacks are written, the run ends; 0: never
    config.profile = ConfigDict()
    config.profile.first_step = placeholder(int)  # of a profile (docs/profiling.md); None: no profile
    config.profile.num_steps = 5

    config.lock()
    config.evals.unlock()  # for more entries
    for each in config.evals.values():
        each.lock()
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested fields: `{"model": {"name": "x"}}` to `{"model.name": "x"}`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


# Fields renamed since earlier versions, with their present names.
_RENAMED = {
    "eval_every_steps": ("evals.eval_split.every_steps",),
    "variants.every_steps": tuple(f"evals.{name}.every_steps" for name in IMAGENET_TEST_SETS),
    **{f"variants.{name}": (f"evals.{name}.dataset",) for name in IMAGENET_TEST_SETS},
    **{f"fewshot.{field}": (f"evals.fewshot.{field}",) for field in TYPES["fewshot"].fields if field != "type"},
}


def with_present_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the flat fields of a config that an earlier version recorded."""
    return {name: value for recorded, value in fields.items() for name in _RENAMED.get(recorded, (recorded,))}


LENGTHS = ("epochs", "steps", "images")


def set_length(config: ConfigDict, assigned: Collection[str]) -> None:
    """Unsets the other lengths of the run if overrides set one of `epochs`, `steps` and `images`.

    `assigned` are the names of the fields that were overridden with a value other than None.

    Raises:
      UserError: two lengths were overridden.
    """
    given = [name for name in LENGTHS if name in assigned]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(f'--config.{name}={config[name]}' for name in given)} both set the length of the run. "
            "Leave one of them out."
        )
    for name in LENGTHS if given else ():
        if name not in given:
            with config.ignore_type():
                config[name] = None


def _field_types(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yields the flat name and the type of each field outside of `config.evals`, also of those that are None."""
    for name in config:
        if isinstance(config[name], ConfigDict):
            yield from _field_types(config[name], f"{prefix}{name}.") if name != "evals" else ()
        else:
            yield prefix + name, config.get_type(name)


# Allowed values of fields by type. Names, patterns and pairs are checked where they are used.
_BY_TYPE = {bool: checks.FLAG, str: checks.TEXT, tuple: checks.ANY_TUPLE}

# Limits of lengths, sizes and counts are far above real use: they catch typos before these fill the memory.
_RANGES: dict[str, Check] = {
    **dict.fromkeys(("seed", "optimizer.warmup_steps"), checks.COUNT),
    **dict.fromkeys(("steps", "log_every_steps", "checkpoint.every_steps"), checks.STEPS),
    **dict.fromkeys(("profile.first_step", "profile.num_steps"), checks.STEPS),
    **dict.fromkeys(("batch_size", "eval_batch_size", "accumulation_steps"), checks.BATCH),
    **dict.fromkeys(("model.hidden_dim", "model.mlp_dim", "model.num_heads"), checks.SIZE),
    **dict.fromkeys(("data.image_size", "data.random_crop_from", "data.eval_resize_small"), checks.PIXELS),
    **dict.fromkeys(("model.dtype", "model.param_dtype", "optimizer.momentum_dtype"), checks.DTYPE),
    **dict.fromkeys(("mesh.data", "mesh.model"), checks.DEVICES),
    **dict.fromkeys(("model.dropout_rate", "model.attention_dropout_rate"), checks.SHARE),
    **dict.fromkeys(("model.stochastic_depth_rate", "label_smoothing", "data.expected_within"), checks.SHARE),
    **dict.fromkeys(("optimizer.b1", "optimizer.b2", "optimizer.momentum", "polyak_decay"), checks.SHARE),
    **dict.fromkeys(("data.randaugment_magnitude", "data.randaugment_magnitude_std"), checks.NOT_NEGATIVE),
    **dict.fromkeys(("mixup_alpha", "cutmix_alpha", "optimizer.weight_decay"), checks.NOT_NEGATIVE),
    **dict.fromkeys(("optimizer.learning_rate", "optimizer.end_learning_rate"), checks.NOT_NEGATIVE),
    "model.num_classes": Number(1, 2**26, whole=True),
    "model.num_layers": checks.LAYERS,
    "model.stages": Several(checks.LAYERS, at_least=1),
    "model.resnet": Several(checks.LAYERS),
    "model.head_bias": Number(-checks.MOST_FLOAT),
    # Metrics of training and of time have these prefixes.
    "data.eval_split": Value(
        "a split of another name than 'train' or 'time', such as 'train[:1%]'",
        lambda value: isinstance(value, str) and value not in ("train", "time"),
    ),
    "data.max_labels": Number(1, 100_000, whole=True),
    "data.crop_min_area": checks.POSITIVE_SHARE,
    "data.randaugment_layers": Number(0, 1000, whole=True),
    "data.expected_train_images": Number(1, 10**15, whole=True),
    "data.num_threads": Number(1, 4096, whole=True),
    "data.num_workers": Number(0, 1024, whole=True),
    "data.prefetch": Number(1, 10_000, whole=True),
    "data.max_bad_records": Number(0, 10**15, whole=True),
    "epochs": Number(0, 10**6, open_low=True),
    "images": Number(1, 10**15, whole=True),
    "optimizer.drop_at": Several(Number(0, 1, open_low=True, open_high=True), distinct=True),
    "optimizer.clip_norm": Number(0, open_low=True, hint=", or None for no clipping"),
    "optimizer.eps": Number(0, open_low=True),
    "optimizer.layer_decay": Number(0, 1, open_low=True, hint=", or None for none"),
    "masked_patches.target": checks.one_of("mean_colour", "downsized", "pixels"),
    "masked_patches.corruption_rate": checks.POSITIVE_SHARE,
    "rng": checks.one_of("threefry2x32", "rbg", "unsafe_rbg"),  # `train_step.RNGS`
    "checkpoint.keep": Number(1, 10**6, whole=True),
    "watchdog_seconds": Number(0, 10**8),
}

# The check of each field; None is also accepted where it is the default.
CHECKS: dict[str, Check] = {
    name: _RANGES[name] if name in _RANGES else _BY_TYPE[kind] for name, kind in _field_types(base_config())
}

_MOST_BYTES = 2**40  # of the uint8 images of a batch, on all hosts together


def checked_fields(config: ConfigDict) -> Iterator[tuple[str, Any, Any, Check]]:
    """Yields each field's flat name, value, default and check.

    Raises:
      UserError: an entry of `config.evals` has an unknown type or field.
    """
    fields, defaults = flatten(config.to_dict()), flatten(base_config().to_dict())
    for name, check in CHECKS.items():
        yield name, fields[name], defaults[name], check
    for entry_name, entry in config.evals.items():
        for field, each in fields_of(entry, f"evals.{entry_name}").items():
            yield f"evals.{entry_name}.{field}", entry.get(field, each.default), each.default, each.check


def check_fields(config: ConfigDict) -> None:
    """Checks the type and range of each field, and the fields that limit each other.

    Raises:
      UserError: a wrong value; the message has the field, its value, the allowed values, and what to type.
    """
    for name, value, default, check in checked_fields(config):
        if value is None:
            if default is not None and name != "model.name":
                raise UserError(f"{name} cannot be None; its default is {default!r}.")
        elif not check.accepts(value):
            argument = shlex.quote(f"--config.{name}={default}")
            rounded = isinstance(check, Number) and isinstance(value, float) and check.contains(value)
            as_rounded = f" (as float32 {checks.as_float32(value):g})" if rounded else ""
            raise UserError(f"{name} must be {check.expected}, got {value!r}{as_rounded}. The default is {argument}.")
    for batch in ("batch_size", "eval_batch_size"):
        size = 3 * (config[batch] or 0) * config.data.image_size**2
        if size > _MOST_BYTES:
            raise UserError(
                f"{batch} {config[batch]:,} of images of {config.data.image_size} pixels is {size / 1e12:,.1f} TB. Set "
                f"--config.{batch} to at most {_MOST_BYTES // (3 * config.data.image_size**2):,}."
            )


def parse_config_string(string: str | None, **defaults: Any) -> ConfigDict:
    r"""Reads the arguments after the colon of `--config=configs/x.py:key=value,...`.

    Protect a comma within a value by a backslash (`dataset=/data/cats\, dogs`) or by quotes around the value
    (`dataset="/data/cats, dogs"`). The keys are those of `defaults`; a value is read as its default's type.

    Raises:
      UserError: unknown key, or a value of the wrong type.
    """
    arguments = ConfigDict(defaults)
    before = ""  # the pair to the left, which this may be a part of
    for pair in _split_arguments(string or ""):
        if not pair:
            continue
        key, equals, value = pair.partition("=")
        if key not in defaults and before and (not equals or not key.isidentifier()):
            name, _, start = before.partition("=")
            whole = f"{start},{pair}"
            raise UserError(
                f"config arguments are written name=value, got {pair!r}. If the comma before it belongs to {name}, put "
                f"the value in quotes: {name}={quote_argument(whole)} (for data sets, --config.data.dataset='{whole}' "
                f"often does as well). Names: {', '.join(defaults)}."
            )
        if not equals and key not in defaults:
            raise UserError(f"config arguments are written name=value, got {pair!r}. Names: {', '.join(defaults)}.")
        if key not in defaults:
            raise unknown_name("config argument", key, defaults)
        before, value = pair, _unquoted(value)
        kind = type(defaults[key])
        try:
            if not equals:
                raise ValueError
            arguments[key] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError) as error:
            raise UserError(f"config argument {key!r} takes {key}=<{kind.__name__}>, got {pair!r}.") from error
    return arguments


# A pair: its name, then a value in quotes, or anything in which commas have a backslash before them.
_PAIR = re.compile(r"""[^=,]*=(?:"[^"]*"|'[^']*')(?=,|$)|(?:\\,|[^,])*""")


def _split_arguments(string: str) -> Iterator[str]:
    at = 0
    while at <= len(string):
        match = _PAIR.match(string, at)
        yield match[0] if match else ""
        at = (match.end() if match else at) + 1


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value.replace("\\,", ",")
