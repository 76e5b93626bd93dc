r"""Few-shot linear accuracy of a checkpoint as it is (section 4.1; figure 4, table 8). Nothing is trained.

    python -m vit_jax.main --mode=eval --workdir=runs/fewshot \
        --config=configs/fewshot.py:weights=vit_b16_i21k,dataset=imagenet2012

Needs     weights: a released checkpoint by name (python -m vit_jax.weights list), a file, or the workdir of a run; the
          data set, prepared, or a folder of images
Takes     a forward pass of the drawn images and of the test images; less than a minute for a small ViT and 5,000
          images of 32 pixels on 2 CPU cores. ImageNet: not measured
Reaches   in the paper, 64.2 % ImageNet 5-shot with ViT-B/16 pre-trained on JFT-300M (table 8). Not reproduced here
Arguments dataset    imagenet2012 (images are drawn from the first 65,000), cifar100, pets, flowers, tfds:<name>, or the
                     path of an image folder
          weights    as --config.weights
          resolution in pixels; by default the largest multiple of the patch size up to 224. Images are resized to a
                     square of 8/7 of it, and the centre is taken

The same command with --dry_run shows weights, model and numbers of images without measuring.

The linear classifier on the representation before the head has a closed form. It is solved for 1, 5, 10 and 25 images
per class, each drawn three times. docs/fewshot.md has the formulas and all options (--config.evals.fewshot.<field>).
"""

from ml_collections import ConfigDict

from vit_jax.config import base_config, parse_config_string
from vit_jax.data.transfer_tasks import transfer_task
from vit_jax.experiment.fine_tuning import fitting_size, model_of

POOLS = {"imagenet2012": "train[:65000]"}  # as in the released evaluator


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    argument = parse_config_string(argument, dataset="imagenet2012", weights="vit_b16_i21k", resolution=0)
    task = transfer_task(argument.dataset)
    train, test = task.splits["final"]
    config = base_config()
    config.weights = argument.weights
    config.model.name = None
    config.data.dataset = task.dataset
    config.data.image_size = argument.resolution or fitting_size(224, model_of(config.weights))
    config.data.eval_split = None
    config.evals.fewshot.datasets = (task.dataset,)
    config.evals.fewshot.train_split = POOLS.get(argument.dataset, train)
    config.evals.fewshot.test_split = test
    config.evals.fewshot.shots = (1, 5, 10, 25)
    config.evals.fewshot.l2 = (2.0**10,)
    config.evals.fewshot.seeds = 3
    config.evals.fewshot.representations = ("pre_logits",)
    config.eval_batch_size = 512

    # Only for `--dry_run`, as nothing is trained.
    config.model.num_classes = task.num_classes
    config.data.expected_train_images = task.num_images["final"]
    config.steps = 1
    return config
