"""The paper's studies as tables: figures 3, 4, 5, 8, 9, 10 and 13, and tables 7 and 8.

A study compares networks that differ only in the settings that it varies. Its table has those that were pre-trained on
the paper's data and measured as in the paper. Others, such as a study on CIFAR-10, have a table of their own. A run
whose config page is for a study (configs/studies/) belongs to that study alone; others belong to each that they fit.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

from vit_jax.paper import figures_in_words, tables
from vit_jax.report.figure_tables import says
from vit_jax.report.listings import common_folder
from vit_jax.report.markdown import Row, Table
from vit_jax.report.names import UNKNOWN, distinct_labels, kind_of, model_changes
from vit_jax.report.paper_tables import digits_of
from vit_jax.report.seeds import SeedMean
from vit_jax.report.subjects import FINE_TUNED, FIVE_SHOT, Subject, comparisons

OTHER = "_other"  # ends the name of a table of networks that are not the paper's
NOT_PAPERS = "not the paper's data or measure"
_EXAFLOPS, _RELATIVE, _SPEED = "exaFLOPs", "relative compute", "images/s and core in training"
_SHAPE = ("num_layers", "hidden_dim", "mlp_dim", "num_heads", "patch_size")
_POSITIONS = ("position_embedding", "position_embedding_at")
_NO_NUMBERS = "The paper gives curves without numbers, so there are none beside ours."


@dataclasses.dataclass(frozen=True)
class Study:
    """A study of the paper.

    Attributes:
      name: name of its table's file, such as "figure_8".
      title: what it compares.
      varied: the settings of the pre-training that it varies, by field; a name that ends in a dot is a group.
      headings: headings of the columns that describe a network, after its model.
      describe: the cells under them.
      names_model: whether a column has the model; otherwise `describe` says all.
      without: attributes of the model that `describe` gives.
      includes: whether a network may belong to it.
      is_study: whether networks that differ only in what is varied are a study.
      costs: further columns: the name of a number and how to get it from a network and those that it is compared with.
      measures: which of the measured numbers it shows of networks that are not the paper's.
      only_others: whether the paper's own networks have another table (tables 7 and 8, figures 3 and 5).
      only_pages: whether it has only runs of its page in configs/studies/, which may differ in anything.
    """

    name: str
    title: str
    varied: tuple[str, ...]
    headings: Row
    describe: Callable[[Subject], Row]
    names_model: bool = True
    without: tuple[str, ...] = ()
    includes: Callable[[Subject], bool] = lambda _: True
    is_study: Callable[[Sequence[Subject]], bool] = lambda members: len(members) > 1
    costs: Mapping[str, Callable[[Subject, Sequence[Subject]], float | None]] = dataclasses.field(default_factory=dict)
    measures: Callable[[str], bool] = lambda _: True
    only_others: bool = False
    only_pages: bool = False


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Networks that a study compares with each other.

    Attributes:
      study: the study.
      is_papers: whether they were pre-trained on the paper's data and measured as in the paper.
      folder: the folder that their runs share.
      members: the networks, one of each description.
      labels: the model of each member, with what distinguishes it.
      others: how many more networks have the description of each member.
    """

    study: Study
    is_papers: bool
    folder: str
    members: Sequence[Subject]
    labels: Sequence[str]
    others: Sequence[int]

    @property
    def measures(self) -> list[str]:
        """The names of the numbers that it compares; in the paper, 5-shot ImageNet."""
        if self.is_papers:
            return [FIVE_SHOT]
        names = {name for member in self.members for name in member.measures if self.study.measures(name)}
        return sorted(names, key=_order_of_measures)


def _order_of_measures(name: str) -> tuple[int, str, int, str]:
    shots, is_few_shot, rest = name.partition("-shot ")
    if is_few_shot:
        return 1, rest, int(shots), name
    return (0 if name.startswith("accuracy") else 2), name, 0, name


def _is_transfer(measure: str) -> bool:
    return measure.startswith(FINE_TUNED)


def _images(subject: Subject) -> str:
    return UNKNOWN if subject.num_images is None else f"{subject.num_images:,}"


def _steps(subject: Subject) -> str:
    steps = subject.training.get("steps")
    return f"{steps:,}" if isinstance(steps, int) else UNKNOWN


def _number(subject: Subject, field: str) -> str:
    value = subject.training.get(field)
    return f"{value:g}" if isinstance(value, int | float) else UNKNOWN


def _shape(subject: Subject) -> Row:
    return tuple(str(subject.fields.get(name, UNKNOWN)) for name in _SHAPE)


