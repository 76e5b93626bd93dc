"""Shared parts of the benchmarks: facts about the machine, number formatting, files."""

import importlib
import json
import os
import pathlib
import platform
import re
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

from vit_jax.console import num_cpus
from vit_jax.errors import UserError
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
    """Puts each table between the marks `<!-- name -->` and `<!-- end of name -->` of a page, indented like the mark.

    Raises:
      UserError: the page lacks the marks.
    """
    text = page.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        place = re.search(rf"(?ms)^( *){re.escape(begin)}.*?{re.escape(end)}", text)
        if place is None:
            raise UserError(f"{page} has no lines {begin} and {end}.")
        inserted = textwrap.indent(f"{begin}\n\n{table}\n\n{end}", place[1])
        text = text[: place.start()] + inserted + text[place.end() :]
    page.write_text(text)
