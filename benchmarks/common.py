"""Shared parts of the benchmarks: facts about the machine, number formatting, files."""

import importlib
import json
import os
import pathlib
import platform
import re
import sys
from collections.abc import Mapping
from typing import Any

from vit_jax.console import num_cpus
from vit_jax.files import write_atomically

ROOT = pathlib.Path(__file__).resolve().parent.parent


def progress(line: str) -> None:
    """Prints to stderr what is being done; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def number(value: float | None, form: str, scale: float = 1.0, unit: str = "") -> str:
    """Formats a scaled number; "-" for None."""
    return "-" if value is None else f"{value * scale:{form}}{unit}"


def write_json(path: pathlib.Path, result: Any) -> None:
    """Writes results, whole or not at all."""
    write_atomically(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory, system, and the load before the benchmark."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": num_cpus(),
        "load_average": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def paper_config(run: str) -> Any:
    """The config of `page:argument`, a page of configs/."""
    page, _, argument = run.partition(":")
    return importlib.import_module(f"configs.{page}").get_config(argument or None)


def insert_tables(page: pathlib.Path, tables: Mapping[str, str]) -> None:
    """Puts each table between the marks `<!-- name -->` and `<!-- end of name -->` of a page."""
    text = page.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    page.write_text(text)
