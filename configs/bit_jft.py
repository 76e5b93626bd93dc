r"""BiT ResNets pre-trained on JFT-300M, or on a web-scale set of your own: the ViT paper's baseline (tables 3 and 6).

    python -m vit_jax.main --config=configs/bit_jft.py:model=R50x1 --dry_run
    python -m vit_jax.plan --config=configs/bit_jft.py:model=R50x1 --topology=v3-512
    python -m vit_jax.main --workdir=runs/web \
        --config=configs/bit_jft.py:model=R50x1,data=tfds:web,num_classes=5000,train_images=40000000

Needs     a web-scale set with labels, see below; JFT-300M was never released. --dry_run and the plan do without
Takes     not measured; the plan computes it
Reaches   fine-tuned at 384, on ImageNet and CIFAR-100 (table 6). Not reproduced here
              R50x1     7 epochs   77.54 %   86.07 %
              R50x2     7 epochs   82.12 %   89.20 %
              R101x1    7 epochs   80.67 %   89.17 %
              R152x1    7 epochs   81.88 %   90.22 %
              R152x2    7 epochs   84.97 %   92.05 %
              R152x2   14 epochs   85.56 %   91.92 %
              R200x3   14 epochs   87.22 %   93.53 %
Arguments model and epochs (as below), data, num_classes, train_images (of the set, checked to 1 %)

These are the ResNets that the paper trained beside its ViTs, with Adam and for as many epochs, not those that BiT
released. Adam did slightly better than SGD: 89.33 against 88.79 for R50x1, 94.01 against 93.72 for R152x2, the averages
of the fine-tuning tasks (table 7). BiT's own recipe, with SGD and 40 epochs, is bit_l_r152x4.py.

Your own set: list images and labels, any number of labels each, and prepare the list once (docs/prepare.md); then pass
data=tfds:<name>, num_classes= and train_images=. Take near-duplicates of test images out first, as the authors did
(python -m vit_jax.data.prepare dedup). The first 51,200 images of the prepared order are held out for evaluation.

The recipe; docs/configs.md says more
- Sigmoid cross-entropy, summed over classes, as an image may have several labels. Head bias -10, because a class is on
  one image in 14,500 (JFT has 1.26 labels an image): the loss starts at 13; from a bias of 0 it would be at 12,700.
- Weight decay 0.1, of kernels only, is decoupled and times the learning rate, AdamW style: at the peak a step takes
  0.1 x 1e-3 of a kernel. Code bases that want the product want 1e-4: copied from one to the other, the number is wrong
  by a factor of 1,000. Decaying kernels only is big_vision's default; the paper does not say, and ViT's released code
  has no decay.
- Warm-up over 10,000 steps, linear decay (table 3) to 0: the paper does not say where to, and the released schedule's
  default end is 1e-5; 0 is ours.
- Kernels of convolutions are standardised before use, so that decay cannot make what they put out smaller; it lets the
  same learning rate turn them faster.
- No dropout (the ResNets have none), no clipping, no pre_logits: the head is one linear layer on the averaged features.
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
    "R200x3": 6e-4,  # our guess: table 3 has no row for it, and this is that of the next smaller ones
}
EPOCHS = {  # the longest run of each in the paper; R152x2 was trained for 7, too
    "R50x1": 7.0,
    "R50x2": 7.0,
    "R101x1": 7.0,
    "R152x1": 7.0,
    "R152x2": 14.0,
    "R200x3": 14.0,
}
OTHER_MODELS = """\
ViTs are in configs/vit_jft.py, hybrids in configs/hybrid_jft.py, BiT-L's R152x4 in configs/bit_l_r152x4.py. For a model
that the paper did not train on JFT set --config.model.name=<model>, and --config.optimizer.learning_rate to what suits
it."""
HOW_TO_PREPARE = """\
JFT-300M was never released. List your own images in a file with rows {"image": "a/1.jpg", "labels": ["cat", "sofa"]}:
    python -m vit_jax.data.prepare manifest <list>.jsonl --name=web --out=<folder>
Set VIT_JAX_DATA=<folder>, and let the config's path be followed by
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
    config.optimizer.name = "adamw"
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.learning_rate = LEARNING_RATE[argument.model]
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 10_000
    config.optimizer.end_learning_rate = 0.0
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = None

    # If it does not fit, or to make it faster (docs/configs.md): config.sharding, model.remat, accumulation_steps.
    config.log_every_steps = 100
    config.evals.eval_split.every_steps = 10_000
    config.checkpoint.every_steps = 1_000
    return config
