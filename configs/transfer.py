r"""Fine-tuning on ImageNet, CIFAR, Pets, Flowers, any TFDS set or a folder of your own images (table 4).

    python -m vit_jax.main --config=configs/transfer.py:weights=vit_b16_i21k,dataset=cifar10 --workdir=runs/cifar10
    python -m vit_jax.sweep --config=configs/transfer.py:weights=vit_b16_i21k,dataset=pets --workdir=sweeps/pets
    python -m vit_jax.main --workdir=runs/mine --config=configs/transfer.py:weights=augreg_ti16_i21k,\
        dataset=/path/to/folder,resolution=224,batch=32,steps=200,dtype=float32

Needs     weights: a released checkpoint by name (python -m vit_jax.weights list), a file, or the workdir of a run; the
          data set, or <class>/<image> or {train,test}/<class>/<image> in a folder. An accelerator; only the
          third command is for a laptop (docs/fine_tuning.md walks through it)
Takes     not measured on an accelerator
Reaches   in the paper, pre-trained on ImageNet-21k, mean of three runs at 384 (table 5): ViT-B/16 CIFAR-10 98.95 %,
          CIFAR-100 91.67 %, ImageNet 83.97 %, Pets 94.43 %, Flowers 99.38 %. Not reproduced here
Arguments dataset    imagenet2012, cifar10, cifar100, pets, flowers, tfds:<name>, or the path of a folder or zip file
          train,test names of its splits, if they are not train and test. A validation split chooses the learning rate
          weights    as --config.weights; none: from scratch
          model      needed only if it does not follow from the weights
          resolution in pixels. The paper has 384, and for table 2's ImageNet 512 (L/16) or 518 (H/14), with
                     --config.polyak_decay=0.9999. By default the largest multiple of the patch size up to 384: 378 for
                     patches of 14 pixels, which is what the released code's convolution sees of 384
          dropout    of the Transformer; by default as the weights: 0.1 for the ViT paper's checkpoints, hybrids too
                     (released README); a run's own, if they are its workdir; 0 for AugReg, SAM, GSAM, BiT
                     and weights of unknown origin. --dry_run says which, and why
          stage      final (the default): train on all training images and evaluate on the test set. choose: hold out
                     a part of them to choose the learning rate. The second command does both: it tries table 4's
                     learning rates, then trains three times with the best
          rule       vit (a run's default): table 4. bit: BiT-HyperRule, with mixup and other crops, which the paper
                     also tries for ResNets. By default a sweep of a ResNet or a hybrid tries both and uses the
                     better one; its tables say which. rule=vit and rule=bit restrict it to one
          bit_size   of rule=bit. paper (the default): resize to 448, crop 384; R152x4 512 and 480 (BiT paper).
                     released: 512 and 480 for all (BiT's released code). Images under 96x96 pixels: 160 and 128 in both
          batch, steps, dtype   512; table 4's, or by the size of the data set; bfloat16

The recipe, by source
- Paper (table 4, sections 3.2 and B.1.1): SGD with momentum 0.9, batch 512, cosine decay, no weight decay, clipping at
  norm 1, the steps and learning rates of each task. A head of zeros replaces the old one, and position embeddings are
  interpolated to the resolution.
- Released code: dropout as above; momentum kept in bfloat16; warm-up over 500 steps; Inception crop and flip; the
  whole image resized to a square at evaluation.
- Ours: warm-up over 100 steps if a run has only 500 (Pets, Flowers), as in BiT; steps of other data sets by their size,
  as in BiT. The last parameters count; nothing is chosen on the test set.
"""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config import base_config, parse_config_string
from vit_jax.data.bit_hyper_rule import hyper_rule_schedule, hyper_rule_sizes
from vit_jax.data.transfer_tasks import STAGES, transfer_task
from vit_jax.errors import UserError, unknown_name
from vit_jax.experiment.fine_tuning import choose_dropout, fitting_size, model_of
from vit_jax.sweep import Sweep

