r"""BiT ResNets pre-trained on JFT-300M, or on a web-scale set of your own: the ViT paper's baseline (tables 3 and 6).

    python -m vit_jax.main --config=configs/bit_jft.py:model=R50x1 --dry_run
    python -m vit_jax.plan --config=configs/bit_jft.py:model=R50x1 --topology=v3-512
    python -m vit_jax.main --workdir=runs/web \
        --config=configs/bit_jft.py:model=R50x1,data=tfds:web,num_classes=5000,train_images=40000000

Needs     a web-scale set with labels, see below; JFT-300M was never released. --dry_run and the plan need no data
Takes     not measured; the plan computes it. The paper reports 9.9k TPUv3-core-days for R152x4
Reaches   fine-tuned at 384, on ImageNet and CIFAR-100 (table 6). Not reproduced here
              R50x1     7 epochs   77.54 %   86.07 %
              R50x2     7 epochs   82.12 %   89.20 %
              R101x1    7 epochs   80.67 %   89.17 %
              R152x1    7 epochs   81.88 %   90.22 %
              R152x2    7 epochs   84.97 %   92.05 %
              R152x2   14 epochs   85.56 %   91.92 %
              R200x3   14 epochs   87.22 %   93.53 %
          BiT-L, R152x4, 40 epochs: 87.54 % and 93.51 %, and 76.29 % on VTAB (table 2). It was never released
Arguments model and epochs (as below), data, num_classes, train_images (checked to 1 %)

R50x1 to R200x3 are the ResNets that the paper trained like its ViTs, with Adam and for as many epochs, not those that
BiT released. Adam did slightly better than SGD on average over the fine-tuning tasks: 89.33 against 88.79 for R50x1,
94.01 against 93.72 for R152x2 (table 7).

Your own set: list the images with any number of labels each, and prepare the list once (docs/prepare.md). Remove
near-duplicates of test images, as the authors did (python -m vit_jax.data.prepare dedup). Then pass data=tfds:<name>,
num_classes= and train_images=. The first 51,200 images of the prepared order are held out for evaluation.

The recipe of R50x1 to R200x3; docs/configs.md says more
- Sigmoid cross-entropy, summed over classes, because an image may have several labels. Head bias -10, because a class
  is on one image in 14,500 (JFT has 1.26 labels per image). The loss starts at 13; with a bias of 0 it would start at
  12,700.
- Weight decay 0.1 of kernels only, decoupled and multiplied by the learning rate, as in AdamW: at the peak a step
  removes 0.1 x 1e-3 of a kernel. Code bases that take the product need 1e-4; the wrong number is off by a factor of
  1,000. Decaying kernels only is big_vision's default; the paper does not say, and ViT's released code has no decay.
- Warm-up over 10,000 steps, then linear decay (table 3) to 0. The paper does not give the final rate. The released
  schedule ends at 1e-5 by default; 0 is ours.
- Kernels of convolutions are standardised before use, so decay does not shrink their outputs. It keeps the kernels
  small, and the same learning rate then changes their direction faster.
- No dropout (the ResNets have none), no clipping, no pre_logits: the head is one linear layer on the averaged features.

model=R152x4 is BiT-L, the paper's baseline, with BiT's own recipe (Kolesnikov et al., 2020, section 3.3)
- SGD with momentum 0.9. Learning rate 0.03 for a batch of 256, in proportion to the batch: 0.48 for 4,096.
- Warm-up over 5,000 steps; the learning rate is divided by 10 after 10, 23, 30 and 37 of the 40 epochs.
- Weight decay 1e-4, added to the gradient before the momentum. For SGD our weight_decay always means this classic form,
  so 1e-4 is not the product of 0.1 and 1e-3, although it looks like it.
- Sigmoid cross-entropy: not in the paper; an author says so of ImageNet-21k (issue 26 of google-research/big_transfer).
  Head bias -10 as above: BiT does not give its own.
- The 9.9k core-days are those of BiT's run, 40 epochs on a TPUv3-512, not of a row of table 3. By our formula that
  takes R152x4 13,300 exaFLOPs, three times ViT-H/14's 4,260.
"""