def shape_base(members: Sequence[Subject]) -> Subject:
    """The network that shares all dimensions but one with most others; the cheapest of several."""

    def rank(subject: Subject) -> tuple[int, float]:
        alike = sum(len(shape_differences(subject, other)) == 1 for other in members)
        return -alike, subject.exaflops or math.inf

    return min(members, key=rank)


def shape_differences(one: Subject, other: Subject) -> list[str]:
    """The dimensions in which two ViTs differ; the number of heads belongs to the width."""
    names = [name for name in _SHAPE if name != "num_heads"]
    return [name for name in names if one.fields.get(name) != other.fields.get(name)]


def _exaflops(subject: Subject, _: Sequence[Subject]) -> float | None:
    return subject.exaflops


def _relative(subject: Subject, members: Sequence[Subject]) -> float | None:
    base = shape_base(members).exaflops
    return subject.exaflops / base if subject.exaflops and base else None


def _speed(subject: Subject, _: Sequence[Subject]) -> float | None:
    return subject.model.speed


def _kinds(members: Sequence[Subject]) -> set[str]:
    return {kind_of(member.model.model) for member in members}


def _differing(name: str) -> Callable[[Sequence[Subject]], bool]:
    return lambda members: len({str(member.training.get(name)) for member in members}) > 1


def _optimizer(subject: Subject) -> str:
    name = str(subject.training.get("optimizer.name"))
    return {"adam": "Adam", "adamw": "Adam", "sgd": "SGD"}.get(name, name)


def _pre_training(subject: Subject) -> Row:
    """The objective, and the target and the corruption rate of masked patch prediction."""
    if subject.training.get("objective") != "masked_patches":
        return ("labels", "", "", _images(subject))
    given = (str(subject.training.get("masked_patches.target")), _number(subject, "masked_patches.corruption_rate"))
    return ("masked patches", *given, _images(subject))


def _several_sizes(members: Sequence[Subject]) -> bool:
    return len({member.num_images for member in members}) > 1


# What a study of model and data may tune for each of its networks.
_TUNED = ("optimizer.", "label_smoothing", "steps", "model.")
STUDIES = (
    Study(
        "figure_3",
        "Figure 3: transfer against the pre-training data",
        (*_TUNED, "data.train_split"),
        ("images",),
        lambda each: (_images(each),),
        is_study=_several_sizes,
        measures=_is_transfer,
        only_others=True,
    ),
    Study(
        "figure_4",
        "Figure 4: accuracy against the number of pre-training images",
        (*_TUNED, "data.train_split", "weights"),
        ("images",),
        lambda each: (_images(each),),
        includes=lambda each: kind_of(each.model.model) != "axial",
        is_study=_several_sizes,
        measures=lambda name: not _is_transfer(name),
    ),
    Study(
        "figure_5",
        "Figure 5: accuracy against pre-training compute",
        _TUNED,
        ("images", "steps"),
        lambda each: (_images(each), _steps(each)),
        is_study=lambda members: len(_kinds(members) & {"ViT", "BiT", "hybrid"}) > 1,
        costs={_EXAFLOPS: _exaflops},
        only_others=True,
    ),
    Study(
        "table_7",
        "Table 7: Adam and SGD",
        ("optimizer.",),
        ("optimizer", "learning rate", "weight decay"),
        lambda each: (
            _optimizer(each),
            _number(each, "optimizer.learning_rate"),
            _number(each, "optimizer.weight_decay"),
        ),
        is_study=_differing("optimizer.name"),
        only_others=True,
    ),
    Study(
        "table_8",
        "Table 8: position embeddings",
        tuple(f"model.{name}" for name in _POSITIONS),
        ("position embedding", "added at"),
        lambda each: tuple(str(each.fields.get(name)) for name in _POSITIONS),
        without=_POSITIONS,
        includes=lambda each: _POSITIONS[0] in each.fields,
        only_others=True,
    ),
    Study(
        "figure_8",
        "Figure 8: dimensions of the Transformer",
        ("model.name", *(f"model.{name}" for name in _SHAPE)),
        ("layers", "width", "MLP", "heads", "patch"),
        _shape,
        names_model=False,
        includes=lambda each: kind_of(each.model.model) == "ViT",
        is_study=lambda members: len({_shape(member) for member in members}) > 1,
        costs={_RELATIVE: _relative, _EXAFLOPS: _exaflops},
    ),
    Study(
        "figure_9",
        "Figure 9: class token and global average pooling",
        ("model.pool", "optimizer.learning_rate"),
        ("pooling", "learning rate"),
        lambda each: (str(each.fields.get("pool")), _number(each, "optimizer.learning_rate")),
        without=("pool",),
        includes=lambda each: "pool" in each.fields,
        is_study=_differing("model.pool"),
    ),
    Study(
        "figure_10",
        "Figure 10: networks whose position embeddings are compared",
        ("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.warmup_steps", "steps"),
        ("learning rate", "weight decay", "steps"),
        lambda each: (
            _number(each, "optimizer.learning_rate"),
            _number(each, "optimizer.weight_decay"),
            _steps(each),
        ),
        includes=lambda each: each.fields.get(_POSITIONS[0]) not in (None, "none"),
    ),
    Study(
        "masked_patches",
        "Appendix B.1.2: masked patch prediction",
        (),
        ("trained with", "target", "corruption rate", "images"),
        _pre_training,
        only_others=True,
        only_pages=True,
    ),
    Study(
        "figure_13",
        "Figure 13: axial attention",
        ("model.", "optimizer.learning_rate"),
        (),
        lambda _: (),
        is_study=lambda members: len(members) > 1 and "axial" in _kinds(members),
        costs={_EXAFLOPS: _exaflops, _SPEED: _speed},
    ),
)


