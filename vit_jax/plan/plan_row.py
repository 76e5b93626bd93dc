"""A row of a plan: memory, time and cost of a config on a slice."""

import dataclasses
import math
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
    """Bytes on each device. Of a step that does not fit only `total` is known.

    Attributes:
      total: the sum.
      usable: available to a program, by the compiler, or by the data sheet if nothing is compiled.
      arguments: the state and the batch.
      outputs: those not written over an argument.
      temporaries: activations and other arrays within a step.
      code: the program.
    """

    total: int
    usable: int
    arguments: int | None = None
    outputs: int | None = None
    temporaries: int | None = None
    code: int | None = None

    @property
    def overshoot(self) -> int:
        """Bytes missing; negative: bytes left."""
        return self.total - self.usable


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """A config on a slice. None is unknown.

    Attributes:
      topology: name of the slice, or of several.
      task: "train" or "inference".
      model: its name.
      image_size: in pixels.
      batch_size: images of a step, over all devices.
      num_devices: JAX devices that take part; num_cores: their TensorCores, or GPUs.
      device: what a JAX device is there: "core", "chip" or "GPU".
      sharding, remat, scan_layers, accumulation_steps: of the config.
      status: "fits", "does not fit"; "fits by formula", "does not fit by formula" (GPUs, and slices for which libtpu
        does not compile); "refused" (by vit_jax), "failed" (the compiler), "timed out".
      message: what was wrong, None if nothing; of a step that fits: why the run is refused.
      not_compiled: why the row of a TPU slice is by formula.
      advice: a change that was tried and fits; None if the row fits, or none was found or requested.
      memory: bytes a device.
      num_parameters: of the model; num_trained: of those, the trained ones.
      flops: of a step by formula; compiler_flops: by the compiler, over all devices; None with loops, which it counts
        once.
      collectives: exchanges of one step on one device.
      compiler_seconds: estimate of a step, without collectives.
      estimate: its method: "cycles" (the compiler's, over the clock), "roofline" (if cycles come to less), "formula"
        (`FORMULA_UTILISATION`).
      no_estimate: why there is no time.
      optimal_seconds: XLA's own sum, with each operation at its peak, for comparison.
      interconnect_seconds: of collectives that do not overlap with computation.
      num_slices: slices, or machines with GPUs.
      dcn_bandwidth: bytes/s of a chip between them, if there are several.
      unknown_loops: loops of the program that were counted as one iteration.
      roofline: the least seconds of a step of this program.
      num_steps: length of the run.
      days: of the run at `step_seconds`.
      core_days: `days` times `num_cores`.
      tpuv3_core_days: days of TPUv3 cores with the same peak rate.
      paper_core_days: of the paper.
      price: of the run, in the currency of the given price.
      compile_seconds: to lower and compile; cpu_seconds: of all cores and of the whole worker.
      versions: of "jax" and "libtpu".
    """

    topology: str
    task: str
    model: str
    image_size: int
    batch_size: int
    num_devices: int
    num_cores: int
    device: str
    sharding: str
    remat: str
    scan_layers: bool
    accumulation_steps: int
    status: str
    message: str | None = None
    advice: str | None = None
    not_compiled: str | None = None
    memory: Memory | None = None
    num_parameters: int | None = None
    num_trained: int | None = None
    flops: float | None = None
    compiler_flops: float | None = None
    collectives: tuple[Collective, ...] = ()
    compiler_seconds: float | None = None
    estimate: str | None = None
    no_estimate: str | None = None
    optimal_seconds: float | None = None
    interconnect_seconds: float | None = None
    num_slices: int = 1
    dcn_bandwidth: float | None = None
    unknown_loops: int = 0
    roofline: Roofline | None = None
    num_steps: int | None = None
    days: float | None = None
    core_days: float | None = None
    tpuv3_core_days: float | None = None
    paper_core_days: float | None = None
    price: float | None = None
    compile_seconds: float | None = None
    cpu_seconds: float | None = None
    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)

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
        fields = dataclasses.asdict(self)
        return fields | {
            "collectives": total_bytes(self.collectives),
            "step_seconds": self.step_seconds,
            "images_per_second": self.images_per_second,
            "roofline_seconds": self.roofline.seconds if self.roofline else None,
        }


