"""The rows of the train step benchmark, and their table."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.common import number
from vit_jax.console import format_table


@dataclasses.dataclass
class Row:
    """One line of the result: a candidate at one task. None is unknown.

    Attributes:
      model: name of the model.
      variant: "vit_jax", "vit_jax <variant>", "timm" or "timm compiled".
      what: "forward" or "train".
      dtype: of the computation.
      batch: images of a step.
      overrides: attributes of the model that were set.
      timm_name: the name of timm's model.
      parameters: number of the model's parameters.
      images_per_second: median over the rounds.
      images_per_second_min: of the slowest round.
      images_per_second_max: of the fastest round.
      ms_per_step: milliseconds a step, at the median.
      steps: of a round.
      round_seconds: seconds a step, round by round.
      compile_seconds: tracing and compilation; of torch.compile the first step, with its backward pass if it has one.
      memory_bytes: see the docstring of train_step.py.
      flops_per_image: of this task; a multiplication and an addition are two.
      flops_per_second: of the device.
      utilisation: of the matrix product's rate.
      ratio_to_timm: images_per_second over that of timm's faster candidate.
      loss: of the last train step, which shows that it trained.
      note: what a reader should know.
      error: why there are no numbers.
    """

    model: str
    variant: str
    what: str
    dtype: str
    batch: int | None = None
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    timm_name: str | None = None
    parameters: int | None = None
    images_per_second: float | None = None
    images_per_second_min: float | None = None
    images_per_second_max: float | None = None
    ms_per_step: float | None = None
    steps: int | None = None
    round_seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float | None = None
    memory_bytes: int | None = None
    flops_per_image: float | None = None
    flops_per_second: float | None = None
    utilisation: float | None = None
    ratio_to_timm: float | None = None
    loss: float | None = None
    note: str | None = None
    error: str | None = None


def finish_row(row: Row, loss: float | None, reference: float | None) -> None:
    """Fills in what follows from the rounds, the last loss and the rate of matrix products in FLOP/s."""
    assert row.batch is not None
    seconds = statistics.median(row.round_seconds)
    row.ms_per_step = 1e3 * seconds
    row.images_per_second = row.batch / seconds
    row.images_per_second_min = row.batch / max(row.round_seconds)
    row.images_per_second_max = row.batch / min(row.round_seconds)
    if row.flops_per_image:
        row.flops_per_second = row.flops_per_image * row.images_per_second
        if reference:
            row.utilisation = row.flops_per_second / reference
    if loss is not None and math.isfinite(loss):
        row.loss = loss
    elif loss is not None:
        row.note = f"the loss is {loss}"


def compare_with_timm(rows: list[Row]) -> None:
    """Fills in the ratios to timm's faster candidate, and notes other numbers of parameters."""
    theirs = [row for row in rows if row.variant.startswith("timm") and row.images_per_second]
    if not theirs:
        return
    timm = max(theirs, key=lambda row: row.images_per_second or 0.0)
    for row in rows:
        if row.images_per_second and timm.images_per_second:
            row.ratio_to_timm = row.images_per_second / timm.images_per_second
        if row.parameters and row.parameters != timm.parameters:
            row.note = f"{row.parameters:,} parameters, timm {timm.parameters:,}: not the same model"


def rows_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""

    def rate(value: float | None) -> str:
        return number(value, ".0f" if (value or 0) >= 1000 else ".1f" if (value or 0) >= 100 else ".2f")

    headings = ("model", "variant", "what", "dtype", "batch", "images/s", "min to max", "ms/step", "compile s")
    headings += ("memory GB", "GFLOP/image", "TFLOP/s", "utilisation", "to timm")
    cells = [
        (
            *(row.model, row.variant, row.what, row.dtype, number(row.batch, ".0f")),
            "failed" if row.error else rate(row.images_per_second),
            f"{rate(row.images_per_second_min)} to {rate(row.images_per_second_max)}" if row.images_per_second else "-",
            number(row.ms_per_step, ".2f"),
            number(row.compile_seconds, ".1f"),
            number(row.memory_bytes, ".2f", 1e-9),
            number(row.flops_per_image, ".2f", 1e-9),
            number(row.flops_per_second, ".3f", 1e-12),
            number(row.utilisation, ".1f", 100, " %"),
            number(row.ratio_to_timm, ".3f"),
        )
        for row in rows
    ]
    return format_table(headings, cells, num_left=4)


def format_remarks(rows: Sequence[Row]) -> str:
    """Errors and notes as a list, each once."""
    remarks: dict[str, list[str]] = {}
    for row in rows:
        for remark in filter(None, (row.error, row.note)):
            remarks.setdefault(remark, []).append(f"{row.variant} {row.what}")
    return "".join(f"- {', '.join(who)}: {remark}\n" for remark, who in remarks.items())
