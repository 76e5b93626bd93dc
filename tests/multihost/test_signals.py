import signal
import subprocess
import sys

SIGNALLED_THREE_TIMES = """
import os, signal, time
from vit_jax.multihost.signals import StopSignal
with StopSignal() as stop:
    stop.arm()
    for pause in (0.1, 1.5, 5.0):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
        print(stop.signum, flush=True)
"""


def test_notice_that_comes_twice_is_one_and_a_later_one_ends_the_process():
    ended = subprocess.run([sys.executable, "-c", SIGNALLED_THREE_TIMES], check=False, capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("15\n15\n", -signal.SIGTERM)
