r"""A small ViT from scratch on CIFAR-10, on two CPU cores.

    python -m vit_jax.main --config=configs/cifar10.py:data=/data/cifar10.zip --workdir=runs/cifar10

Needs     CIFAR-10 as images, {train,test}/<class>/*.jpg, in a folder or a zip file. The path is absolute, or relative
          to the working folder or to $VIT_JAX_DATA
Takes     26 minutes on 2 CPU cores (268 images/s)
Reaches   58.4 % test accuracy (docs/cifar10.md has the curve)
Writes    the same files as the quickstart
Arguments data    the folder or zip file
          recipe  short (the default), or long: 20 epochs of a deeper and wider model behind the root of a ResNet, with
                  Muon, RandAugment and mixup. Not run to its end yet

It shows that the whole pipeline works on real images. The accuracy is modest: 50,000 images are few for a ViT from
scratch (figure 4 of the paper), and half an hour on a CPU is short. For good CIFAR-10 numbers fine-tune a pre-trained
model.
"""

from ml_collections import ConfigDict

from vit_jax.config import base_config, parse_config_string
from vit_jax.errors import unknown_name


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    argument = parse_config_string(argument, data="cifar10_jpeg.zip", recipe="short")
    if argument.recipe not in ("short", "long"):
        raise unknown_name("recipe", argument.recipe, ("short", "long"))
    config = base_config()

    config.data.dataset = argument.data
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.crop_min_area = 0.5
    config.data.expected_train_images = 50_000
    config.data.how_to_prepare = (
        "Put CIFAR-10 as {train,test}/<class>/*.jpg into a folder or a zip file; then\n"
        "    python -m vit_jax.main --config=configs/cifar10.py:data=<folder or zip file> --workdir=runs/cifar10"
    )

    config.model.name = "ViT-Ti/4"  # 64 patches of 4x4 pixels
    config.model.num_classes = 10
    config.model.num_layers = 4
    config.model.hidden_dim = 128
    config.model.mlp_dim = 384
    config.model.num_heads = 2
    config.model.pool = "gap"

    config.epochs = 8.0
    config.batch_size = 128
    config.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0

    config.log_every_steps = 50
    config.evals.eval_split.every_steps = 782  # two epochs
    config.eval_batch_size = 500
    config.checkpoint.every_steps = 391

    if argument.recipe == "long":
        config.epochs = 20.0
        config.data.randaugment_layers = 1
        config.data.randaugment_magnitude = 5.0
        config.data.randaugment_operations = "timm"  # translations in proportion to the image
        config.mixup_alpha = 0.1
        config.model.name = "R26+ViT-Ti/32"  # of the ResNet only the root: 8x8 positions, each a token
        config.model.resnet = ()
        config.model.num_layers = 6
        config.model.hidden_dim = 192
        config.model.num_heads = 3
        config.optimizer.name = "muon"
        config.optimizer.warmup_steps = 400
        config.evals.eval_split.every_steps = 1_564
    return config
