"""Groups models of one setting: mean and standard deviation over seeds."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from vit_jax.report.measured import MeasuredModel


@dataclasses.dataclass(frozen=True)
class SeedMean:
    """A number of ours, in the unit of its table.

    Attributes:
      mean: over seeds.
      std: sample standard deviation (n - 1); None for one run.
      seeds: number of runs.
      notes: notes for readers.
      sources: folders of the runs.
    """

    mean: float
    std: float | None = None
    seeds: int = 1
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def noted(self, *notes: str) -> "SeedMean":
        """Returns a copy with more notes."""
        return dataclasses.replace(self, notes=(*self.notes, *notes))


@dataclasses.dataclass(frozen=True)
class SeedGroup:
    """Models that differ only in their seeds, one for each seed and in their order."""

    models: tuple[MeasuredModel, ...]

    @property
    def first(self) -> MeasuredModel:
        """The first model, for attributes that all share."""
        return self.models[0]

    @property
    def paths(self) -> tuple[str, ...]:
        """Their folders."""
        return tuple(str(model.path) for model in self.models)

    def having(self, name: str) -> list[MeasuredModel]:
        """The models with a result of that name."""
        return [model for model in self.models if name in model.results]

    def by_seed(self, name: str) -> dict[str, float]:
        """The result of each seed, as a share."""
        return {model.lineage.seeds: model.values[name].value for model in self.having(name)}

    def mean(self, name: str, *, unit: float = 100.0) -> SeedMean | None:
        """Mean and standard deviation of a result; None if no model has it. `unit` is a factor: 100 for percent."""
        models = self.having(name)
        if not models:
            return None
        values = [unit * model.values[name].value for model in models]
        std, notes = _std(values), []
        if len(values) == 1:
            of_draws = models[0].values[name].std
            std = None if of_draws is None else unit * of_draws
            notes.append("one seed" if of_draws is None else "one model; ± is over draws of few-shot images")
        if without := [str(model.seed) for model in self.models if model not in models]:
            notes.append(f"without seed {', '.join(without)}, which {'have' if len(without) > 1 else 'has'} no {name}")
        notes += [note for model in models for note in model.values[name].notes]
        sources = SeedGroup(tuple(models)).paths
        return SeedMean(statistics.fmean(values), std, len(values), tuple(dict.fromkeys(notes)), sources)


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def group(models: Iterable[MeasuredModel]) -> list[SeedGroup]:
    """Groups models by setting, with one model for each seed."""
    groups: list[list[MeasuredModel]] = []
    for model in sorted(models, key=lambda model: str(model.path)):
        for members in groups:
            if all(model.goes_with(other) and model.lineage.seeds != other.lineage.seeds for other in members):
                members.append(model)
                break
        else:
            groups.append([model])
    for members in groups:
        members.sort(key=lambda model: (model.seed or 0, model.lineage.seeds))
    return [SeedGroup(tuple(members)) for members in groups]


def combine(tasks: Sequence[SeedGroup], name: str) -> SeedMean | None:
    """The mean over tasks in percent, and its standard deviation over seeds if all tasks have the same seeds."""
    values = [task.by_seed(name) for task in tasks]
    if not values or not all(values):
        return None
    sources = tuple(path for task in tasks for path in task.paths)
    if all(each.keys() == values[0].keys() for each in values):
        means = [100 * statistics.fmean(each[seed] for each in values) for seed in values[0]]
        notes = () if len(means) > 1 else ("one seed",)
        return SeedMean(statistics.fmean(means), _std(means), len(means), notes, sources)
    mean = 100 * statistics.fmean(statistics.fmean(each.values()) for each in values)
    notes = ("its tasks have different seeds, so there is no ±",)
    return SeedMean(mean, None, min(map(len, values)), notes, sources)
