"""Several data sets as one, drawn from by weight."""

import bisect
import itertools
from collections.abc import Sequence

from vit_jax.data.sources.base import Example, Numbers, Source, fingerprint_of
from vit_jax.errors import UserError


class Mixture:
    """A source made of others, one after the other; `weights` tell the pipeline how often to draw from each.

    An epoch of a mixture has as many examples as all its sources together, but visits each by its weight: within each
    source every example comes once before any comes again.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        """Combines sources of the same classes.

        Args:
          sources: the parts.
          weights: share of the examples drawn from each; they need not sum to 1.

        Raises:
          UserError: there are none, a weight is not positive, or the classes differ.
        """
        if not sources or len(sources) != len(weights):
            raise UserError(f"a mixture takes a weight for each source; got {len(sources)} and {len(weights)}.")
        if not all(0 < weight < float("inf") for weight in weights):
            raise UserError(f"weights of a mixture must be more than 0, got {tuple(weights)}.")
        first = sources[0]
        for other in sources[1:]:
            if _names(other) != _names(first) or other.num_classes != first.num_classes:
                raise UserError(
                    f"{first.name} and {other.name} have different classes ({first.num_classes} and "
                    f"{other.num_classes}), so labels would not mean the same. Prepare both with one list of classes."
                )
        self.sources = tuple(sources)
        total = sum(weights)
        self.weights = tuple(weight / total for weight in weights)
        self.name = " + ".join(source.name for source in sources)
        self.split = " + ".join(source.split for source in sources)
        self.splits: Sequence[str] = (self.split,)
        self.class_names, self.num_classes = first.class_names, first.num_classes
        self.max_labels = max(source.max_labels for source in sources)
        self.starts = tuple(itertools.accumulate((len(source) for source in sources), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def _find(self, index: int) -> tuple[Source, int]:
        part = bisect.bisect_right(self.starts, index) - 1
        return self.sources[part], index - self.starts[part]

    def __getitem__(self, index: int) -> Example:
        source, index = self._find(index)
        return source[index]

    def parts(self) -> list[tuple[Source, Numbers]]:
        """The sources, each with all of its examples."""
        return [(source, range(len(source))) for source in self.sources]

    def fingerprint(self) -> str:
        """Changes when that of a source, or a weight, does."""
        return fingerprint_of([*(source.fingerprint() for source in self.sources), self.weights])

    def where(self, index: int) -> str:
        """The place of the example in its source."""
        source, index = self._find(index)
        return source.where(index)


def _names(source: Source) -> list[str] | None:
    return None if source.class_names is None else list(source.class_names)
