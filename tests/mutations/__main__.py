"""Breaks the package one line at a time and runs the tests that must fail.

    python -m tests.mutations                    # all of them; about half an hour
    python -m tests.mutations --only=optimizers  # those with "optimizers" in a path, a test or a reason

Works on a copy of the checkout, where the named tests must pass first. Each mutation is then "caught by" a failed
test, "SURVIVED", "stale" (its text no longer exists, or pytest could not run) or "timeout". Status 1 unless all are
caught.
"""

import argparse
import collections
import importlib
import os
import pathlib
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, NoReturn

import pytest

import tests.mutations
from tests.mutations.mutation import Mutation

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 600  # for the tests of one mutation; those that start several processes take minutes on a busy machine
# Imported once here: importing them in each test process takes longer than most tests.
SHARED = ("jax", "flax.linen", "optax", "orbax.checkpoint", "grain.python", "tensorflow_datasets", "matplotlib.figure")


def read_tables() -> list[Mutation]:
    """Returns the mutations of all modules beside this one."""
    names = [module.name for module in pkgutil.iter_modules(tests.mutations.__path__) if module.name != "__main__"]
    modules = [importlib.import_module(f"tests.mutations.{name}") for name in names]
    return [mutation for module in modules for mutation in getattr(module, "MUTATIONS", ())]


def copy_checkout(target: pathlib.Path) -> None:
    """Copies what git tracks or would add."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def be_pytest(copy: pathlib.Path, arguments: Sequence[str], output: IO[str]) -> NoReturn:
    """Turns a forked process into pytest in the copy."""
    status = 3
    try:
        os.setsid()
        os.chdir(copy)
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "vit_jax")]:
            del sys.modules[name]
        sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
        os.environ["PYTHONPATH"] = str(copy)
        os.environ.setdefault("VIT_JAX_DATA", str(ROOT.parent / "shared" / "data"))
        status = pytest.main(["-n", "0", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *arguments])
        sys.stdout.flush()
    finally:
        os._exit(status)


def run_tests(copy: pathlib.Path, arguments: Sequence[str], timeout: float) -> tuple[int | None, list[str], str]:
    """Runs tests in the copy. Returns pytest's exit status, None after the timeout; what failed; the whole output."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            be_pytest(copy, arguments, output)
        deadline, ended = time.monotonic() + timeout, (0, 0)
        try:
            while ended[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.05)
                ended = os.waitpid(child, os.WNOHANG)
        finally:  # also after Ctrl-C
            if ended[0] == 0:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
        output.seek(0)
        text = output.read()
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", text, re.MULTILINE)
    return os.waitstatus_to_exitcode(ended[1]) if ended[0] else None, failed, text


def try_mutation(copy: pathlib.Path, mutation: Mutation) -> str:
    """Applies the change, runs its tests, restores the file. Returns the outcome in words."""
    file = copy / mutation.path
    original = file.read_text() if file.exists() else ""
    if (count := original.count(mutation.old)) != 1:
        return f"stale: the text occurs {count} times"
    times = file.stat()
    try:
        file.write_text(original.replace(mutation.old, mutation.new))
        os.utime(file, (0, 0))  # or a compiled file from the same second would be used instead
        status, failed, output = run_tests(copy, ["-x", *mutation.tests.split()], SECONDS)
    finally:
        file.write_text(original)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    if status == 1 and failed:
        return f"caught by {failed[0]}"
    known = {0: "SURVIVED", None: f"timeout after {SECONDS} s"}
    return known.get(status, f"stale: pytest ended with {status}: {output.strip()[-200:]}")


def main() -> int:
    """Runs the mutations that the flags ask for. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="text in the path, the tests or the reason")
    parser.add_argument("--list", action="store_true", help="print the mutations and run nothing")
    flags = parser.parse_args()
    chosen = [each for each in read_tables() if flags.only in f"{each.path} {each.tests} {each.why}"]
    if flags.list:
        print("\n".join(f"{each.path}: {each.why}\n- {each.old}\n+ {each.new}\n  {each.tests}" for each in chosen))
        return 0

    for name in SHARED:
        importlib.import_module(name)
    outcomes: dict[str, int] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "checkout")
        copy_checkout(copy)
        names = sorted({name for each in chosen for name in each.tests.split()})
        print(f"{len(names)} tests on the unchanged code ...", flush=True)
        status, failed_before, output = run_tests(copy, names, 3600)
        print(output if status else "passed", flush=True)
        if status not in (0, 1):  # such as a test that no longer exists
            return 1
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # for processes that tests start
        sys.dont_write_bytecode = True
        start = time.monotonic()
        for number, each in enumerate(chosen, 1):
            useless = [name for name in failed_before if name.startswith(tuple(each.tests.split()))]
            outcome = f"stale: {useless[0]} fails unbroken" if useless else try_mutation(copy, each)
            outcomes[outcome.split()[0].rstrip(":")] += 1
            minutes_left = (time.monotonic() - start) / number * (len(chosen) - number) / 60
            progress = f"{number}/{len(chosen)}, {minutes_left:.0f} min left"
            print(f"[{progress}] {each.path}: {each.why}: {outcome}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    return 0 if outcomes.keys() <= {"caught"} else 1


if __name__ == "__main__":
    sys.exit(main())
