"""Helpers of several tests of weights."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy

from vit_jax.errors import UserError
from vit_jax.weights import load

NAMES = ("cat", "dog", "owl", "red fox", "ox")


def strip_description(path):
    """Strips a file to what another program would have written: only arrays."""
    if path.suffix == ".npz":
        path.with_name(f"{path.name}.json").unlink()
    else:
        safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, {"format": "pt"})
    return path


def save_plain(path, arrays):
    np.savez(path, **arrays)
    return path


def refuses(expected, place, **options):
    with pytest.raises(UserError) as caught:
        load(place, **options)
    for text in [expected] if isinstance(expected, str) else expected:
        assert re.search(text, str(caught.value)), f"{text!r} is not in: {caught.value}"


def edit(path, **fields):
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
