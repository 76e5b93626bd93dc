"""Every field of a config, with its default. A config file starts from `base_config()` and assigns what it changes.

Fields that are not here are refused, with the nearest one that is.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vit_jax.errors import UserError, unknown_name


def base_config() -> ConfigDict:
    """All fields. `placeholder(type)` is None until assigned."""
    config = ConfigDict()
    config.seed = 0

    # Pre-trained weights to begin with: name of a released checkpoint, a file, a folder, an address, or the workdir of
    # a run (docs/weights.md). The head begins anew, position embeddings are interpolated to the image size, and fields
    # of the model that are None are as the weights have them.
    config.weights = placeholder(str)
    config.keep_head = False  # take over the head of the weights as well: for the same classes
    # Patterns of names of the parameters that are trained, found anywhere in them; all others stay. (): all are
    # trained; ("^head/",) is a linear probe.
    config.train_only = ()

    config.model = ConfigDict()
    config.model.name = "ViT-B/16"  # see vit_jax.models.list_models(); None: as the weights say
    config.model.num_classes = placeholder(int)  # None: as many as the data set has
    config.model.num_layers = placeholder(int)  # these four: None: as the model's name says
    config.model.hidden_dim = placeholder(int)
    config.model.mlp_dim = placeholder(int)
    config.model.num_heads = placeholder(int)
    config.model.stages = placeholder(tuple)  # of a ResNet: units of each stage; None: as the model's name says
    config.model.pool = placeholder(
        str
    )  # "cls" (the default): class token; "gap": mean of all tokens; "map": attention
    # What tells tokens where they are, "learned_1d" (the default), "learned_2d", "relative", "sincos_2d" or "none", and
    # where it is added, "stem" (the default), "every_layer" or "shared" (table 8).
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
    config.data.mixture = ()  # of (data set, weight): train on these instead; each has train_split
    config.data.train_split = "train"  # slices as in TFDS: "train[:99%]"
    config.data.eval_split = placeholder(str)  # None: no evaluation
    config.data.eval_labels = placeholder(str)  # path of real.json: evaluate against the ReaL labels of ImageNet
    config.data.image_key = placeholder(str)  # these two: features of records, where they are not the usual
    config.data.label_key = placeholder(str)
    config.data.max_labels = placeholder(int)  # most labels an image has; None: as the data set says, else 1
    config.data.image_size = 224  # pixels
    config.data.inception_crop = True  # random crop of random area and aspect ratio
    config.data.crop_min_area = 0.05  # smallest share of the image a crop shows
    config.data.random_crop_from = placeholder(int)  # resize to a square of this side, crop at random; not Inception's
    config.data.flip = True
    config.data.resize = "bilinear"  # "bilinear" (without antialiasing, as the paper), "area" or "bicubic"
    config.data.randaugment_layers = 0  # RandAugment: operations an image; 0 for none (AugReg, DeiT: 2)
    config.data.randaugment_magnitude = 15.0  # AugReg: 0, 10, 15 or 20, see data.augment.AUGREG; DeiT: 9
    config.data.randaugment_magnitude_std = 0.0  # DeiT: 0.5
    config.data.randaugment_operations = "tensorflow"  # AugReg's; DeiT: "timm". Made for some 224 pixels
    config.data.eval_resize_small = placeholder(int)  # resize the shorter side, crop the centre; None: resize to square
    config.data.eval_resize = "bilinear"  # as resize
    config.data.expected_train_images = placeholder(int)  # checked against the data set; lets a plan do without it
    config.data.expected_within = 0.0  # share of them by which the data set may differ
    config.data.how_to_prepare = ""  # told when the data set is missing
    config.data.num_threads = placeholder(int)  # that decode, in each worker process if there are; None: all cores
    config.data.num_workers = 0  # worker processes, for hosts with more than some 15 cores; 0: none
    config.data.prefetch = 2  # batches
    config.data.max_bad_records = 0  # images that may be left out because they cannot be read, before it is an error

    config.batch_size = 4096  # images in a step, over all devices
    config.accumulation_steps = 1  # parts that a batch is computed in
    config.epochs = placeholder(float)  # length of the run: set one of epochs, steps and images
    config.steps = placeholder(int)
    config.images = placeholder(int)
    config.loss = "softmax"  # "softmax" or "sigmoid"
    config.label_smoothing = 0.0
    config.mixup_alpha = 0.0  # AugReg: 0.2, 0.5 or 0.8; BiT: 0.1
    config.cutmix_alpha = 0.0  # DeiT: 1.0, with mixup 0.8

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # "adamw" or "sgd"
    config.optimizer.learning_rate = 1e-3  # base, reached after the warm-up
    config.optimizer.schedule = "cosine"  # "linear", "cosine", "constant" or "drops"
    config.optimizer.warmup_steps = 0
    config.optimizer.end_learning_rate = 0.0
    config.optimizer.drop_at = ()  # of schedule "drops": shares of the run after which the rate is divided by 10
    config.optimizer.weight_decay = 0.0  # kernels only; times the learning rate at every step
    config.optimizer.clip_norm = placeholder(float)  # global norm of the gradient; None: no clipping
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.layer_decay = placeholder(float)  # learning rate of a layer over that of the one above
    config.optimizer.momentum = 0.9
    config.optimizer.momentum_dtype = "float32"  # of SGD's momentum and Adam's first moment

    config.polyak_decay = placeholder(float)  # of the average of the parameters that is evaluated; the paper: 0.9999

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices along which the batch is split; -1: all there are, divided by the other axis
    config.mesh.model = 1  # devices that share each layer's heads and hidden units (sharding "fsdp+tensor")
    config.sharding = "replicated"  # "replicated", "fsdp" or "fsdp+tensor": see docs/sharding.md
    config.sharding_rules = ()  # of (pattern of parameter names, axes), before the preset's
    config.rng = "threefry2x32"  # of dropout and mixing; "rbg" is faster on TPU, but depends on the number of devices

    config.compiler_options = ()  # of XLA for the training step, pairs of name and value: docs/tpu_speed.md

    # Linear classifiers in closed form on frozen representations of a few images per class (docs/fewshot.md).
    config.fewshot = ConfigDict()
    config.fewshot.datasets = ()  # as data.dataset; (): none
    config.fewshot.train_split = "train"  # from which images are drawn; the paper's ImageNet pool: "train[:65000]"
    config.fewshot.test_split = "test"
    config.fewshot.validation_split = placeholder(str)  # on which l2 is chosen, if there are several
    config.fewshot.shots = (1, 5, 10, 25)  # images per class
    config.fewshot.l2 = (2.0**10,)  # regularisation
    config.fewshot.seeds = 3  # draws of images
    config.fewshot.representations = ("pre_logits",)  # names of intermediates of the model
    config.fewshot.image_size = placeholder(int)  # None: data.image_size
    config.fewshot.crop_from = placeholder(int)  # side of the square whose centre is taken; None: 256 to 224 pixels
    config.fewshot.whiten = True  # by mean and standard deviation of the images drawn
    config.fewshot.bias = 100.0  # a feature so large that its weight is hardly regularised; 0: no bias
    config.fewshot.every_steps = placeholder(int)  # None: at the end only

    # Other test sets for models with ImageNet's 1,000 classes (docs/imagenet_variants.md): places; None: left out.
    config.variants = ConfigDict()
    config.variants.real = placeholder(str)  # path of real.json: the evaluation split labelled anew
    config.variants.imagenet_v2 = placeholder(str)
    config.variants.imagenet_r = placeholder(str)
    config.variants.imagenet_a = placeholder(str)
    config.variants.imagenet_sketch = placeholder(str)
    config.variants.objectnet = placeholder(str)
    config.variants.every_steps = placeholder(int)  # None: at the end only

    config.eval_batch_size = placeholder(int)  # None: batch_size
    config.eval_every_steps = placeholder(int)  # None: at the end only
    config.log_every_steps = 50
    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep = 2  # newest ones
    config.checkpoint.keep_best = True  # also the parameters with the best accuracy

    config.watchdog_seconds = 1800.0  # a step that takes longer hangs: its stacks are written, the run ends; 0: never
    config.profile = ConfigDict()
    config.profile.first_step = placeholder(int)  # of a trace for docs/profiling.md; None: no trace
    config.profile.num_steps = 5

    return config.lock()


def parse_config_string(string: str | None, **defaults: Any) -> ConfigDict:
    """Reads what follows the colon of `--config=configs/x.py:key=value,...`.

    Args:
      string: `key=value` pairs, comma-separated; None or "" for none.
      **defaults: the keys there are; a value is read as its default's type.

    Returns:
      A value for each key.

    Raises:
      UserError: unknown key, or a value of the wrong type.
    """
    arguments = ConfigDict(defaults)
    for pair in (string or "").split(","):
        if not pair:
            continue
        key, equals, value = pair.partition("=")
        if not equals and key not in defaults:
            raise UserError(f"config arguments are written name=value, got {pair!r}. Names: {', '.join(defaults)}.")
        if key not in defaults:
            raise unknown_name("config argument", key, defaults)
        kind = type(defaults[key])
        try:
            if not equals:
                raise ValueError
            arguments[key] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError) as error:
            raise UserError(f"config argument {key!r} takes {key}=<{kind.__name__}>, got {pair!r}.") from error
    return arguments
