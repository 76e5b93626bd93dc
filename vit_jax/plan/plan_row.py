"""A row of a plan: memory, time and cost of a config on a slice."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_jax.plan import roofline as estimates
from vit_jax.plan.compiling import compile_step
from vit_jax.plan.hlo import Collective, total_bytes
from vit_jax.plan.roofline import Roofline
from vit_jax.plan.topologies import Topology
from vit_jax.run.accounting import paper_core_days, tpuv3_core_days

FITS = ("fits", "fits by formula")
GIB = 2**30
# Share of the peak that is assumed without a compiler: well-tuned Transformers reach it on GPUs.
FORMULA_UTILISATION = 0.4
FAILURES = ("failed", "timed out")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device. Of a step that does not fit only the first two are known."""

    total: int
    usable: int  # available to a program, by the compiler, or by the data sheet if nothing is compiled
    arguments: int | None = None  # the state and the batch
    outputs: int | None = None  # those not written over an argument
    temporaries: int | None = None  # activations and other arrays within a step
    code: int | None = None  # the program

    @property
    def overshoot(self) -> int:
        """Bytes missing; negative: bytes left."""
        return self.total - self.usable


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """A config on a slice. None is unknown."""

    topology: str  # name of the slice, or of several
    task: str  # "train" or "inference"
    model: str
    image_size: int  # in pixels
    batch_size: int  # images of a step, over all devices
    num_devices: int  # JAX devices that take part
    num_cores: int  # their TensorCores, or GPUs
    device: str  # kind of a JAX device: "core", "chip" or "GPU"
    sharding: str  # this and the next three: of the config
    remat: str
    scan_layers: bool
    accumulation_steps: int
    # "fits", "does not fit"; both with "by formula" for GPUs and slices that libtpu does not compile for; "refused" (by
    # vit_jax), "failed" (the compiler), "timed out".
    status: str
    message: str | None = None  # the error; for a step that fits, why the run is refused
    advice: str | None = None  # a change that was tried and fits
    not_compiled: str | None = None  # why the row of a TPU slice is by formula
    memory: Memory | None = None
    num_parameters: int | None = None
    num_trained: int | None = None  # parameters that are trained
    flops: float | None = None  # of a step, by formula
    compiler_flops: float | None = None  # by the compiler, over all devices; None with loops, which it counts once
    collectives: tuple[Collective, ...] = ()  # exchanges of one step on one device
    compiler_seconds: float | None = None  # estimate of a step, without collectives
    # How: "cycles" (the compiler's, divided by the clock), "roofline" (if cycles give less), "formula"
    # (`FORMULA_UTILISATION`).
    estimate: str | None = None
    no_estimate: str | None = None  # why there is no time
    optimal_seconds: float | None = None  # XLA's own sum, with each operation at its peak, for comparison
    interconnect_seconds: float | None = None  # of collectives that do not overlap with computation
    num_slices: int = 1  # or machines with GPUs
    dcn_bandwidth: float | None = None  # bytes/s per chip between slices, if there are several
    unknown_loops: int = 0  # loops of the program that were counted as one iteration
    roofline: Roofline | None = None  # lower bounds on the time of a step of this program
    num_steps: int | None = None  # length of the run
    days: float | None = None  # of the run, at `step_seconds`
    core_days: float | None = None  # `days` times `num_cores`
    tpuv3_core_days: float | None = None  # days of TPUv3 cores with the same peak rate
    paper_core_days: float | None = None
    price: float | None = None  # of the run, in the currency of the given price
    compile_seconds: float | None = None  # to lower and compile
    cpu_seconds: float | None = None  # of all cores and of the whole worker
    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)  # of "jax" and "libtpu"

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory."""
        return self.status in FITS

    @property
    def step_seconds(self) -> float | None:
        """Estimate of a step: `compiler_seconds` and `interconnect_seconds`, at least the roofline."""
        if self.compiler_seconds is None or self.interconnect_seconds is None:
            return None
        seconds = self.compiler_seconds + self.interconnect_seconds
        return max(seconds, self.roofline.seconds) if self.roofline else seconds

    @property
    def images_per_second(self) -> float | None:
        """Estimate of the speed, over all devices."""
        return self.batch_size / self.step_seconds if self.step_seconds else None

    def to_json(self) -> dict[str, Any]:
        """All fields and properties as plain values."""
        return dataclasses.asdict(self) | {
            "collectives": total_bytes(self.collectives),
            "step_seconds": self.step_seconds,
            "images_per_second": self.images_per_second,
            "roofline_seconds": self.roofline.seconds if self.roofline else None,
        }


def failures(rows: Sequence[PlanRow]) -> list[str]:
    """Lists the rows that failed or timed out; if all were refused, those."""
    failed = [row for row in rows if row.status in FAILURES]
    if all(row.status == "refused" for row in rows):
        failed = list(rows)
    return [f"{row.topology}, batch {row.batch_size:,}: {row.status}" for row in failed]


def plan_record(rows: Sequence[PlanRow]) -> dict[str, Any]:
    """A whole plan as plain values: versions, whether all rows have an answer, and the rows."""
    failed = failures(rows)
    versions: dict[str, str | None] = next((row.versions for row in rows if row.versions), {})
    return {
        "versions": versions,
        "success": not failed,
        "failures": failed,
        "rows": [row.to_json() for row in rows],
    }


def plan_row(
    config: ConfigDict,
    topology: Topology,
    *,
    num_devices: int | None = None,
    task: str = "train",
    timeout_minutes: float = 10.0,
    price_per_core_hour: float | None = None,
    memory_only: bool = False,
) -> PlanRow:
    """Compiles the step of a config for a slice, and estimates its memory, time and cost.

    Args:
      config: see `vit_jax.config.base_config`; needs neither its data set nor a device.
      topology: from `find_topology`.
      num_devices: use only so many devices of the slice; None: all.
      task: "train", or "inference" for only the forward pass.
      timeout_minutes: limit for the compiler.
      price_per_core_hour: price of a TensorCore or GPU, in any currency.
      memory_only: only determine whether it fits and its bytes, in a fifth of the time.

    Raises:
      UserError: libtpu is needed and not installed. All other failures are rows.
    """
    devices = topology.num_devices if num_devices is None else num_devices
    if not 1 <= devices <= topology.num_devices:
        message = f"{topology.name} has {topology.num_devices} devices, not {devices}"
        answer = {"status": "refused", "message": message}
    elif topology.num_slices > 1 and devices < topology.num_devices:
        message = "several slices are planned whole: leave --num_devices out, or plan one slice"
        answer = {"status": "refused", "message": message}
    else:
        answer = compile_step(
            config, topology, num_devices=devices, task=task, timeout_minutes=timeout_minutes, memory_only=memory_only
        )
    return row_of(config, topology, answer, num_devices=devices, task=task, price_per_core_hour=price_per_core_hour)


def row_of(
    config: ConfigDict,
    topology: Topology,
    answer: dict[str, Any],
    *,
    num_devices: int,
    task: str = "train",
    price_per_core_hour: float | None = None,
) -> PlanRow:
    """The row for a worker's answer; see `plan_row` and `worker`."""
    row = PlanRow(
        topology=topology.name,
        task=task,
        model=config.model.name or config.weights,
        image_size=config.data.image_size,
        batch_size=config.batch_size,
        num_devices=num_devices,
        num_cores=num_devices * topology.chip.cores_per_device,
        device=topology.device_name,
        sharding=config.sharding,
        remat=config.model.remat or "none",
        scan_layers=bool(config.model.scan_layers),
        accumulation_steps=config.accumulation_steps,
        num_slices=topology.num_slices,
        dcn_bandwidth=topology.dcn_bandwidth if topology.num_slices > 1 else None,
        status=answer["status"],
        message=answer.get("message"),
        num_parameters=answer.get("num_parameters"),
        num_trained=answer.get("gradient_bytes", 0) // 4 or answer.get("num_parameters"),
        flops=answer.get("flops"),
        num_steps=answer.get("num_steps"),
        versions=answer.get("versions", {}),
    )
    # The usable memory is parsed from a message of the compiler, which other versions may phrase differently.
    usable = answer.get("usable") or round(topology.chip.hbm_bytes * topology.share_of_chip)
    if row.status == "does not fit":
        memory = Memory(answer["needed"], usable) if answer["needed"] else None
        message = _too_large(memory) if memory else first_line(answer["message"])
        row = dataclasses.replace(row, memory=memory, message=message)
    elif row.status == "placed":
        row = dataclasses.replace(row, status="fits", memory=Memory(answer["needed"], usable))
    elif row.status in ("fits", "formula"):
        row = _add_estimates(row, config, topology, answer, usable)
    if row.step_seconds is None or row.num_steps is None or task != "train":
        return row
    days = row.step_seconds * row.num_steps / estimates.SECONDS_PER_DAY
    peak = topology.chip.bf16_flops * topology.share_of_chip * num_devices
    num_images = row.num_steps * row.batch_size
    return dataclasses.replace(
        row,
        days=days,
        core_days=days * row.num_cores,
        tpuv3_core_days=tpuv3_core_days(peak * days * estimates.SECONDS_PER_DAY),
        paper_core_days=None if config.train_only else paper_core_days(row.model, row.image_size, num_images),
        price=None if price_per_core_hour is None else days * 24 * row.num_cores * price_per_core_hour,
    )


