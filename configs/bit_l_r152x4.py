r"""BiT-L, the R152x4 pre-trained on JFT-300M, by BiT's own recipe: what ViT was compared with (table 2).

    python -m vit_jax.main --config=configs/bit_l_r152x4.py --dry_run
    python -m vit_jax.plan --config=configs/bit_l_r152x4.py --topology=v3-512
    python -m vit_jax.main --workdir=runs/web \
        --config=configs/bit_l_r152x4.py:data=tfds:web,num_classes=5000,train_images=40000000

Needs     a web-scale set with labels, see below; JFT-300M was never released. --dry_run and the plan do without
Takes     not measured; the plan computes it. The paper reports 9.9k TPUv3-core-days (cores, two a chip, x days)
Reaches   after fine-tuning, not reproduced here: 87.54 % on ImageNet, 93.51 % on CIFAR-100, 76.29 % on VTAB (table 2).
          BiT-L was never released
Arguments epochs=40, data, num_classes, train_images (of the set, checked to 1 %)

The 9.9k core-days are those of BiT's run, 40 epochs on a TPUv3-512, not of a row of table 3: by our formula R152x4
takes 13,300 exaFLOPs for that, three times H/14's 4,260. The ResNets that the ViT paper trained beside its ViTs, with
Adam, are in bit_jft.py.

Your own set: list images and labels, any number of labels each, and prepare the list once (docs/prepare.md); then pass
data=tfds:<name>, num_classes= and train_images=. Take near-duplicates of test images out first, as the authors did
(python -m vit_jax.data.prepare dedup). The first 51,200 images of the prepared order are held out for evaluation.

BiT's recipe (Kolesnikov et al., 2020, section 3.3)
- SGD with momentum 0.9. Learning rate 0.03 for a batch of 256 and in proportion to the batch: 0.48 for 4,096.
- Warm-up over 5,000 steps; the learning rate is divided by 10 after 10, 23, 30 and 37 of the 40 epochs.
- Weight decay 1e-4, added to the gradient before the momentum, the classic form: for SGD our weight_decay means that.
  So this 1e-4 is no product of 0.1 and 1e-3, although it looks like one. The kernels of convolutions are standardised
  before use: decay does not make their output smaller, but lets the same learning rate turn them faster.
- Inception crop, flip, resolution 224.
- Sigmoid cross-entropy: not in the paper; an author says so of ImageNet-21k (issue 26 of google-research/big_transfer).
- Head bias -10, as in vit_jft.py, where it is explained. BiT does not say what it had.
- No dropout, no clipping, no pre_logits: the head is one linear layer on the averaged features.
"""

from ml_collections import ConfigDict

from vit_jax.config import base_config, parse_config_string

HOW_TO_PREPARE = """\
JFT-300M was never released. List your own images in a file with rows {"image": "a/1.jpg", "labels": ["cat", "sofa"]}:
    python -m vit_jax.data.prepare manifest <list>.jsonl --name=web --out=<folder>
Set VIT_JAX_DATA=<folder>, and let the config's path be followed by
    :data=tfds:web,num_classes=<classes>,train_images=<images>"""


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    argument = parse_config_string(argument, epochs=40.0, data="tfds:jft", num_classes=18_291, train_images=303_000_000)
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

    config.model.name = "R152x4"
    config.model.num_classes = argument.num_classes
    config.model.head_bias = -10.0
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "float32"

    config.epochs = argument.epochs
    config.batch_size = 4096
    config.loss = "sigmoid"
    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = 0.03 * 4096 / 256
    config.optimizer.schedule = "drops"
    config.optimizer.drop_at = (10 / 40, 23 / 40, 30 / 40, 37 / 40)
    config.optimizer.warmup_steps = 5_000
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = None

    # If it does not fit, or to make it faster (docs/configs.md): config.sharding, model.remat, accumulation_steps.
    config.log_every_steps = 100
    config.evals.eval_split.every_steps = 10_000
    config.checkpoint.every_steps = 1_000
    return config
