import contextlib
import http.server
import threading

import pytest

from vit_jax.errors import UserError
from vit_jax.multihost import cluster

SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09,11]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
GKE = {"TPU_WORKER_HOSTNAMES": "vit-0.vit,vit-1.vit,vit-2.vit,vit-3.vit", "TPU_WORKER_ID": "2"}


def find(environ, *flags):
    found = cluster.find(*flags, environ=environ)
    return found and (found.coordinator_address, found.num_processes, found.process_id)


def test_flags_override_the_environment():
    assert find(SRUN, "10.0.0.1:1234", 2, 1) == ("10.0.0.1:1234", 2, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((None, None, 1), "--process_id=1 without --coordinator_address and --num_processes. Give all three"),
        (("10.0.0.1:1234", 2, None), "--coordinator_address=10.0.0.1:1234 and --num_processes=2 without --process_id"),
        (("10.0.0.1:1234", 2, 2), "process_id 2 .* the processes are 0 to 1"),
        (("10.0.0.1:1234", 10**12, 0), "num_processes 1000000000000 .flags. is more than 1048576"),
        (("10.0.0.1", 2, 0), "coordinator_address '10.0.0.1' .* is not host:port"),
        (("10.0.0.1:http", 2, 0), "is not host:port"),
    ],
)
def test_inconsistent_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        find({}, *flags)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        # A script of sbatch, and a shell of salloc, without srun.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "gpu[1-4]"},
        SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        # A TPU host of its own; compilation for TPU topologies without TPU.
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"},
        GKE | {"JAX_PLATFORMS": "cpu"},
        # One of many independent runs.
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"},
    ],
    ids=["laptop", "sbatch without srun", "srun of one", "TPU host", "plan", "CPU on a TPU host", "indexed job"],
)
def test_single_processes_are_left_alone(environ):
    assert find({"TPU_SKIP_MDS_QUERY": "1"} | environ) is None


def test_processes_follow_from_sruns_variables():
    assert find(SRUN) == ("gpu07:63111", 4, 2)
    assert cluster.find(environ=SRUN).local_device_ids is None


def test_several_tasks_on_a_node_share_its_gpus_unless_slurm_has_dealt_them_out():
    several = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}
    assert cluster.find(environ=several | {"CUDA_VISIBLE_DEVICES": "0,1"}).local_device_ids == (1,)
    assert cluster.find(environ=several | {"CUDA_VISIBLE_DEVICES": "0"}).local_device_ids is None
    several["SLURM_STEP_TASKS_PER_NODE"] = "1,2(x1000000000000)"  # the second node has two
    assert cluster.find(environ=several | {"CUDA_VISIBLE_DEVICES": "0,1"}).local_device_ids == (1,)


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node001", "node001"),
        ("node001,login", "node001"),
        ("node[001-015],login", "node001"),
        ("node[3,7-9]", "node3"),
        ("rack[1-2]n[07-09]-ib,login", "rack1n07-ib"),
    ],
)
def test_first_host_of_a_node_list(node_list, host):
    assert cluster.first_host(node_list) == host


def test_token_comes_from_the_environment_or_the_job():
    jax_variables = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    secret = {"VIT_JAX_RUN_TOKEN": "secret"}
    assert cluster.find(environ=jax_variables).token == ""
    assert cluster.find("a:1", 2, 1, environ=secret).token == "secret"
    assert cluster.find(environ=SRUN | secret).token == "secret"
    assert cluster.find(environ=SRUN).token == "1234567.0"
    assert "secret" not in repr(cluster.find(environ=jax_variables | secret))


def test_hosts_of_a_slice_follow_from_gkes_variables():
    assert find(GKE) == ("vit-0.vit:8482", 4, 2)


def test_several_slices_are_one_run():
    slices = {
        "MEGASCALE_COORDINATOR_ADDRESS": "vit-a-0.vit:8080",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }
    assert find(GKE | slices) == ("vit-a-0.vit:8482", 8, 6)


def test_tpu_host_that_does_not_know_its_number_is_refused():
    with pytest.raises(UserError, match="TPU_WORKER_ID does not say which"):
        find({"TPU_WORKER_HOSTNAMES": "a,b"})


def test_processes_follow_from_jaxs_variables_and_the_index_of_a_kubernetes_job():
    job = {"JAX_COORDINATOR_ADDRESS": "vit-0.vit:1234", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}
    assert find(job) == ("vit-0.vit:1234", 4, 3)
    with pytest.raises(UserError, match="neither JAX_PROCESS_ID nor"):
        find({name: value for name, value in job.items() if name != "JOB_COMPLETION_INDEX"})
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is 'four', which is not a number"):
        find(job | {"JAX_NUM_PROCESSES": "four"})


@contextlib.contextmanager
def metadata_server(attributes):
    """Google's metadata server, as far as a TPU VM asks it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            if name in attributes and attributes[name] is None:
                self.wfile.write(b"SSH-2.0-no-http\r\n")
                return
            known = self.headers["Metadata-Flavor"] == "Google" and name in attributes
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode("latin-1"))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"GCE_METADATA_HOST": f"127.0.0.1:{server.server_address[1]}"}
        server.shutdown()


@pytest.mark.parametrize("endpoints", ["10.0.0.2,10.0.0.3", "unknown:x:10.0.0.2,unknown:y:10.0.0.3"])
def test_hosts_of_a_tpu_vm_follow_from_its_metadata(endpoints):
    attributes = {"worker-network-endpoints": endpoints, "agent-worker-number": "1", "tpu-env": "ZONE: 'eu'\n"}
    with metadata_server(attributes) as environ:
        found = cluster.from_tpu_metadata(environ)
    assert (found.coordinator_address, found.num_processes, found.process_id) == ("10.0.0.2:8482", 2, 1)


def test_slices_of_a_tpu_vm_follow_from_its_metadata():
    tpu_env = (
        "ZONE: 'eu'\nMEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\nMEGASCALE_COORDINATOR_ADDRESS: '10.9.9.9'\n"
    )
    attributes = {"worker-network-endpoints": "10.0.0.2,10.0.0.3", "agent-worker-number": "1", "tpu-env": tpu_env}
    with metadata_server(attributes) as environ:
        found = cluster.from_tpu_metadata(environ)
    assert (found.coordinator_address, found.num_processes, found.process_id) == ("10.9.9.9:8482", 6, 5)


def test_chips_without_metadata_are_a_single_host():
    with metadata_server({}) as environ:
        assert cluster.from_tpu_metadata(environ) is None
    assert cluster.from_tpu_metadata({"GCE_METADATA_HOST": "127.0.0.1:9"}) is None
    assert cluster.from_tpu_metadata({"GCE_METADATA_HOST": "no host:x"}) is None


@pytest.mark.parametrize("answer", [None, "\xff\xfe", "x" * (cluster._MAX_METADATA + 1)])
def test_invalid_metadata_give_no_cluster(answer):
    with metadata_server({"worker-network-endpoints": answer}) as environ:
        assert cluster.from_tpu_metadata(environ) is None
