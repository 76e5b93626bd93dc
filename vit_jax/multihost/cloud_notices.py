"""Notices of preemption on Google's cloud, besides the SIGTERM that most schedulers send.

The metadata server announces a preemption some 30 s ahead, and maintenance minutes ahead. The VM itself gets an ACPI
event, which becomes a SIGTERM only for processes of a service manager, not for a run started by `ssh`.
"""

import contextlib
import logging
import os
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator

from vit_jax.multihost.cluster import metadata

logger = logging.getLogger(__name__)

# Values that mean no preemption: the usual one, and one after which the machine continues.
_NOTICES = {
    "instance/preempted": ("FALSE",),
    "instance/maintenance-event": ("NONE", "MIGRATE_ON_HOST_MAINTENANCE"),
}
_WAIT_SECONDS = 60  # after which the server answers that nothing changed
_RETRY_SECONDS = 5.0
_PAUSE_SECONDS = 0.2  # between requests, however fast the server answers


@contextlib.contextmanager
def watch(callback: Callable[[str], object]) -> Iterator[None]:
    """Watches for a notice while the `with` block runs; does nothing outside Google's cloud.

    Args:
      callback: called at most once, from another thread, with the notice.
    """
    if not _on_google_cloud():
        yield
        return
    ended = threading.Event()
    once = threading.Lock()

    def wait(path: str, harmless: tuple[str, ...]) -> None:
        tag = "0"  # of the last value; the server answers at once if it has another
        while not ended.wait(_PAUSE_SECONDS):
            query = f"wait_for_change=true&timeout_sec={_WAIT_SECONDS}&last_etag={urllib.parse.quote(tag)}"
            try:
                value, tag = metadata(path, os.environ, query, timeout_seconds=_WAIT_SECONDS + 10)
            except OSError as error:
                logger.debug("no answer about %s: %s", path, error)
                ended.wait(_RETRY_SECONDS)
                continue
            if not re.fullmatch("[A-Z_]{1,64}", value.upper()):  # such as the page of a proxy
                logger.debug("no answer about %s, but %.100r", path, value)
                ended.wait(_RETRY_SECONDS)
                continue
            if value.upper() not in harmless and not ended.is_set():
                if once.acquire(blocking=False):
                    logger.info("this machine is about to be preempted: %s is %s", path, value)
                    callback(f"{path} is {value}")
                return

    for path, harmless in _NOTICES.items():
        threading.Thread(target=wait, args=(path, harmless), name=f"preemption {path}", daemon=True).start()
    try:
        yield
    finally:
        ended.set()  # the threads may still wait for the server; nothing waits for them


def _on_google_cloud() -> bool:
    if "GCE_METADATA_HOST" in os.environ or "GCE_METADATA_IP" in os.environ:
        return True
    try:
        return pathlib.Path("/sys/class/dmi/id/product_name").read_text().startswith("Google")
    except OSError:
        return False
