"""What is asked of the machine, and of the clock, everywhere. Needs nothing, and so is imported at once."""

import datetime
import os


def num_cpus() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def format_seconds(seconds: float) -> str:
    """Formats a duration as 0:01:23 or 2 days, 0:01:23."""
    return str(datetime.timedelta(seconds=round(seconds)))
