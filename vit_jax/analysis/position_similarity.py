"""Similarity of position embeddings (figure 7, centre, and figure 10)."""

import argparse
import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.analysis.attention_model import load_transformer
from vit_jax.analysis.picture_flags import add_weights, load_weights, title_of, write_picture
from vit_jax.errors import UserError
from vit_jax.models.position_embeddings import PositionEmbedding
from vit_jax.weights import Weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4  # of pictures, if there are many
_LARGEST_SIDE = 36.0  # of the whole picture, in inches


def cosine_similarity(embeddings: np.ndarray) -> np.ndarray:
    """Cosine similarity of the position embedding of each patch with those of all patches.

    Args:
      embeddings: `[rows, columns, width]`. An embedding of zeros has the similarity 0 with all.

    Returns:
      float32 `[rows, columns, rows, columns]`.
    """
    rows, columns, width = embeddings.shape
    vectors = _normalized(embeddings.reshape(-1, width))
    return (vectors @ vectors.T).reshape(rows, columns, rows, columns).astype(np.float32)


def offset_similarity(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Cosine similarity of the embedding of each pair's offset with the embedding of offset 0.

    Relative position embeddings belong to pairs of tokens. So that their picture can be read like the others, the
    value at query q and key k compares the embedding of p_q - p_k, all heads together, with that of a token's offset
    to itself; it is 1 where q is k. The paper has no such picture, and the definition is ours.

    Args:
      table: embeddings of the offsets p_q - p_k = num_tokens - 1, ..., 1 - num_tokens in raster order,
        `[2 * num_tokens - 1, num_heads, head_dim]`.
      grid: rows and columns of patches.

    Returns:
      float32 `[rows, columns, rows, columns]`: of the query and of the key.
    """
    zero = len(table) // 2
    vectors = _normalized(table.reshape(len(table), -1))
    positions = np.arange(grid[0] * grid[1])
    offsets = positions[:, None] - positions
    return (vectors @ vectors[zero])[zero - offsets].reshape(*grid, *grid).astype(np.float32)


def _normalized(vectors: np.ndarray) -> np.ndarray:
    """Divides vectors `[count, width]` by their norms, in float64."""
    vectors = vectors.astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def position_similarities(weights: Weights | str | pathlib.Path) -> dict[str, np.ndarray]:
    """Similarities of all position embeddings of a model, `[rows, columns, rows, columns]` each.

    Names are "layer 0", "layer 1", ... if each layer has its own embeddings, and "" if there is one set.

    Args:
      weights: from `vit_jax.weights.load`, or its argument.

    Raises:
      UserError: the model has no position embeddings.
    """
    weights = load_transformer(weights, "position embeddings")
    model = weights.spec.create()
    grid = model.grid(*(weights.spec.image_size or weights.preprocessing.image_size))
    kind = getattr(model, "position_embedding", "learned_1d")
    if kind == "none":
        raise UserError(
            f"{weights.source or 'this'} ({weights.spec}) has no position embeddings. Use weights of a model with them."
        )
    found: dict[str, dict[str, np.ndarray]] = {} if kind != "sincos_2d" else {"": {}}
    for name, array in weights.arrays.items():
        module, _, leaf = name.rpartition("/")
        if leaf == "relative_embedding" or leaf.startswith("pos_embedding"):
            layer = re.search(r"encoderblock_(\d+)/", module)
            found.setdefault(f"layer {layer[1]}" if layer else "", {})[leaf] = array
    prefix, similarities = model.num_prefix_tokens, {}
    for title in sorted(found, key=lambda title: int(title[6:] or 0)):
        arrays = {leaf: array.astype(np.float32) for leaf, array in found[title].items()}
        if kind == "relative":
            similarities[title] = offset_similarity(arrays["relative_embedding"], grid)
            continue
        embedding = PositionEmbedding(kind, grid, prefix, model.hidden_dim)
        values = np.asarray(embedding.apply({"params": arrays} if arrays else {}))
        similarities[title] = cosine_similarity(values[0, prefix:].reshape(*grid, -1))
    return similarities


def draw_similarities(similarities: Mapping[str, np.ndarray]) -> "Figure":
    """Draws a grid of tiles for each entry: the tile of a patch shows its similarity with all patches.

    Args:
      similarities: `[rows, columns, rows, columns]` by title.
    """
    from matplotlib.figure import Figure

    across = min(len(similarities), _COLUMNS if len(similarities) > 1 + _COLUMNS else 1 + _COLUMNS)
    down = -(-len(similarities) // across)
    # A similarity is at least one pixel of the PNG, unless there are very many.
    most = max(
        max(rows * (rows + 1), columns * (columns + 1)) for rows, columns, *_ in map(np.shape, similarities.values())
    )
    side = min(max(4.2, most / 90), _LARGEST_SIDE / max(across, down))
    figure = Figure(figsize=(side * across + 1, side * down + 0.3), layout="constrained")
    axes = np.atleast_1d(figure.subplots(down, across)).ravel()
    for axis in axes[len(similarities) :]:
        axis.axis("off")
    for axis, (title, similarity) in zip(axes, similarities.items(), strict=False):
        rows, columns = similarity.shape[:2]
        tiles = np.full((rows, rows + 1, columns, columns + 1), np.nan, np.float32)
        tiles[:, :rows, :, :columns] = similarity.transpose(0, 2, 1, 3)
        tiles = tiles.reshape(rows * (rows + 1), columns * (columns + 1))[:-1, :-1]
        image = axis.imshow(tiles, vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=10, parse_math=False)
        axis.set(xlabel="input patch column", ylabel="input patch row")
        for count, set_ticks in ((columns, axis.set_xticks), (rows, axis.set_yticks)):
            shown = np.arange(0, count, -(-count // 16))
            set_ticks(shown * (count + 1) + (count - 1) / 2, [str(number + 1) for number in shown], fontsize=8)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=list(axes), label="cosine similarity", shrink=0.8)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the subcommand."""
    add_weights(parser, several=True)


def run(args: argparse.Namespace) -> int:
    """Draws the picture; returns the exit status."""
    drawn = {}
    for place in args.weights:
        weights = load_weights(place, args.model)
        for layer, similarity in position_similarities(weights).items():
            drawn["\n".join(filter(None, (title_of(weights), layer)))] = similarity
    write_picture(args.output, draw_similarities(drawn))
    return 0