def find_comparisons(subjects: Sequence[Subject]) -> list[Comparison]:
    """Finds the networks that each of the paper's studies compares."""
    found = []
    for study in STUDIES:
        included = [each for each in subjects if study.includes(each) and each.model.study in ("", study.name)]
        papers = [each for each in included if each.is_papers and not study.only_others]
        others = [each for each in included if not each.is_papers and any(map(study.measures, each.measures))]
        for is_papers, networks in ((True, papers), (False, others)):
            if study.only_pages:
                of_page = [each for each in networks if each.model.study == study.name]
                grouped = {common_folder([path for each in of_page for path in each.paths]): of_page}
            else:
                grouped = comparisons(networks, study.varied)
            for folder, alike in grouped.items():
                if members := _members(study, is_papers, alike):
                    found.append(_compare(study, is_papers, folder, members))
    return found


def _members(study: Study, is_papers: bool, alike: Sequence[Subject]) -> list[Subject]:
    """The networks of a comparison; [] if there is none."""
    if study.name in ("figure_3", "figure_4"):
        sizes: dict[str, set[int | None]] = {}
        for member in alike:
            sizes.setdefault(member.model.model, set()).add(member.num_images)
        # In figure 4 of the paper's scale, a model of the paper is worth showing even with one size.
        kept = [
            member
            for member in alike
            if len(sizes[member.model.model]) > 1 or (is_papers and not model_changes(member.model.fields))
        ]
        return kept if (is_papers or study.is_study(kept)) else []
    return list(alike) if len(alike) > 1 and study.is_study(alike) else []


def _compare(study: Study, is_papers: bool, folder: str, members: Sequence[Subject]) -> Comparison:
    """Keeps one network of each description: of the length that most have, then with most seeds."""
    lengths = [member.training.get("steps") for member in members]
    by_row: dict[object, list[Subject]] = {}
    for member in members:
        model = member.model.model if study.names_model else ""
        by_row.setdefault((model, study.describe(member), member.data), []).append(member)
    kept = [
        min(alike, key=lambda each: (-lengths.count(each.training.get("steps")), -len(each.paths), each.paths))
        for alike in by_row.values()
    ]
    labels = distinct_labels([member.model.fields for member in kept], without=study.without)
    return Comparison(study, is_papers, folder, kept, labels, [len(alike) - 1 for alike in by_row.values()])


def study_tables(found: Sequence[Comparison]) -> list[Table]:
    """A table for each study with networks on the paper's data, and one for each with others."""
    made = []
    for study in STUDIES:
        for is_papers in (True, False):
            its = [each for each in found if each.study is study and each.is_papers == is_papers]
            if its:
                made.append(_make_table(study, is_papers, its))
    return made


