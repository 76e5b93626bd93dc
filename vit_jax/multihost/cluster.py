"""Finds the processes of a run in flags or the environment, without touching devices.

Contacts nothing unless this host has TPU chips and its environment does not name the other hosts of their slice.
"""

import dataclasses
import http.client
import importlib.util
import logging
import os
import re
import urllib.request
from collections.abc import Mapping

from vit_jax.errors import UserError

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "VIT_JAX_RUN_TOKEN"  # noqa: S105 - the name of the variable
MAX_PROCESSES = 1 << 20
_TPU_PORT = 8482  # the port that JAX uses on TPU pods
_MAX_METADATA = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run, seen from one of them."""

    coordinator_address: str  # `host:port` where process 0 listens
    num_processes: int  # number of processes
    process_id: int  # number of this one, from 0
    found_by: str  # source of these values, for messages
    local_device_ids: tuple[int, ...] | None = None  # the GPUs of this host that this process uses; None: all
    token: str = dataclasses.field(default="", repr=False)  # secret of the run's processes; may be empty

    def __post_init__(self) -> None:
        """Raises `UserError` if the values do not fit together."""
        host, _, port = self.coordinator_address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(
                f"coordinator_address {self.coordinator_address!r} ({self.found_by}) is not host:port, "
                "such as 10.0.0.1:1234."
            )
        if self.num_processes > MAX_PROCESSES:
            raise UserError(f"num_processes {self.num_processes} ({self.found_by}) is more than {MAX_PROCESSES}.")
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"process_id {self.process_id} ({self.found_by}) does not fit num_processes {self.num_processes}: "
                f"the processes are 0 to {self.num_processes - 1}."
            )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of process 0."""
        host, _, port = self.coordinator_address.rpartition(":")
        return host.strip("[]"), int(port)


def find(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Cluster | None:
    """Finds the processes of this run; None if this process is the only one.

    Looks, in this order, at: the arguments (the flags of `vit_jax.main`); `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (or, in an indexed Job of Kubernetes, `JOB_COMPLETION_INDEX`); the
    variables of srun; GKE's variables for TPU slices; the metadata of a Cloud TPU VM. Skips the last two if
    `JAX_PLATFORMS` excludes tpu.

    The token is `VIT_JAX_RUN_TOKEN`; under srun without it, the number of the job, which is not secret.

    Raises:
      UserError: only some of the three are given, or they do not fit together.
    """
    environ = os.environ if environ is None else environ
    cluster = (
        _from_flags(coordinator_address, num_processes, process_id)
        or _from_jax_variables(environ)
        or _from_slurm(environ)
        or _from_tpu(environ)
    )
    if cluster is None or cluster.num_processes == 1:
        return None
    return dataclasses.replace(cluster, token=environ.get(TOKEN_VARIABLE) or cluster.token)


def _from_flags(address: str | None, num_processes: int | None, process_id: int | None) -> Cluster | None:
    if address is not None and num_processes is not None and process_id is not None:
        return Cluster(address, num_processes, process_id, "flags")
    given = {"coordinator_address": address, "num_processes": num_processes, "process_id": process_id}
    there = " and ".join(f"--{name}={value}" for name, value in given.items() if value is not None)
    if not there:
        return None
    missing = " and ".join(f"--{name}" for name, value in given.items() if value is None)
    raise UserError(
        f"{there} without {missing}. Give all three on every host, such as --coordinator_address=10.0.0.1:1234 "
        "--num_processes=2 --process_id=0, or none of them on TPU pods and under srun."
    )


def _from_jax_variables(environ: Mapping[str, str]) -> Cluster | None:
    address, num_processes = environ.get("JAX_COORDINATOR_ADDRESS"), environ.get("JAX_NUM_PROCESSES")
    process_id = environ.get("JAX_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX"))
    if not address or not num_processes:
        return None
    if process_id is None:
        raise UserError(
            "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are set, but neither JAX_PROCESS_ID nor (in an indexed Job "
            "of Kubernetes) JOB_COMPLETION_INDEX."
        )
    return Cluster(address, _number(num_processes, "JAX_NUM_PROCESSES"), _number(process_id, "JAX_PROCESS_ID"),
                   "environment variables JAX_*")  # fmt: skip


