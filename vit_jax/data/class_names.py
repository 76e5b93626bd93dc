"""Class names of the released heads: 1,000 of ImageNet, 21,843 of ImageNet-21k.

The files have one class per line, with its WordNet id and words, in the order of the labels, which is that of the ids.
"""

import functools
import importlib.resources
from collections.abc import Sequence

from vit_jax.errors import unknown_name

DATA_SETS = ("imagenet2012", "imagenet21k")


@functools.cache
def class_names(data_set: str) -> tuple[str, ...]:
    """Words for each label, such as "tench, Tinca tinca" for label 0 of "imagenet2012"."""
    return tuple(line.partition(" ")[2] for line in _lines(data_set))


@functools.cache
def wordnet_ids(data_set: str) -> tuple[str, ...]:
    """WordNet id of each label, such as "n01440764"."""
    return tuple(line.partition(" ")[0] for line in _lines(data_set))


def _lines(data_set: str) -> list[str]:
    if data_set not in DATA_SETS:
        raise unknown_name("data set with class names", data_set, DATA_SETS)
    return (importlib.resources.files("vit_jax.data") / "classes" / f"{data_set}.txt").read_text().splitlines()


def moved_names(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """Names that both lists have for different labels."""
    known = set(theirs)
    return [name for label, name in enumerate(ours) if name in known and list(theirs[label : label + 1]) != [name]]
