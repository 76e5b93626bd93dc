"""A run of seconds, for tests: a ViT of one layer on digits or on a folder of images."""

from vit_jax.config import base_config, parse_config_string


def get_config(argument=None):
    argument = parse_config_string(argument, data="digits", steps=4, checkpoint=2)
    config = base_config()
    config.data.dataset = argument.data
    config.data.eval_split = "test"
    config.data.image_size = 8
    config.model.name = "ViT-Ti/4"
    config.model.num_layers = 1
    config.model.hidden_dim = 16
    config.model.mlp_dim = 32
    config.model.num_heads = 2
    config.model.dropout_rate = 0.1
    config.steps = argument.steps
    config.batch_size = 16
    config.optimizer.warmup_steps = 1
    config.log_every_steps = 3
    config.eval_batch_size = 100
    config.evals.eval_split.every_steps = 2 * argument.checkpoint
    config.checkpoint.every_steps = argument.checkpoint
    return config