def _from_slurm(environ: Mapping[str, str]) -> Cluster | None:
    """From the variables of srun. A script of sbatch without srun has no step, and is one process."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_NTASKS")
    if any(name not in environ for name in needed):
        return None
    tasks = _number(environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"]), "SLURM_NTASKS")
    # All processes compute the same port, above the range from which systems hand out ports.
    step = int(environ["SLURM_STEP_ID"]) if environ["SLURM_STEP_ID"].isdecimal() else 0
    port = 61440 + (_number(environ["SLURM_JOB_ID"], "SLURM_JOB_ID") + step) % 4096
    # JAX's own detection gives every process one GPU. Here a process that is alone on its node takes all of them;
    # several take one each, unless SLURM has dealt out the GPUs itself.
    gpus = [each for each in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    on_this_node = _tasks_of_node(environ)
    alone = on_this_node == 1 or len(gpus) < on_this_node
    local = None if alone else (_number(environ.get("SLURM_LOCALID", "0"), "SLURM_LOCALID"),)
    return Cluster(f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}", tasks,
                   _number(environ["SLURM_PROCID"], "SLURM_PROCID"), "srun", local,
                   f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}")  # fmt: skip


def _tasks_of_node(environ: Mapping[str, str]) -> int:
    """The number of tasks on this node, from `SLURM_STEP_TASKS_PER_NODE`, such as `2(x3),1`."""
    node = _number(environ.get("SLURM_NODEID", "0"), "SLURM_NODEID")
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1")):
        node -= int(times or 1)
        if node < 0:
            return int(count)
    return 1


def first_host(node_list: str) -> str:
    """The first host of a list of SLURM: `rack[1-2]n[07-09]-ib,login` -> `rack1n07-ib`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", node_list)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else node_list)


def _from_tpu(environ: Mapping[str, str]) -> Cluster | None:
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return None
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if names is not None:
        hosts = [name.split(":")[0] for name in names.split(",")]
        if "TPU_WORKER_ID" not in environ and len(hosts) > 1:
            raise UserError("TPU_WORKER_HOSTNAMES names several hosts, but TPU_WORKER_ID does not say which is this.")
        return _tpu(hosts, environ.get("TPU_WORKER_ID", "0"), environ, "environment variables TPU_*")
    # Without chips, `import jax` sets this.
    if "TPU_SKIP_MDS_QUERY" in environ or importlib.util.find_spec("libtpu") is None:
        return None
    return from_tpu_metadata(environ)


def from_tpu_metadata(environ: Mapping[str, str]) -> Cluster | None:
    """The processes of a Cloud TPU VM's slice, from its metadata server; None if there is none.

    `environ` may name another server, and overrides what it says about several slices.
    """
    try:
        endpoints, _ = metadata("instance/attributes/worker-network-endpoints", environ)
        worker, _ = metadata("instance/attributes/agent-worker-number", environ)
        tpu_env, _ = metadata("instance/attributes/tpu-env", environ)
    except OSError as error:  # as in Colab
        logger.info("this host has TPU chips, but no metadata of a Cloud TPU VM (%s): taken for a single host", error)
        return None
    # A list of hosts, or of name:id:address.
    hosts = [each.split(":")[-1] for each in endpoints.split(",")]
    said = dict(re.findall(r"^\s*(MEGASCALE_\w+)\s*:\s*'?([^'\n]*?)'?\s*$", tpu_env, re.M))
    return _tpu(hosts, worker, {**said, **environ}, "the TPU VM's metadata")


def _tpu(hosts: list[str], worker: str, environ: Mapping[str, str], found_by: str) -> Cluster:
    num_slices = _number(environ.get("MEGASCALE_NUM_SLICES") or "1", "MEGASCALE_NUM_SLICES")
    slice_id = _number(environ.get("MEGASCALE_SLICE_ID") or "0", "MEGASCALE_SLICE_ID")
    first = (environ.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    port = environ.get("JAX_COORDINATOR_PORT", _TPU_PORT)
    process_id = slice_id * len(hosts) + _number(worker, "TPU_WORKER_ID")
    return Cluster(f"{first}:{port}", num_slices * len(hosts), process_id, found_by)


def metadata(path: str, environ: Mapping[str, str], query: str = "", timeout_seconds: float = 3.0) -> tuple[str, str]:
    """Asks the metadata server of Google's cloud, or that of `GCE_METADATA_HOST` in `environ`.

    `path` is below `/computeMetadata/v1/`, such as `instance/preempted`; `query` such as `wait_for_change=true`.

    Returns:
      The value and its ETag.

    Raises:
      OSError: there is no such server or value, or the answer cannot be read.
    """
    host = environ.get("GCE_METADATA_HOST") or environ.get("GCE_METADATA_IP") or "metadata.google.internal"
    url = f"http://{host}/computeMetadata/v1/{path}" + (f"?{query}" if query else "")
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    # The server is in the host itself; a proxy of the environment would be asked for its own metadata.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_seconds) as answer:
            text = answer.read(_MAX_METADATA + 1)
            if len(text) > _MAX_METADATA:
                raise OSError(f"{path} has more than {_MAX_METADATA} bytes")
            return text.decode().strip(), answer.headers.get("ETag", "0")
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{host} is not a metadata server: {error!r}") from error


def _number(value: str, name: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"{name} is {value!r}, which is not a number.") from error