RULES = ("vit", "bit")
ONLY_FOR_RESNETS = 0.06  # of the learning rates on ImageNet: table 4's footnote
HYPER_RULE_RATE = 0.003
ARGUMENTS = {
    "dataset": "cifar10",
    "train": "",
    "test": "",
    "weights": "vit_b16_i21k",
    "model": "",
    "resolution": 0,
    "dropout": "",
    "stage": "final",
    "rule": "",
    "bit_size": "paper",
    "batch": 512,
    "steps": 0,
    "dtype": "bfloat16",
}
HOW_TO_PREPARE = """\
Data sets of the catalogue are prepared once: python -m vit_jax.data.prepare tfds <name>
Your own images go into <folder>/<class>/<image>.jpg, or <folder>/{train,test}/<class>/<image>.jpg: dataset=<folder>"""


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    argument = parse_config_string(argument, **ARGUMENTS)
    if argument.stage not in STAGES:
        raise unknown_name("stage", argument.stage, STAGES)
    rule = argument.rule or "vit"
    if rule not in RULES:
        raise unknown_name("rule", rule, RULES)
    if argument.bit_size not in ("paper", "released"):
        raise UserError(f"bit_size is paper or released, got {argument.bit_size!r}.")
    task = transfer_task(argument.dataset, train=argument.train, test=argument.test)
    steps = argument.steps or task.steps
    config = base_config()

    config.weights = None if argument.weights == "none" else argument.weights
    config.model.name = argument.model or ("ViT-B/16" if config.weights is None else None)
    config.model.num_classes = task.num_classes
    config.model.dropout_rate = choose_dropout(argument.dropout, config.weights)
    config.model.dtype = argument.dtype

    config.data.dataset = task.dataset
    config.data.train_split, config.data.eval_split = task.splits[argument.stage]
    config.data.expected_train_images = task.num_images[argument.stage]
    config.data.how_to_prepare = HOW_TO_PREPARE

    config.steps = steps
    config.batch_size = argument.batch
    config.loss = "softmax"
    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.momentum_dtype = "bfloat16"
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    model = model_of(config.weights, config.model.name)
    if rule == "vit":
        config.data.image_size = argument.resolution or fitting_size(384, model)
        config.data.inception_crop = True
        config.data.crop_min_area = 0.05
        config.optimizer.learning_rate = 0.01
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup_steps = min(500, steps // 5)
    else:
        is_large = argument.bit_size == "released" or model.get("name") == "R152x4"
        resize, crop = hyper_rule_sizes(small_images=task.small_images, is_large=is_large)
        config.data.image_size = argument.resolution or fitting_size(crop, model)
        config.data.inception_crop = False
        config.data.random_crop_from = round(config.data.image_size * resize / crop)
        config.mixup_alpha = 0.0 if task.steps <= 500 else 0.1
        config.optimizer.momentum_dtype = "float32"
        config.optimizer.learning_rate = HYPER_RULE_RATE
        config.optimizer.schedule = "drops"
        config.optimizer.warmup_steps, config.optimizer.drop_at = hyper_rule_schedule(steps)
        config.optimizer.clip_norm = None
    config.data.flip = True

    config.log_every_steps = min(50, max(1, steps // 10))
    config.evals.eval_split.every_steps = max(1, steps // 10)
    config.checkpoint.every_steps = max(1, min(1000, steps // 5))
    config.checkpoint.keep = 1
    config.checkpoint.keep_best = False
    return config


def get_sweep(argument: str | None = None) -> Sweep:
    """Chooses on a held-out part of the training images, then trains three times on all of them.

    Chooses from table 4's learning rates and, for models that begin with a ResNet, also BiT-HyperRule.
    """
    given = parse_config_string(argument, **ARGUMENTS)
    task = transfer_task(given.dataset, train=given.train, test=given.test)
    is_resnet = _begins_with_resnet(given.model, given.weights)
    rates = tuple(rate for rate in task.learning_rates if is_resnet or rate != ONLY_FOR_RESNETS)
    choose: Any = {"optimizer.learning_rate": (HYPER_RULE_RATE,) if given.rule == "bit" else rates}
    if is_resnet and not given.rule:  # the better of two rules (section 4.1)
        choose = [{"argument.rule": "vit", "optimizer.learning_rate": rate} for rate in rates]
        choose.append({"argument.rule": "bit", "optimizer.learning_rate": HYPER_RULE_RATE})
    train, test = task.splits["final"]
    return Sweep(
        choose=choose,
        final={
            "data.train_split": train,
            "data.eval_split": test,
            "data.expected_train_images": task.num_images["final"],
        },
        tasks={
            pathlib.PurePath(given.dataset).stem: ",".join(
                f"{name}={value}" for name, value in (given.to_dict() | {"stage": "choose"}).items()
            )
        },
    )


def _begins_with_resnet(model: str, weights: str) -> bool:
    return model_of(None if weights == "none" else weights, model).get("name", "").startswith("R")
