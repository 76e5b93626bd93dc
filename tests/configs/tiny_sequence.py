"""The run of `tiny.py` with two sweeps: pre-training on a part of the digits, and fine-tuning on another part."""

from tests.configs import tiny
from vit_jax.config import parse_config_string
from vit_jax.sweep import Sweep

PARTS = {"pretrain": "train[:40%]", "finetune": "train[40%:80%]"}


def get_config(argument=None):
    argument = parse_config_string(argument, stage="pretrain", head_bias=0.0)
    config = tiny.get_config("steps=3")
    config.data.train_split = PARTS[argument.stage]
    config.data.eval_split = "train[80%:]" if argument.stage == "pretrain" else "train[90%:]"
    config.model.head_bias = argument.head_bias
    return config


def get_sweep(argument=None):
    return [
        Sweep(
            choose={"optimizer.weight_decay": (0.0, 0.1)},
            final={"data.eval_split": "test"},
            tasks={"first": "stage=pretrain", "second": "stage=pretrain,head_bias=1"},
            seeds=2,
        ),
        Sweep(
            choose={"optimizer.learning_rate": (0.1, 0.01)},
            final={"data.eval_split": "test"},
            tasks={"first-tuned": "stage=finetune", "second-tuned": "stage=finetune", "scratch": ""},
            weights={"first-tuned": "first", "second-tuned": "second"},
            are_alternatives=True,
            seeds=2,
        ),
    ]