def _make_table(study: Study, is_papers: bool, found: Sequence[Comparison]) -> Table:
    title = f"{study.title}, percent ({FIVE_SHOT if is_papers else NOT_PAPERS})"
    headings = (*(("model",) if study.names_model else ()), *study.headings, "pre-trained on", "runs")
    table = Table(study.name + ("" if is_papers else OTHER), title, headings, "")
    for each in found:
        rows = {}
        for member, label, others in zip(each.members, each.labels, each.others, strict=True):
            described = ((label,) if study.names_model else ()) + study.describe(member)
            rows[*described, member.data, each.folder] = (member, others)
        for row in sorted(rows, key=_natural):
            member, others = rows[row]
            for name, cost in study.costs.items():
                if number := cost(member, each.members):
                    digits = 2 if name == _RELATIVE else digits_of(number)
                    table.add_ours(row, name, SeedMean(number, sources=member.paths), digits=digits)
            for name in each.measures:
                if (score := member.measures.get(name)) is not None:
                    notes = [f"{others} more of the same description: see the table of results"] if others else []
                    table.add_ours(row, name, score.noted(*notes))
    table.columns.sort(key=lambda name: (name not in study.costs, _order_of_measures(name)))
    table.remarks += [*_models(study, found), *_remarks(study, is_papers, found)]
    return table


def _models(study: Study, found: Sequence[Comparison]) -> list[str]:
    """Says which attributes the models have that are not those of their names."""
    if not study.names_model:
        return []
    meanings: dict[str, str] = {}
    for each in found:
        for member, label in zip(each.members, each.labels, strict=True):
            changes = model_changes(member.model.fields, without=study.without)
            if changes:
                meanings[label] = ", ".join(f"{name}={value}" for name, value in changes.items())
    return [f"{label}: {meaning}" for label, meaning in meanings.items() if not label.endswith(f"({meaning})")]


def _natural(row: Row) -> tuple[tuple[bool, float, str], ...]:
    """Sorts numbers in a row by value; the rows of a folder stay together."""

    def key(text: str) -> tuple[bool, float, str]:
        number = text.replace(",", "")
        return (False, float(number), "") if number.replace(".", "", 1).isdigit() else (True, 0.0, text)

    return tuple(map(key, (row[-1], *row[:-1])))


def _remarks(study: Study, is_papers: bool, found: Collection[Comparison]) -> list[str]:
    """The paper's statement, where its numbers are, and what ours say of pairs of networks."""
    remarks = [says(study.name)] if study.name in figures_in_words.STATEMENTS else []
    if is_papers:
        remarks.append(_NO_NUMBERS)
    else:
        remarks.append("Not comparable with the paper's numbers: other data, other sizes or another measure.")
    if study.name in ("figure_3", "figure_4"):
        remarks += [line for each in found for line in crossings(each)]
    if study.name == "figure_8" and is_papers:
        base = ", ".join(f"{name}={value}" for name, value in figures_in_words.FIGURE_8_BASE.items())
        remarks.append(f"The paper varies one dimension at a time of {base}.")
    if study.name == "figure_9":
        curves = ", ".join(f"{pool} at {rate:g}" for pool, rate in figures_in_words.FIGURE_9_CURVES)
        remarks.append(f"The paper's three curves: {curves}; alike: {_alike()}.")
    if study.name == "figure_13":
        members = [member.model for each in found for member in each.members if member.model.speed]
        devices = sorted({member.device for member in members} - {""})
        ours = f"that of training, the median, on {', '.join(devices) or 'an unknown device'}"
        remarks.append(
            "The figure has the speed of inference on a TPUv3 core. "
            + (f"Ours is {ours}." if members else "Ours was not recorded.")
        )
    return remarks


def _alike() -> str:
    return " and ".join(f"{pool} at {rate:g}" for pool, rate in tables.FIGURE_9.items())


def crossings(found: Comparison) -> list[str]:
    """For each Transformer and each ResNet, says how far the first is ahead by the number of images."""
    by_label: dict[str, dict[int, Subject]] = {}
    for member, label in zip(found.members, found.labels, strict=True):
        if member.num_images is not None:
            by_label.setdefault(label, {})[member.num_images] = member
    lines = []
    for name, of_name in by_label.items():
        for other, of_other in by_label.items():
            is_pair = (name, other) in figures_in_words.FIGURE_4_PAIRS
            if not (is_pair if found.is_papers else kind_of(other) == "BiT" != kind_of(name)):
                continue
            shared = sorted(of_name.keys() & of_other.keys())
            for measure in found.measures:
                pairs = [(n, of_name[n].measures.get(measure), of_other[n].measures.get(measure)) for n in shared]
                differences = [f"{n:,}: {a.mean - b.mean:+.2f}" for n, a, b in pairs if a and b]
                if len(differences) > 1:
                    lines.append(f"{name} minus {other}, {measure}, by images: {', '.join(differences)}")
    return lines
