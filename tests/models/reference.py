"""Reference models in NumPy and float64, written from their definitions, with plain loops."""

import math

import numpy as np


def dense(x, params):
    return x @ np.float64(params["kernel"]) + params["bias"]


def layer_norm(x, params, epsilon=1e-6):
    variance = x.var(axis=-1, keepdims=True)
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(variance + epsilon) * params["scale"] + params["bias"]


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def gelu(x, kind="tanh"):
    if kind == "exact":
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def mlp(x, params, kind="tanh"):
    return dense(gelu(dense(x, params["Dense_0"]), kind), params["Dense_1"])


def relative_logits(query, embedding):
    """Product of the query of each q with the embedding of its offset to each k.

    Args:
      query: `[batch, heads, tokens, head_dim]`.
      embedding: of the offsets q - k = tokens - 1, ..., 1 - tokens.
    """
    batch, heads, tokens, _ = query.shape
    logits = np.zeros((batch, heads, tokens, tokens))
    by_offset = dict(zip(range(tokens - 1, -tokens, -1), np.float64(embedding), strict=True))
    for q in range(tokens):
        for k in range(tokens):
            logits[:, :, q, k] = np.einsum("bhd,hd->bh", query[:, :, q], by_offset[q - k])
    return logits


def attend(query, key, value, bias=0.0):
    """Outputs and weights; query, key and value are `[batch, heads, tokens, head_dim]`."""
    weights = softmax(query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1]) + bias)
    return weights @ value, weights


def attention(queries, tokens, params, *, relative_embedding=None, mask=None):
    """Outputs `[batch, queries, width]`; `mask[q, k]` says whether q may attend to k."""

    def heads(x, layer):
        return np.einsum("btc,chd->bhtd", x, np.float64(layer["kernel"])) + layer["bias"][None, :, None]

    query = heads(queries, params["query"])
    bias = 0.0 if mask is None else np.where(mask, 0.0, -np.inf)
    if relative_embedding is not None:
        bias = bias + relative_logits(query, relative_embedding) / math.sqrt(query.shape[-1])
    y, _ = attend(query, heads(tokens, params["key"]), heads(tokens, params["value"]), bias)
    return np.einsum("bhqd,hdc->bqc", y, np.float64(params["out"]["kernel"])) + params["out"]["bias"]


def encoder_block(x, params, *, relative_embedding=None, mask=None):
    """Equations 2 and 3."""
    y = layer_norm(x, params["LayerNorm_0"])
    x = x + attention(y, y, params["MultiHeadDotProductAttention_1"], relative_embedding=relative_embedding, mask=mask)
    return x + mlp(layer_norm(x, params["LayerNorm_2"]), params["MlpBlock_3"])


def sincos_2d(rows, columns, width):
    quarter = width // 4
    table = np.zeros((rows, columns, width))
    for y in range(rows):
        for x in range(columns):
            for i in range(quarter):
                frequency = 10_000 ** (-i / (quarter - 1))
                table[y, x, i::quarter] = (
                    math.sin(x * frequency),
                    math.cos(x * frequency),
                    math.sin(y * frequency),
                    math.cos(y * frequency),
                )
    return table


def position_embedding(kind, params, grid, num_prefix_tokens, width):
    """`[tokens, width]`."""
    if kind == "learned_1d":
        return np.float64(params["pos_embedding"][0])
    rows, columns = grid
    table = np.zeros((rows, columns, width))
    if kind == "learned_2d":
        for y in range(rows):
            for x in range(columns):
                table[y, x] = (*params["pos_embedding_x"][x], *params["pos_embedding_y"][y])
    else:
        table = sincos_2d(rows, columns, width)
    return np.concatenate([np.zeros((num_prefix_tokens, width)), table.reshape(-1, width)])


def encoder(x, params, *, kind, place, grid, num_prefix_tokens):
    """Equations 1 to 4 from the tokens on, with the position embeddings of table 8."""

    def added(params):
        return position_embedding(kind, params, grid, num_prefix_tokens, x.shape[-1])

    adds = kind in ("learned_1d", "learned_2d", "sincos_2d")
    if adds and place == "stem":
        x = x + added(params.get("posembed_input"))
    layer = 0
    while (block := params.get(f"encoderblock_{layer}")) is not None:
        if adds and place == "every_layer":
            x = x + added(block.get("posembed"))
        if adds and place == "shared":
            x = x + added(params.get("posembed_input"))
        relative = None
        if kind == "relative":
            owner = params if place == "shared" else block["MultiHeadDotProductAttention_1"]
            relative = owner["relative_embedding"]
        x = encoder_block(x, block, relative_embedding=relative)
        layer += 1
    return layer_norm(x, params["encoder_norm"])


def group_norm(x, params, epsilon, groups=32):
    batch, rows, columns, channels = x.shape
    grouped = np.float64(x).reshape(batch, rows * columns, groups, channels // groups)
    mean, variance = grouped.mean(axis=(1, 3), keepdims=True), grouped.var(axis=(1, 3), keepdims=True)
    normalised = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)
    return normalised * params["scale"] + params["bias"]


def standardize(kernel, *, std_epsilon=0.0, variance_epsilon=0.0):
    standardized = np.zeros(kernel.shape)
    for channel in range(kernel.shape[-1]):
        weights = np.float64(kernel[..., channel])
        variance = ((weights - weights.mean()) ** 2).mean()
        standardized[..., channel] = (weights - weights.mean()) / (math.sqrt(variance + variance_epsilon) + std_epsilon)
    return standardized


def windows(x, size, stride, padding, fill):
    """`[batch, rows, columns, size, size, channels]`; `padding` is (before, after) of the rows, and of the columns."""
    x = np.pad(np.float64(x), ((0, 0), *padding, (0, 0)), constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    return np.moveaxis(view[:, ::stride, ::stride], 3, -1)


def conv(x, kernel, stride, padding):
    return np.einsum("bhwyxc,yxcd->bhwd", windows(x, kernel.shape[0], stride, padding, 0.0), kernel)


def max_pool(x, size, stride, padding, fill):
    return windows(x, size, stride, padding, fill).max(axis=(3, 4))


def symmetric(padding):
    return ((padding, padding),) * 2


def same(x, size, stride):
    """TensorFlow's "SAME": output sizes are rounded up, and the odd pixel of padding goes to the end."""
    pads = []
    for side in x.shape[1:3]:
        total = max((math.ceil(side / stride) - 1) * stride + size - side, 0)
        pads.append((total // 2, total - total // 2))
    return tuple(pads)
