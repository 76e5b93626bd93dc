r"""A small transfer study: pre-train on five classes of CIFAR-10, fine-tune on some images of the other five.

    python -m vit_jax.main --config=configs/small_transfer.py:stage=pretrain --workdir=runs/upstream
    python -m vit_jax.main --config=configs/small_transfer.py:weights=runs/upstream,resolution=48 --workdir=runs/down
    python benchmarks/small_transfer.py --data=cifar10.zip --out=runs/small_transfer      # all of docs/results.md

Needs     upstream.zip and downstream.zip in $VIT_JAX_DATA, which benchmarks/small_transfer.py makes from CIFAR-10
Takes     1 to 13 minutes a run on 2 CPU cores
Reaches   see docs/results.md
Arguments stage      pretrain or finetune (the default)
          model      vit (the default): 4 layers of width 128, patches of 4 pixels. bit: R20x1, which is R26x1 without
                     its last stage, at three quarters of the FLOPs
          pool       cls (the default) or gap, of the ViT
          weights    workdir of the first command; none: from scratch
          resolution in pixels: 32, as at pre-training, or higher, such as 48

Pre-training is the paper's: Adam, weight decay, warm-up, linear decay. So is fine-tuning: a head of zeros,
interpolated position embeddings, SGD with momentum, cosine decay, clipping. From scratch it is Adam. Fine-tuning sees
2,000 images; 1,000 others choose the learning rate (--config.data.eval_split='train[2000:3000]').
"""

from ml_collections import ConfigDict

from vit_jax.config import base_config, parse_config_string
from vit_jax.errors import UserError
from vit_jax.sweep import Sweep

ARGUMENTS = {"stage": "finetune", "model": "vit", "pool": "cls", "weights": "none", "resolution": 32}
FINE_TUNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
FROM_SCRATCH_RATES = (3e-4, 1e-3, 3e-3)


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    argument = parse_config_string(argument, **ARGUMENTS)
    if argument.stage not in ("pretrain", "finetune") or argument.model not in ("vit", "bit"):
        raise UserError(f"stage is pretrain or finetune and model is vit or bit, got {argument.to_dict()}.")
    config = base_config()

    if argument.model == "vit":
        config.model.name = "ViT-Ti/4"
        config.model.num_layers = 4
        config.model.hidden_dim = 128
        config.model.mlp_dim = 384
        config.model.num_heads = 2
        config.model.pool = argument.pool
    else:
        config.model.name = "R26x1"
        config.model.stages = (2, 2, 2)  # a fourth stage would have one position
    config.model.num_classes = 5
    config.data.image_size = argument.resolution
    config.data.crop_min_area = 0.5
    config.data.flip = True
    config.eval_batch_size = 500
    config.log_every_steps = 20
    config.checkpoint.keep = 1
    config.checkpoint.keep_best = False
    config.data.how_to_prepare = "benchmarks/small_transfer.py makes it from CIFAR-10. Set VIT_JAX_DATA to its folder."

    if argument.stage == "pretrain":
        config.data.dataset = "upstream.zip"
        config.data.eval_split = "test"
        config.data.expected_train_images = 25_000
        config.epochs = 5.0
        config.batch_size = 128
        config.optimizer.name = "adamw"
        config.optimizer.learning_rate = 1e-3
        config.optimizer.schedule = "linear"
        config.optimizer.warmup_steps = 100
        config.optimizer.weight_decay = 0.1
        config.optimizer.clip_norm = 1.0
        config.checkpoint.every_steps = 200
        return config

    config.data.dataset = "downstream.zip"
    config.data.train_split = "train[:2000]"
    config.data.eval_split = "test"
    config.data.expected_train_images = 2_000
    config.steps = 150
    config.batch_size = 64
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 15
    config.optimizer.clip_norm = 1.0
    config.checkpoint.every_steps = 50
    if argument.weights == "none":
        config.optimizer.name = "adamw"
        config.optimizer.learning_rate = 1e-3
        config.optimizer.weight_decay = 0.1
    else:
        config.weights = argument.weights
        config.optimizer.name = "sgd"
        config.optimizer.momentum = 0.9
        config.optimizer.momentum_dtype = "bfloat16"
        config.optimizer.learning_rate = 0.01
    return config


def get_sweep(argument: str | None = None) -> Sweep:
    """Learning rates to choose from; benchmarks/small_transfer.py makes the final runs."""
    given = parse_config_string(argument, **ARGUMENTS)
    rates = FROM_SCRATCH_RATES if given.weights == "none" else FINE_TUNING_RATES
    return Sweep(choose={"optimizer.learning_rate": rates}, seeds=0)
