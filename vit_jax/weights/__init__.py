"""Loads and saves weights: released checkpoints, big_vision, timm and Hugging Face, by name, address or path.

    weights = load("augreg_b16_i21k_in1k_384")
    model = weights.spec.create()
    logits, out = model.apply({"params": weights.params}, weights.preprocessing.normalize(images))

    save(weights, "somewhere", to="huggingface")

`python -m vit_jax.weights` does the same from the command line. `mapping` has the machinery, `formats` a table for each
format, `transfer` adapts weights for fine-tuning, and `released` lists the released checkpoints.
"""

from vit_jax.weights.identify import ModelSpec
from vit_jax.weights.load import load
from vit_jax.weights.model_weights import Weights, from_params
from vit_jax.weights.preprocessing import Preprocessing
from vit_jax.weights.released import ReleasedCheckpoint, get_checkpoint, list_checkpoints
from vit_jax.weights.save import save
from vit_jax.weights.transfer import TransferReport, transfer

__all__ = [
    "ModelSpec",
    "Preprocessing",
    "ReleasedCheckpoint",
    "TransferReport",
    "Weights",
    "from_params",
    "get_checkpoint",
    "list_checkpoints",
    "load",
    "save",
    "transfer",
]
