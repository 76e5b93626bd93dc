"""The run of `tiny.py` with a sweep over it: two tasks, which train on different parts of the digits."""

from tests.configs import tiny
from vit_jax.config import parse_config_string
from vit_jax.sweep import Sweep


def get_config(argument=None):
    argument = parse_config_string(argument, train="train[:50%]")
    config = tiny.get_config("steps=3")
    config.data.train_split = argument.train
    config.data.eval_split = "train[90%:]"
    return config


def get_sweep(argument=None):
    return Sweep(
        choose={"optimizer.learning_rate": (0.001, 0.01, 0.1), "seed": (0, 1)},
        final={"data.eval_split": "test"},
        seeds=3,
        tasks={"first": "train=train[:50%]", "second half": "train=train[50%:90%]"},
        groups={"only": ["second half"]},
    )