def failures(rows: Sequence[PlanRow]) -> list[str]:
    """Lists the rows that failed or timed out; if all were refused, those."""
    failed = [row for row in rows if row.status in FAILURES]
    if rows and all(row.status == "refused" for row in rows):
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
      task: "train", or "inference" for the forward pass alone.
      timeout_minutes: limit for the compiler.
      price_per_core_hour: of a TensorCore or GPU, in any currency.
      memory_only: only whether it fits and its bytes, in a fifth of the time.

    Raises:
      UserError: libtpu is needed and not installed. All other failures are rows.
    """
    devices = topology.num_devices if num_devices is None else num_devices
    if not 1 <= devices <= topology.num_devices:
        return _row(
            config, topology, devices, task, status="refused",
            message=f"{topology.name} has {topology.num_devices} devices, not {devices}",
        )  # fmt: skip
    if topology.num_slices > 1 and devices < topology.num_devices:
        return _row(
            config, topology, devices, task, status="refused",
            message="several slices are planned whole: leave --num_devices out, or plan one slice",
        )  # fmt: skip
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
    row = _row(
        config, topology, num_devices, task, status=answer["status"], message=answer.get("message"),
        num_parameters=answer.get("num_parameters"), flops=answer.get("flops"), num_steps=answer.get("num_steps"),
        num_trained=answer.get("gradient_bytes", 0) // 4 or answer.get("num_parameters"),
        versions=answer.get("versions", {}),
    )  # fmt: skip
    # The usable memory is parsed from a message of the compiler, which other versions may phrase differently.
    answer = answer | {"usable": answer.get("usable") or round(topology.chip.hbm_bytes * topology.share_of_chip)}
    if answer["status"] == "formula":
        row = _by_formula(row, config, topology, answer)
    elif answer["status"] == "does not fit":
        memory = Memory(answer["needed"], answer["usable"]) if answer["needed"] else None
        message = f"needs {_gib(memory.overshoot)} more than available" if memory else first_line(answer["message"])
        row = dataclasses.replace(row, memory=memory, message=message)
    elif answer["status"] == "placed":
        row = dataclasses.replace(row, status="fits", memory=Memory(answer["needed"], answer["usable"]))
    elif answer["status"] == "fits":
        row = _by_compiler(row, topology, answer)
    if row.step_seconds is None or row.num_steps is None or task != "train":
        return row
    days = estimates.days(row.step_seconds, row.num_steps)
    seconds = days * estimates.SECONDS_PER_DAY
    peak = topology.chip.bf16_flops * topology.share_of_chip
    return dataclasses.replace(
        row,
        days=days,
        core_days=days * row.num_cores,
        tpuv3_core_days=tpuv3_core_days(peak * num_devices * seconds),
        paper_core_days=None
        if config.train_only
        else paper_core_days(row.model, row.image_size, row.num_steps * row.batch_size),
        price=None if price_per_core_hour is None else days * 24 * row.num_cores * price_per_core_hour,
    )


def _row(config: ConfigDict, topology: Topology, num_devices: int, task: str, **fields: Any) -> PlanRow:
    """A row with the facts of the config."""
    return PlanRow(
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
        **fields,
    )


def _by_compiler(row: PlanRow, topology: Topology, answer: dict[str, Any]) -> PlanRow:
    """Adds the compiler's answer for a step that fits."""
    outputs = answer["outputs"] - answer["aliased"]
    memory = Memory(
        total=answer["arguments"] + outputs + answer["temporaries"] + answer["code"],
        usable=answer["usable"],
        arguments=answer["arguments"],
        outputs=outputs,
        temporaries=answer["temporaries"],
        code=answer["code"],
    )
    program = answer["program"]
    collectives = tuple(
        Collective(**each | {"bytes_by_dtype": tuple(map(tuple, each["bytes_by_dtype"]))})
        for each in program["collectives"]
    )
    roofline = estimates.roofline(
        flops=answer.get("least_flops", answer["flops"]),
        memory_bytes=estimates.least_traffic(answer["arguments"], answer["outputs"], answer["temporaries"]),
        interconnect=estimates.interconnect_seconds(collectives, topology),
        num_devices=row.num_devices,
        topology=topology,
    )
    compiler_flops = answer["compiler_flops"]
    seconds, estimate = estimates.compiler_seconds(program["cycles"], topology, roofline)
    row = _with_network(row, topology, collectives)
    if seconds is not None and row.interconnect_seconds is not None:
        estimate = estimate if seconds + row.interconnect_seconds >= roofline.seconds else "roofline"
    return dataclasses.replace(
        row,
        memory=memory,
        compiler_flops=compiler_flops * row.num_devices if compiler_flops and not program["num_loops"] else None,
        compiler_seconds=seconds,
        estimate=None if seconds is None else estimate,
        no_estimate=estimate if seconds is None else row.no_estimate,
        optimal_seconds=estimates.optimal_seconds(
            answer.get("optimal_seconds"), program["num_unknown_operations"], program["num_loops"]
        ),
        unknown_loops=program["num_unknown_loops"],
        roofline=roofline,
        compile_seconds=answer["lower_seconds"] + answer["compile_seconds"],
        cpu_seconds=answer["cpu_seconds"],
    )


