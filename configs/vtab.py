r"""Fine-tuning on a task of VTAB-1k (table 4's row VTAB; "VTAB" of tables 2 and 9).

    python -m vit_jax.main --config=configs/vtab.py:task=pets --dry_run
    python -m vit_jax.main --config=configs/vtab.py:task=pets,weights=vit_b16_i21k --workdir=runs/vtab_pets
    python -m vit_jax.sweep --config=configs/vtab.py:weights=vit_l16_i21k --workdir=sweeps/vtab

Needs     weights: a released checkpoint by name (python -m vit_jax.weights list), a file, or the workdir of a run; the
          task's data set (python -m vit_jax.data.vtab list; docs/vtab.md says how to get each); an accelerator
Takes     not measured. A task is 2,500 steps of 512 images, 1.28 million images at 384 pixels, and its test set, of 711
          (KITTI) to 73,728 (dSprites) images; the third command does 19 tasks with three seeds each
Reaches   not run here: we have no data set of VTAB. The paper's means over the 19 tasks (table 2): ViT-L/16 I21k
          72.72 %, ViT-L/16 JFT 76.28 %, ViT-H/14 JFT 77.63 %; by task: table 9
Arguments task       of the table in docs/vtab.md
          weights    as --config.weights; none: from scratch
          model      needed only if it does not follow from the weights
          resolution in pixels. The paper has 384 for all tasks. By default the largest multiple of the patch size up to
                     384: 378 for patches of 14 pixels, which is what the released code's convolution sees of 384
          dropout    of the Transformer; by default as the weights: 0.1 for the ViT paper's checkpoints, hybrids too
                     (released README; no source for VTAB); a run's own, if they are its workdir; 0 for AugReg, SAM,
                     GSAM, BiT and weights of unknown origin. --dry_run says which, and why
          stage      final (the default): train on the 1,000 examples and evaluate on the test set. choose: train on 800
                     of them and evaluate on the other 200

The third command reports the means over groups and over all tasks. It chooses nothing, because table 4 has one setting
for all tasks. To choose a learning rate for each task on its 200 examples, add
--grid=optimizer.learning_rate=0.001,0.003,0.01,0.03

Images are resized to 448 (7/6 of another resolution), and a random square of 384 is cut out. Half of them are mirrored
if that keeps the task's labels. This is appendix F of BiT, whose pre-processing the paper follows. At evaluation the
whole image is resized to 384. Warm-up and momentum in bfloat16 are the released code's; all else is table 4's.
"""

from ml_collections import ConfigDict

from vit_jax.config import base_config, parse_config_string
from vit_jax.data.vtab import GROUPS, TASKS, get_task
from vit_jax.errors import unknown_name
from vit_jax.experiment.fine_tuning import choose_dropout, fitting_size, model_of
from vit_jax.sweep import Sweep

STAGES = {
    "choose": {"data.train_split": "train800", "data.eval_split": "val200", "data.expected_train_images": 800},
    "final": {"data.train_split": "train800val200", "data.eval_split": "test", "data.expected_train_images": 1000},
}
ARGUMENTS = {
    "task": "caltech101",
    "weights": "vit_l16_i21k",
    "model": "",
    "resolution": 0,
    "dropout": "",
    "stage": "final",
}


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    argument = parse_config_string(argument, **ARGUMENTS)
    task = get_task(argument.task)
    if argument.stage not in STAGES:
        raise unknown_name("stage", argument.stage, STAGES)
    config = base_config()

    config.weights = None if argument.weights == "none" else argument.weights
    config.model.name = argument.model or ("ViT-B/16" if config.weights is None else None)
    config.model.num_classes = task.num_classes
    config.model.dropout_rate = choose_dropout(argument.dropout, config.weights)
    config.model.dtype = "bfloat16"

    config.data.dataset = f"vtab:{task.id}"
    config.update_from_flattened_dict(STAGES[argument.stage])
    model = model_of(config.weights, config.model.name)
    config.data.image_size = argument.resolution or fitting_size(384, model)
    config.data.inception_crop = False
    if task.crop:
        config.data.random_crop_from = round(config.data.image_size * 448 / 384)
    config.data.flip = task.flip

    config.steps = 2_500
    config.batch_size = 512
    config.loss = "softmax"
    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.momentum_dtype = "bfloat16"
    config.optimizer.learning_rate = 0.01
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0

    config.checkpoint.every_steps = 500
    config.checkpoint.keep = 1
    config.checkpoint.keep_best = False  # the last parameters count, not those that are best on the test set
    return config


def get_sweep(argument: str | None = None) -> Sweep:
    """All 19 tasks, each with table 4's setting, three final runs, and means over groups and over all."""
    given = parse_config_string(argument, **ARGUMENTS).to_dict() | {"stage": "choose"}
    return Sweep(
        final=STAGES["final"],
        tasks={task: ",".join(f"{name}={value}" for name, value in (given | {"task": task}).items()) for task in TASKS},
        groups={group: [task.id for task in TASKS.values() if task.group == group] for group in GROUPS},
    )