def _add_estimates(
    row: PlanRow, config: ConfigDict, topology: Topology, answer: dict[str, Any], usable: int
) -> PlanRow:
    """Adds memory and time of a compiled step that fits, or from shapes if there is no compiler."""
    arguments, temporaries, outputs, code = answer["arguments"], answer["temporaries"], 0, 0
    program = answer.get("program")
    if program:
        outputs, code = answer["outputs"] - answer["aliased"], answer["code"]
        collectives = tuple(
            Collective(**each | {"bytes_by_dtype": tuple(map(tuple, each["bytes_by_dtype"]))})
            for each in program["collectives"]
        )
        # The least that a step moves: it reads arguments, writes outputs, writes and reads temporaries.
        memory_bytes = arguments + answer["outputs"] + 2 * temporaries
    else:
        collectives = _expected_collectives(
            config, row.num_devices, row.num_slices, answer["parameter_bytes"], answer["gradient_bytes"]
        )
        memory_bytes = 2 * arguments  # without temporaries: a compiler fuses most of them before they reach memory
    roofline = estimates.roofline(
        flops=answer.get("least_flops", answer["flops"]),
        memory_bytes=memory_bytes,
        interconnect=estimates.interconnect_seconds(collectives, topology),
        num_devices=row.num_devices,
        topology=topology,
    )
    no_estimate, interconnect_seconds = None, None
    if topology.dcn_bandwidth is None and any(each.across_slices for each in collectives):
        no_estimate = (
            f"the network between slices of {topology.chip.name} has no data sheet: give the Gbit/s of a chip with "
            "--dcn_gigabits"
        )
    else:
        interconnect_seconds = estimates.interconnect_seconds(collectives, topology, exposed=True)
    total = arguments + outputs + temporaries + code
    memory = Memory(total, usable, arguments, outputs, temporaries, code if program else None)
    row = dataclasses.replace(
        row,
        memory=memory,
        collectives=collectives,
        interconnect_seconds=interconnect_seconds,
        no_estimate=no_estimate,
        roofline=roofline,
    )
    if not program:
        fits = memory.overshoot <= 0
        return dataclasses.replace(
            row,
            status="fits by formula" if fits else "does not fit by formula",
            message=None if fits else _too_large(memory),
            not_compiled=answer.get("message"),
            compiler_seconds=max(roofline.compute / FORMULA_UTILISATION, roofline.memory),
            estimate="formula",
        )
    seconds, estimate = estimates.compiler_seconds(program["cycles"], topology, roofline)
    if seconds is None:
        row = dataclasses.replace(row, no_estimate=estimate)
    else:
        is_least = interconnect_seconds is not None and seconds + interconnect_seconds < roofline.seconds
        row = dataclasses.replace(row, compiler_seconds=seconds, estimate="roofline" if is_least else estimate)
    compiler_flops = answer["compiler_flops"]
    return dataclasses.replace(
        row,
        compiler_flops=compiler_flops * row.num_devices if compiler_flops and not program["num_loops"] else None,
        optimal_seconds=estimates.optimal_seconds(
            answer.get("optimal_seconds"), program["num_unknown_operations"], program["num_loops"]
        ),
        unknown_loops=program["num_unknown_loops"],
        compile_seconds=answer["lower_seconds"] + answer["compile_seconds"],
        cpu_seconds=answer["cpu_seconds"],
    )


