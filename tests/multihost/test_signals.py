import signal
import subprocess
import sys

import pytest

SIGNALLED_THREE_TIMES = """
import os, re, signal, sys, time
from vit_jax.multihost.signals import StopSignal

def is_ignored(signum):
    return int(re.search(r"SigIgn:\\s*(\\w+)", open("/proc/self/status").read())[1], 16) >> (signum - 1) & 1

with StopSignal(owns_process=sys.argv[1] == "alone") as stop:
    stop.arm()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        print(stop.signum, flush=True)
    time.sleep(1.1)  # longer than signals count as one notice
    while is_ignored(signal.SIGTERM):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    print("survived")
"""


@pytest.mark.parametrize("process", ["alone", "beside others"])
def test_repeated_notice_counts_once_and_a_later_one_ends_the_process(process):
    command = [sys.executable, "-c", SIGNALLED_THREE_TIMES, process]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("15\n15\n", -signal.SIGTERM), ended.stderr
