"""Makes axial.npz, beside this file: an AxialResNet of two units in torch, its intermediates and its gradients.

Written from Wang et al. (2020, arXiv 2003.07853): equation 3, position by position, and the unit of their figure 2,
with group normalisation and standardised kernels (vit_jax/models/axial_resnet.py says why). Nothing of vit_jax is
imported. torch computes in float64 and differentiates; the results are rounded to float32 once. weights_recipe.py makes
the weights from names and shapes, so that the file need not contain them.

Made with torch 2.13.0 (CPU) and numpy 2.4.6:

    python tests/golden/make_axial_golden.py

Contents:

    root, block1, block2  [2, rows, columns, channels], after the root and after each unit: every eighth channel
    logits                [2, 5]
    gradients/<name>      [2], `probe_gradient` of the mean cross-entropy of labels 1 and 3
"""

import pathlib

import numpy as np
import torch
import weights_recipe
from torch.nn import functional

OUTPUT = pathlib.Path(__file__).with_name("axial.npz")
HEIGHT, WIDTH, CLASSES, HEADS, LABELS = 32, 48, 5, 8, (1, 3)

params: dict[str, torch.Tensor] = {}


def parameter(name, *shape):
    """The parameter of this name, in our layout; made when first asked for."""
    if name not in params:
        array = weights_recipe.make_array(name, shape)
        params[name] = torch.tensor(array, dtype=torch.float64, requires_grad=True)
    return params[name]


def convolve(x, name, features, *, size=1, stride=1):
    kernel = parameter(f"{name}/kernel", size, size, x.shape[1], features)
    kernel = (kernel - kernel.mean((0, 1, 2))) / torch.sqrt(kernel.var((0, 1, 2), correction=0) + 1e-10)
    return functional.conv2d(x, kernel.permute(3, 2, 0, 1), stride=stride)


def normalise(x, name):
    channels = x.shape[1]
    return functional.group_norm(x, 32, parameter(f"{name}/scale", channels), parameter(f"{name}/bias", channels), 1e-4)


def attend(x, name):
    """Equation 3 for sequences `[batch, channels, length]`."""
    batch, channels, length = x.shape
    values = channels // HEADS
    queries = values // 2
    qkv = torch.einsum("bcl,cd->bdl", x, parameter(f"{name}/qkv/kernel", channels, 2 * channels))
    qkv = normalise(qkv, f"{name}/gn_qkv").reshape(batch, HEADS, 2 * values, length)
    query, key, value = qkv.split([queries, queries, values], dim=2)
    # The offset p - o of the first embedding is 1 - length.
    table = parameter(f"{name}/relative_embedding", 2 * length - 1, 2 * values)
    outputs = []
    for o in range(length):
        of_offsets = table[length - 1 - o : 2 * length - 1 - o]  # p - o for p = 0, ..., length - 1
        to_query, to_key, to_value = of_offsets.T.split([queries, queries, values])
        similarity = (query[..., o, None] * (key + to_query) + key * to_key).sum(dim=2)
        weights = torch.softmax(similarity, dim=-1)
        outputs.append((weights[:, :, None] * (value + to_value)).sum(dim=-1))
    y = torch.stack(outputs, dim=-1)
    return normalise(y.reshape(batch, channels, length), f"{name}/gn_out")


def unit(x, name, width, stride):
    shortcut = normalise(convolve(x, f"{name}/conv_proj", 4 * width, stride=stride), f"{name}/gn_proj")
    x = functional.relu(normalise(convolve(x, f"{name}/conv1", width), f"{name}/gn1"))
    batch, _, rows, columns = x.shape
    x = x.permute(0, 3, 1, 2).reshape(batch * columns, width, rows)
    x = attend(x, f"{name}/height_axis").reshape(batch, columns, width, rows)
    x = x.permute(0, 3, 2, 1).reshape(batch * rows, width, columns)
    x = attend(x, f"{name}/width_axis").reshape(batch, rows, width, columns).permute(0, 2, 1, 3)
    x = functional.relu(functional.avg_pool2d(x, stride))
    x = normalise(convolve(x, f"{name}/conv3", 4 * width), f"{name}/gn3")
    return functional.relu(x + shortcut)


def main():
    images = torch.tensor(weights_recipe.make_images(2, HEIGHT, WIDTH), dtype=torch.float64)
    # An odd number of pixels of padding has the last one at the end, as in TensorFlow.
    x = functional.pad(images.permute(0, 3, 1, 2), (2, 3, 2, 3))
    x = functional.relu(normalise(convolve(x, "conv_root", 64, size=7, stride=2), "gn_root"))
    x = root = functional.max_pool2d(functional.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, stride=2)
    x = block1 = unit(x, "block1/unit01", 64, stride=1)
    x = block2 = unit(x, "block2/unit01", 128, stride=2)
    x = x.mean(dim=(2, 3))
    logits = x @ parameter("head/kernel", x.shape[1], CLASSES) + parameter("head/bias", CLASSES)
    functional.cross_entropy(logits, torch.tensor(LABELS)).backward()

    found = {
        name: x.permute(0, 2, 3, 1)[..., ::8] for name, x in (("root", root), ("block1", block1), ("block2", block2))
    }
    arrays = {name: x.detach().numpy() for name, x in (found | {"logits": logits}).items()}
    for name, leaf in sorted(params.items()):
        arrays[f"gradients/{name}"] = weights_recipe.probe_gradient(name, leaf.grad.numpy())
    np.savez(OUTPUT, **{name: array.astype(np.float32) for name, array in arrays.items()})


main()
