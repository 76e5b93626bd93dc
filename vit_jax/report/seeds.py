"""Runs of one setting together, and which of several settings stands in a table."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit_jax.report.measured import ACCURACY
from vit_jax.report.result import Record, go_together


@dataclasses.dataclass(frozen=True)
class Ours:
    """A number of ours.

    Attributes:
      mean: in the unit of its table.
      std: sample standard deviation (n - 1); None for one run.
      seeds: how many runs the mean is over.
      notes: what a reader of the number should know.
      sources: folders it is from.
    """

    mean: float
    std: float | None = None
    seeds: int = 1
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Result:
    """Runs that differ in nothing but their seeds.

    Attributes:
      records: one for each seed, in their order.
    """

    records: tuple[Record, ...]

    @property
    def first(self) -> Record:
        """One of them, for what they have in common."""
        return self.records[0]

    def having(self, name: str) -> list[Record]:
        """Those whose number of that name is a result."""
        return [record for record in self.records if name in record.results]

    def by_seed(self, name: str) -> dict[tuple[str, str], float]:
        """A measured share for each seed that has it."""
        return {record.seeds: record.values[name].value for record in self.having(name)}

    def ours(self, name: str, *, unit: float = 100.0) -> Ours | None:
        """Mean and standard deviation of what was measured; None where no run has it.

        Args:
          name: of the measurement, a key of `Record.values`.
          unit: what a share of 1 is shown as: 100 for percent.
        """
        measured = self.having(name)
        if not measured:
            return None
        values = [unit * record.values[name].value for record in measured]
        notes, std = [], statistics.stdev(values) if len(values) > 1 else None
        if len(values) == 1:
            of_draws = measured[0].values[name].std
            if of_draws is not None:
                std = unit * of_draws
                notes.append("one model; ± is over draws of few-shot images")
            else:
                notes.append("one seed")
        if without := [str(record.seed) for record in self.records if record not in measured]:
            notes.append(f"without seed {', '.join(without)}, which {'have' if len(without) > 1 else 'has'} no {name}")
        notes += [note for record in measured for note in record.values[name].notes]
        sources = tuple(str(record.path) for record in measured)
        return Ours(statistics.fmean(values), std, len(values), tuple(dict.fromkeys(notes)), sources)


def group(records: Iterable[Record]) -> list[Result]:
    """Puts runs of one setting together, one for each seed."""
    groups: list[list[Record]] = []
    by_setting: dict[str, list[list[Record]]] = {}
    for record in sorted(records, key=lambda record: str(record.path)):
        alike = by_setting.setdefault(record.setting, [])
        for members in alike:
            if all(go_together(record, other) and record.seeds != other.seeds for other in members):
                members.append(record)
                break
        else:
            alike.append([record])
            groups.append(alike[-1])
    return [
        Result(tuple(sorted(members, key=lambda record: (record.seed or 0, record.origin.seeds)))) for members in groups
    ]


def combine(tasks: Sequence[Result], name: str) -> Ours | None:
    """The mean over tasks in percent, and its standard deviation from seed to seed, where all have the same seeds.

    Args:
      tasks: a result for each.
      name: of the measurement, a key of `Record.values`.
    """
    values = [result.by_seed(name) for result in tasks]
    if not values or not all(values):
        return None
    sources = tuple(str(record.path) for result in tasks for record in result.records)
    if all(each.keys() == values[0].keys() for each in values):
        means = [100 * statistics.fmean(each[seed] for each in values) for seed in values[0]]
        std = statistics.stdev(means) if len(means) > 1 else None
        return Ours(statistics.fmean(means), std, len(means), () if len(means) > 1 else ("one seed",), sources)
    mean = 100 * statistics.fmean(statistics.fmean(each.values()) for each in values)
    fewest = min(map(len, values))
    return Ours(mean, None, fewest, ("its tasks have different seeds, so there is no ±",), sources)


VIT_RULE, BIT_RULE = "table 4's rule", "BiT-HyperRule"

# What else the two rules of fine-tuning set; BiT's mixup depends on the length.
_BOTH_RULES = {
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 0.0,
    "optimizer.layer_decay": None,
    "loss": "softmax",
    "label_smoothing": 0.0,
    "cutmix_alpha": 0.0,
    "data.randaugment_layers": 0,
}
_SETTINGS_OF = {
    VIT_RULE: {**_BOTH_RULES, "optimizer.clip_norm": 1.0, "mixup_alpha": 0.0},
    BIT_RULE: {**_BOTH_RULES, "optimizer.clip_norm": None, "optimizer.learning_rate": 0.003},
}


def rule_of(record: Record) -> str | None:
    """By which of the two rules a model was fine-tuned; None for neither, or where that is not known."""
    return {"cosine": VIT_RULE, "drops": BIT_RULE}.get(record.training.get("optimizer.schedule", ""))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the paper measured what stands in a cell.

    Attributes:
      image_sizes: resolutions that count as the paper's; () for any.
      steps: of fine-tuning; None for any.
      polyak_decay: of the average of the parameters; None for none.
      train_split: all that is there to train on; None for any.
      batch_size: None for any.
      learning_rates: that the paper tried; () for any.
      dropout: at fine-tuning, and who says so; None where nothing is said.
      bit_size: resolution of BiT-HyperRule in the BiT paper; None where the rule is not for the model.
    """

    image_sizes: tuple[int, ...] = ()
    steps: int | None = None
    polyak_decay: float | None = None
    train_split: str | None = None
    batch_size: int | None = 512
    learning_rates: tuple[float, ...] = ()
    dropout: tuple[float, str] | None = None
    bit_size: int | None = None

    def differences(self, record: Record) -> list[str]:
        """What was done in another way, as notes. Of a released checkpoint only the resolution is known."""
        rule = rule_of(record) if record.steps is not None else None
        by_bit = rule == BIT_RULE and self.bit_size is not None
        notes = []
        if by_bit and record.image_size != self.bit_size:
            notes.append(f"BiT-HyperRule at {record.image_size} pixels, in the BiT paper at {self.bit_size}")
        elif not by_bit and self.image_sizes and record.image_size not in self.image_sizes:
            notes.append(f"at {record.image_size} pixels, in the paper at {self.image_sizes[0]}")
        notes += _differences_of_evaluation(record)
        if record.steps is None:
            return [*notes, "a released checkpoint as it is: its fine-tuning was not done here"]
        notes += [f"its config was changed on the way, {change}" for change in record.changes]
        if self.steps is not None and record.steps != self.steps:
            notes.append(f"{record.steps:,} steps, in the paper {self.steps:,}")
        if self.batch_size is not None and record.batch_size != self.batch_size:
            notes.append(f"batch {record.batch_size:,}, in the paper {self.batch_size:,}")
        if self.polyak_decay != record.polyak_decay:
            ours, theirs = (
                "without Polyak averaging" if decay is None else f"with Polyak averaging at {decay}"
                for decay in (record.polyak_decay, self.polyak_decay)
            )
            notes.append(f"{ours}, in the paper {theirs}")
        if self.train_split is not None and record.train_split != self.train_split:
            notes.append(f"trained on {record.train_split}, in the paper on {self.train_split}")
        if self.dropout is not None:
            rate, who = self.dropout
            if (ours_rate := record.training.get("model.dropout_rate")) != rate:
                notes.append(f"dropout {ours_rate} at fine-tuning, {who} {rate}")
        return notes + self._differences_of_rule(record, rule)

    def _differences_of_rule(self, record: Record, rule: str | None) -> list[str]:
        done = record.training
        if rule is None:
            return [f"optimizer.schedule={done.get('optimizer.schedule')}, in the paper cosine"]
        if rule == BIT_RULE and self.bit_size is None:
            return ["fine-tuned by BiT-HyperRule, which in the paper ResNets alone try"]
        whose = "in the paper" if rule == VIT_RULE else "in BiT-HyperRule"
        notes = [
            f"{name}={done.get(name)}, {whose} {value}"
            for name, value in _SETTINGS_OF[rule].items()
            if done.get(name) != value
        ]
        rate = done.get("optimizer.learning_rate")
        if rule == VIT_RULE and self.learning_rates and rate not in self.learning_rates:
            notes.append(f"learning rate {rate}, in the paper one of {', '.join(map(str, self.learning_rates))}")
        if rule == BIT_RULE and (mixup := 0.1 if (record.steps or 0) > 500 else 0.0) != done.get("mixup_alpha"):
            notes.append(f"mixup_alpha={done.get('mixup_alpha')}, {whose} {mixup}")
        return notes


