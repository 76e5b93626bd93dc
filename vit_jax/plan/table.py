"""Formats a plan for the terminal."""

from collections.abc import Callable, Iterator, Sequence

from vit_jax import console
from vit_jax.plan.hlo import total_bytes
from vit_jax.plan.plan_row import GIB, PlanRow, first_line

_MISSING = "-"


def _number(value: float | None, form: str) -> str:
    return _MISSING if value is None else format(value, form)


def _gib(num_bytes: float | None) -> str:
    return _MISSING if num_bytes is None else f"{num_bytes / GIB:.2f}"


def _seconds(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def _short(value: float | None) -> str:
    """Three digits and a unit: 68.3, 683, 2.5k."""
    if value is None:
        return _MISSING
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _total_and_usable(row: PlanRow) -> str:
    return f"{_gib(row.memory.total)} / {_gib(row.memory.usable)}" if row.memory else _MISSING


_FITS = {"fits": "yes", "fits by formula": "yes*", "does not fit": "no", "does not fit by formula": "no*"}

_COLUMNS: tuple[tuple[str, Callable[[PlanRow], str]], ...] = (
    ("topology", lambda row: row.topology),
    ("cores", lambda row: str(row.num_cores)),
    ("batch", lambda row: f"{row.batch_size:,}"),
    ("sharding", lambda row: row.sharding),
    ("remat", lambda row: row.remat),
    ("parts", lambda row: str(row.accumulation_steps)),
    ("fits", lambda row: _FITS.get(row.status, row.status)),
    ("arguments", lambda row: _gib(row.memory.arguments if row.memory else None)),
    ("temporaries", lambda row: _gib(row.memory.temporaries if row.memory else None)),
    ("in all / usable", _total_and_usable),
    ("compiler", lambda row: _seconds(row.compiler_seconds)),
    ("+ network", lambda row: _seconds(row.interconnect_seconds)),
    ("estimate", lambda row: _MISSING if row.step_seconds is None else row.estimate or _MISSING),
    ("roofline", lambda row: _seconds(row.roofline.seconds if row.roofline else None)),
    ("images/s", lambda row: _number(row.images_per_second, ",.0f")),
    ("steps", lambda row: _number(None if row.days is None else row.num_steps, ",")),
    ("days", lambda row: _short(row.days)),
    ("core-days", lambda row: _short(row.core_days)),
    ("as v3", lambda row: _short(row.tpuv3_core_days)),
    ("paper", lambda row: _short(row.paper_core_days)),
    ("price", lambda row: _number(row.price, ",.0f")),
)
_ALWAYS = ("topology", "cores", "batch", "fits", "in all / usable")


def format_table(rows: Sequence[PlanRow]) -> str:
    """Formats one line per row, without columns that have only missing or default values."""
    columns = []
    for heading, cell in _COLUMNS:
        cells = [cell(row) for row in rows]
        boring = {"sharding": "replicated", "remat": "none", "parts": "1"}.get(heading, _MISSING)
        if heading in _ALWAYS or any(each != boring for each in cells):
            columns.append((heading, *cells))
    headings, *lines = zip(*columns, strict=True)
    return console.format_table(headings, lines, num_left=1, markdown=False)


def _describe(row: PlanRow) -> str:
    """Details of a row: FLOPs, collectives, problems and advice."""
    name = f"{row.topology}, batch {row.batch_size:,}"
    if row.fits or not row.message:
        return f"{name}: {'; '.join([*_remarks(row), *_details(row)])}"
    does_not_fit = "does not fit: " if row.status.startswith("does not fit") else ""
    problem = first_line(row.message) if row.status == "failed" else row.message
    formula = f" (by formula, because {row.not_compiled})" if row.not_compiled else ""
    advice = f"; {row.advice}" if row.advice else ""
    return f"{name}: {does_not_fit}{problem}{formula}{advice}"


def _remarks(row: PlanRow) -> Iterator[str]:
    """Limits of the numbers of a row that fits."""
    if row.message:
        yield f"fits, but the run is refused: {row.message}"
    if row.not_compiled:
        yield f"by formula, because {row.not_compiled}"
    if row.no_estimate:
        yield f"no time: {row.no_estimate}"
    if row.estimate == "roofline":
        yield "the compiler's cycles come to less than the roofline, which replaces them"
    if row.advice:
        yield row.advice


def _details(row: PlanRow) -> Iterator[str]:
    """FLOPs, exchanges and times."""
    if row.flops:
        tera = row.flops / 1e12
        flops = f"{format(tera, ',.0f' if tera >= 10 else '.3g')} TFLOP a step by formula"
        if row.compiler_flops:
            flops += f", {100 * (row.compiler_flops / row.flops - 1):+.2f} % by the compiler"
        yield flops
    for kind, sizes in total_bytes(row.collectives).items():
        dtypes = ", ".join(
            f"{num_bytes / 1e6:,.1f} MB {dtype}" for dtype, num_bytes in sizes.items() if dtype != "count"
        )
        yield f"{sizes['count']} {kind} ({dtypes})"
    if row.dcn_bandwidth:
        yield f"between slices {row.dcn_bandwidth * 8 / 1e9:g} Gbit/s a {'GPU' if row.device == 'GPU' else 'chip'}"
    if row.unknown_loops:
        yield f"{row.unknown_loops} loops counted once"
    if row.roofline:
        yield f"roofline: {row.roofline.limit}"
    if row.compile_seconds:
        yield f"compiled in {row.compile_seconds:.0f} s ({row.cpu_seconds:.0f} s of CPU)"


LEGEND = """\
Memory in GiB on each JAX device (v2, v3, TPU7x: a core; v4, v5p: a chip of two cores; v5e, v6e: a chip of one core).
Seconds of a step: "compiler" is computation and "+ network" the collectives that do not overlap with it, by formula.
"estimate": "cycles" are the compiler's for each operation, over the clock; "roofline" replaces fewer cycles; "formula":
see below. "roofline": this program cannot be faster. Images/s and days are of the sum of "compiler" and "+ network",
without input, evaluation and checkpoints. "as v3": core-days of TPU v3 with the same peak; "paper": table 2, in the
same unit."""
FORMULA_LEGEND = """\
* by formula, without a compiler: memory is an upper bound, before fusion; time assumes 40 % of the peak, and NVLink
between the GPUs of a machine."""
SLICES_LEGEND = """\
Several slices, or machines with GPUs, are joined by the data-centre network: "+ network" takes it at the full rate of
the data sheet, or of --dcn_gigabits, with nothing overlapped."""


def format_plan(rows: Sequence[PlanRow]) -> str:
    """The whole plan: table, notes and legend."""
    parts = [format_table(rows), "\n".join(map(_describe, rows)), LEGEND]
    if any(row.status.endswith("by formula") for row in rows):
        parts.append(FORMULA_LEGEND)
    if any(row.num_slices > 1 for row in rows):
        parts.append(SLICES_LEGEND)
    versions = {
        f"JAX {row.versions['jax']}" + (f", libtpu {row.versions['libtpu']}" if row.versions.get("libtpu") else "")
        for row in rows
        if row.versions
    }
    if versions:
        parts.append(f"For {'; '.join(sorted(versions))}: another version may need more or less.")
    return "\n\n".join(parts)
