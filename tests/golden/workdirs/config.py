"""The run of these workdirs: a ViT of one layer on digits. It must go on to mean the same run."""

from vit_jax.config import base_config


def get_config():
    config = base_config()
    config.data.dataset = "digits"
    config.data.train_split = "train[:90%]"
    config.data.eval_split = "test"
    config.data.image_size = 8
    config.model.name = "ViT-Ti/4"
    config.model.num_layers = 1
    config.model.hidden_dim = 16
    config.model.mlp_dim = 16
    config.model.num_heads = 2
    config.model.dropout_rate = 0.1
    config.mixup_alpha = 0.2
    config.steps = 60
    config.batch_size = 32
    config.optimizer.learning_rate = 0.02
    config.optimizer.warmup_steps = 4
    config.optimizer.weight_decay = 0.03
    config.optimizer.clip_norm = 1.0
    config.optimizer.eps = 1e-4  # with less, Adam would turn differences in rounding into steps
    config.polyak_decay = 0.8
    config.evals.fewshot.datasets = ("digits",)
    config.evals.fewshot.shots = (1, 5)
    config.evals.fewshot.seeds = 2
    config.log_every_steps = 4
    config.eval_batch_size = 360
    config.evals.eval_split.every_steps = 10
    config.checkpoint.every_steps = 30
    config.checkpoint.keep = 1
    return config