def _expected_collectives(
    config: ConfigDict, num_devices: int, num_slices: int, parameter_bytes: int, gradient_bytes: int
) -> tuple[Collective, ...]:
    """Expected exchanges of a step: gradients, and with FSDP also parameters, forward and backward.

    With FSDP each part of an accumulated batch repeats them, because no device keeps whole parameters or gradients.
    Several slices exchange within each slice and between slices: there each device sends its share of the slice's sum,
    or its part of the parameters.
    """
    if num_devices == 1:
        return ()
    dtype = config.model.dtype
    width = 2 if dtype in ("bfloat16", "float16") else 4
    per_slice = num_devices // num_slices
    # The kind, the bytes of the whole arrays, and how often.
    exchanges = [("all-reduce", gradient_bytes, 1)]
    if config.sharding != "replicated":
        exchanges = [
            ("all-gather", parameter_bytes, 2 * config.accumulation_steps),
            ("reduce-scatter", gradient_bytes, config.accumulation_steps),
        ]
    found = []
    for kind, num_bytes, times in exchanges:
        sent = num_bytes * width // 4
        found.append(Collective(kind, ((dtype, sent),), per_slice, times=times))
        if num_slices > 1:
            part = sent // (num_devices if kind == "all-gather" else per_slice)
            found.append(Collective(kind, ((dtype, part),), num_slices, times=times, across_slices=True))
    return tuple(found)


def first_line(message: str) -> str:
    """The first line of a compiler message, which may have many."""
    return next((line.strip() for line in message.splitlines() if line.strip()), "no message")


def _too_large(memory: Memory) -> str:
    missing = memory.overshoot / GIB
    return f"needs {missing:.{2 if missing < 100 else 0}f} GiB more than available"