def _differences_of_evaluation(record: Record) -> list[str]:
    """How images were made ready in another way than the released code does it, which resizes all of an image."""
    value = record.values.get(ACCURACY)
    how: Mapping[str, Any] = dict(value.settings) if value else {}
    notes = []
    if small := how.get("data.eval_resize_small"):
        notes.append(f"evaluated on the centre of images whose shorter side is {small} pixels, not on whole images")
    if (resize := how.get("data.eval_resize", "bilinear")) != "bilinear":
        notes.append(f"images to evaluate on are resized by {resize}, in the released code bilinear")
    return notes


def better_rule(candidates: Sequence[Result], protocol: Protocol) -> tuple[Sequence[Result], list[str]]:
    """Of two rules of fine-tuning the better, by the images held out to choose on; and notes on it.

    A sweep that tried both has chosen. Of two sweeps, the one that reached more is taken; where that was not recorded,
    all candidates are returned, because test images choose nothing.
    """
    if swept := [result for result in candidates if result.first.rules and result.first.held_out]:
        first = choose(swept, protocol)[0].first
        return swept, [_tell_rules({_RULES.get(rule, rule): value for rule, value in first.rules.items()}, first)]
    by_rule: dict[str | None, list[Result]] = {}
    for result in candidates:
        by_rule.setdefault(rule_of(result.first) if result.first.steps is not None else None, []).append(result)
    tried = {rule: choose(each, protocol)[0].first for rule, each in by_rule.items() if rule is not None}
    if len(tried) < 2:
        return candidates, []
    reached = {rule: first.held_out for rule, first in tried.items() if first.held_out}
    if len(reached) < len(tried) or len({split for split, _ in reached.values()}) > 1:
        return candidates, ["of two rules; what they reached on held-out images was not recorded, so neither is better"]
    best = max(reached, key=lambda rule: reached[rule][1])
    return by_rule[best], [_tell_rules({rule: value for rule, (_, value) in reached.items()}, tried[best])]


_RULES = {"vit": VIT_RULE, "bit": BIT_RULE}  # as configs/transfer.py calls them


def _tell_rules(reached: Mapping[str, float], best: Record) -> str:
    told = ", ".join(f"{rule} {100 * value:.2f} %" for rule, value in reached.items())
    return f"the better of two rules on {best.held_out[0] if best.held_out else ''}: {told}"


def choose(candidates: Sequence[Result], protocol: Protocol) -> tuple[Result, list[str]]:
    """Which of several settings stands in a cell, and notes on it. What they reached on test images plays no part.

    The one that does most things as the paper does is taken, then the one with most seeds, then the first by folder.
    """
    ranked = sorted(
        candidates,
        key=lambda result: (
            len(protocol.differences(result.first)),
            -len(result.records),
            str(result.first.path),
        ),
    )
    notes = protocol.differences(ranked[0].first)
    if len(ranked) > 1:
        notes.append(f"{len(ranked) - 1} more of other settings: see the table of results")
    return ranked[0], notes
