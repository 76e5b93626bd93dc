"""Figures 10 and 11: position embeddings and attention distances of the runs that were found."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.analysis.attention_distance import distance_model, draw_distances
from vit_jax.analysis.position_similarity import draw_similarities, position_similarities
from vit_jax.errors import UserError
from vit_jax.predict import find_images, read_images
from vit_jax.report.names import kind_of
from vit_jax.report.studies import Comparison
from vit_jax.report.subjects import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "figure_10": "Figure 10: similarity of position embeddings",
    "figure_11": "Figure 11: mean attention distance of each head",
}
_MOST = 6  # networks in a picture
_MOST_IMAGES = 128  # as in figure 11's caption
_BATCH = 16


def networks_of(found: Sequence[Comparison], subjects: Sequence[Subject], name: str) -> list[tuple[str, str]]:
    """The folder and the title of the networks to draw: those of a study, or else the ViTs and hybrids.

    One run stands for each setting, the first by its folder. Accuracy does not choose.
    """
    chosen: list[tuple[str, str]] = []
    for each in found:
        if each.study.name == name:
            for member, label in zip(each.members, each.labels, strict=True):
                described = zip(each.study.headings, each.study.describe(member), strict=True)
                chosen.append(
                    (member.paths[0], "\n".join([label, ", ".join(f"{key} {text}" for key, text in described)]))
                )
    if not chosen:
        transformers = [each for each in subjects if kind_of(each.model.model) in ("ViT", "hybrid")]
        chosen = [(each.paths[0], f"{each.model.model.partition(' (')[0]}\n{each.data}") for each in transformers]
    return sorted(dict(chosen).items())[:_MOST]


def draw_figure_10(networks: Sequence[tuple[str, str]]) -> "tuple[Figure | None, list[str]]":
    """Draws the similarity of the position embeddings of networks; also returns a line for each that has none."""
    similarities, problems = {}, []
    for folder, title in networks:

        def measure(folder: str = folder, title: str = title) -> None:
            for layer, similarity in position_similarities(folder).items():
                similarities["\n".join(filter(None, (title, layer)))] = similarity

        problems += _tried(measure, folder)
    return (draw_similarities(similarities) if similarities else None), problems


def draw_figure_11(networks: Sequence[tuple[str, str]], places: Sequence[str]) -> "tuple[Figure | None, list[str]]":
    """Draws the attention distance of networks, averaged over images; also returns a line for each that has none.

    Raises:
      UserError: there are no images.
    """
    files = find_images(places).images
    files = [
        files[number * len(files) // min(_MOST_IMAGES, len(files))] for number in range(min(_MOST_IMAGES, len(files)))
    ]
    distances, problems = {}, []
    for folder, title in networks:

        def measure(folder: str = folder, title: str = title) -> None:
            model = distance_model(folder, batch_size=min(_BATCH, len(files)))
            measured = [model(images) for paths, images, _ in read_images(files, model.preprocessing, _BATCH) if paths]
            if not measured:
                raise UserError("none of the images can be read")
            of_images = np.concatenate(measured)
            distances[f"{title}\n{len(of_images):,} images"] = of_images.mean(axis=0)

        problems += _tried(measure, folder)
    return (draw_distances(distances) if distances else None), problems


def _tried(measure: Callable[[], None], folder: str) -> list[str]:
    """Measures a network; returns why it cannot be measured, if so."""
    try:
        measure()
    except (UserError, OSError) as problem:
        return [f"{folder}: {problem}"]
    return []