from ml_collections import ConfigDict

from vit_jax.config import base_config, parse_config_string
from vit_jax.errors import UserError, unknown_name

LEARNING_RATE = {  # table 3
    "R50x1": 1e-3,
    "R50x2": 1e-3,
    "R101x1": 8e-4,
    "R152x1": 6e-4,
    "R152x2": 6e-4,
    "R200x3": 6e-4,  # our guess: table 3 has no row for it; R152 has this rate
    "R152x4": 0.03 * 4096 / 256,  # BiT's
}
EPOCHS = {  # the longest run of each in the paper; R152x2 also has one of 7
    "R50x1": 7.0,
    "R50x2": 7.0,
    "R101x1": 7.0,
    "R152x1": 7.0,
    "R152x2": 14.0,
    "R200x3": 14.0,
    "R152x4": 40.0,
}
OTHER_MODELS = """\
ViTs are in configs/vit_jft.py, hybrids in configs/hybrid_jft.py. For a model that the paper did not train on JFT, set
--config.model.name=<model> and --config.optimizer.learning_rate."""
HOW_TO_PREPARE = """\
JFT-300M was never released. List your own images in a file with rows {"image": "a/1.jpg", "labels": ["cat", "sofa"]}:
    python -m vit_jax.data.prepare manifest <list>.jsonl --name=web --out=<folder>
Set VIT_JAX_DATA=<folder>, and append to the config's path
    :model=R152x2,data=tfds:web,num_classes=<classes>,train_images=<images>"""


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    argument = parse_config_string(
        argument, model="R152x2", epochs=0.0, data="tfds:jft", num_classes=18_291, train_images=303_000_000
    )
    if argument.model not in LEARNING_RATE:
        raise UserError(f"{unknown_name('model', argument.model, LEARNING_RATE)}\n{OTHER_MODELS}")
    config = base_config()

    config.data.dataset = argument.data
    config.data.train_split = "train[51200:]"
    config.data.eval_split = "train[:51200]"
    config.data.expected_train_images = argument.train_images
    config.data.expected_within = 0.01
    config.data.how_to_prepare = HOW_TO_PREPARE
    config.data.image_size = 224
    config.data.inception_crop = True
    config.data.crop_min_area = 0.05
    config.data.flip = True
    config.data.eval_resize_small = 256

    config.model.name = argument.model
    config.model.num_classes = argument.num_classes
    config.model.head_bias = -10.0
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "float32"

    config.epochs = argument.epochs or EPOCHS[argument.model]
    config.batch_size = 4096
    config.loss = "sigmoid"
    config.optimizer.learning_rate = LEARNING_RATE[argument.model]
    config.optimizer.clip_norm = None
    if argument.model == "R152x4":
        config.optimizer.name = "sgd"
        config.optimizer.momentum = 0.9
        config.optimizer.schedule = "drops"
        config.optimizer.drop_at = (10 / 40, 23 / 40, 30 / 40, 37 / 40)
        config.optimizer.warmup_steps = 5_000
        config.optimizer.weight_decay = 1e-4
    else:
        config.optimizer.name = "adamw"
        config.optimizer.b1 = 0.9
        config.optimizer.b2 = 0.999
        config.optimizer.schedule = "linear"
        config.optimizer.warmup_steps = 10_000
        config.optimizer.end_learning_rate = 0.0
        config.optimizer.weight_decay = 0.1

    # To make it fit or run faster (docs/configs.md): config.sharding, model.remat, accumulation_steps.
    config.log_every_steps = 100
    config.evals.eval_split.every_steps = 10_000
    config.checkpoint.every_steps = 1_000
    return config
