"""The command in the error for a pickle, run if torch is installed."""

import argparse
import shlex
import subprocess
import sys

import numpy as np
import pytest

from tests.weights.test_formats import as_timm, assert_same, make_weights
from vit_jax.errors import UserError
from vit_jax.weights import load

pytestmark = pytest.mark.oracle

# As timm's train.py, DeiT and MAE, Lightning, DeepSpeed, torch.compile and plain scripts save a state dict.
WRAPPED = {
    "plain.pth": lambda state: state,
    "pytorch_model.bin": lambda state: {**state, "tied": state["norm.weight"]},
    "timm.pth.tar": lambda state: {
        "epoch": 3, "arch": "vit_tiny_patch16_224", "state_dict": state, "optimizer": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(lr=0.1), "version": 2, "metric": 81.2, "state_dict_ema": state,
    },
    "deit.pth": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "scaler": {}},
    "lightning.ckpt": lambda state: {
        "state_dict": {f"model.{name}": array for name, array in state.items()} | {"loss.w": state["norm.bias"]},
        "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 0.1}, "callbacks": {},
    },
    "deepspeed's $file.pt": lambda state: {"module": {f"_orig_mod.{name}": array for name, array in state.items()}},
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", WRAPPED)
def test_the_printed_command_makes_a_file_that_is_read(name, legacy, tmp_path):
    torch = pytest.importorskip("torch")
    weights = make_weights("ViT-Ti/16", image_size=(32, 32), num_layers=2, hidden_dim=192, mlp_dim=8, num_heads=3)
    state = {name: torch.tensor(np.ascontiguousarray(array)) for name, array in as_timm(weights.arrays).items()}
    torch.save(WRAPPED[name](state), tmp_path / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="is a pickle") as caught:
        load(tmp_path / name)
    command = shlex.split(str(caught.value).splitlines()[-1])
    process = subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    (file,) = tmp_path.glob("*.safetensors")
    if name == "pytorch_model.bin":
        with pytest.raises(UserError, match="first tied"):
            load(file)
        return
    assert_same(load(file).arrays, weights.arrays)


def test_a_pickle_that_runs_code_runs_none(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return exec, ("open('was run', 'w').close()",)

    torch.save({"state_dict": {}, "evil": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "evil.pth")
    command = shlex.split(str(caught.value).splitlines()[-1])
    process = subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode != 0
    assert not (tmp_path / "was run").exists()