def _with_network(row: PlanRow, topology: Topology, collectives: tuple[Collective, ...]) -> PlanRow:
    """Adds the exchanges between devices and their time."""
    if topology.dcn_bandwidth is None and any(each.across_slices for each in collectives):
        message = (
            f"the network between slices of {topology.chip.name} has no data sheet: give the Gbit/s of a chip with "
            "--dcn_gigabits"
        )
        return dataclasses.replace(row, collectives=collectives, interconnect_seconds=None, no_estimate=message)
    seconds = estimates.interconnect_seconds(collectives, topology, exposed=True)
    return dataclasses.replace(row, collectives=collectives, interconnect_seconds=seconds)


def _by_formula(row: PlanRow, config: ConfigDict, topology: Topology, answer: dict[str, Any]) -> PlanRow:
    """Adds estimates from shapes, for devices without a compiler here."""
    total = answer["arguments"] + answer["temporaries"]
    memory = Memory(
        total=total,
        usable=answer["usable"],
        arguments=answer["arguments"],
        outputs=0,
        temporaries=answer["temporaries"],
    )
    collectives = _expected_collectives(
        config, row.num_devices, row.num_slices, answer["parameter_bytes"], answer["gradient_bytes"]
    )
    roofline = estimates.roofline(
        flops=answer.get("least_flops", answer["flops"]),
        # Without temporaries: a compiler fuses most of them before they reach memory.
        memory_bytes=estimates.least_traffic(answer["arguments"], answer["arguments"], 0),
        interconnect=estimates.interconnect_seconds(collectives, topology),
        num_devices=row.num_devices,
        topology=topology,
    )
    fits = memory.overshoot <= 0
    return dataclasses.replace(
        _with_network(row, topology, collectives),
        status="fits by formula" if fits else "does not fit by formula",
        message=None if fits else f"needs {_gib(memory.overshoot)} more than available",
        not_compiled=answer.get("message"),
        memory=memory,
        compiler_seconds=max(roofline.compute / FORMULA_UTILISATION, roofline.memory),
        estimate="formula",
        roofline=roofline,
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
    """The first line of a message of the compiler, which may have pages."""
    return next((line.strip() for line in message.splitlines() if line.strip()), "no message")


def _gib(num_bytes: float) -> str:
    digits = 2 if abs(num_bytes) < 100 * GIB else 0
    return f"{num_bytes / GIB:.{digits}f} GiB" if math.isfinite(num_bytes) else "-"
