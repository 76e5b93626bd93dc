"""Profiles of training steps on host and devices. docs/profiling.md explains how to read them.

A profile is a folder `profile/plugins/profile/steps_<first>-<last>/` in the workdir, where XProf and TensorBoard look
for it. Each process writes two files: `<host>_<process>.xplane.pb` for them, `<host>_<process>.trace.json.gz` for
Perfetto.
"""

import contextlib
import logging
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from vit_jax.files import AnyPath, parse_path, write_atomically
from vit_jax.run.accounting import Ledger

logger = logging.getLogger(__name__)


class Profiler:
    """Profiles chosen steps of a run, in every process.

    Waits for the devices once, after the last of these steps. A restarted run does not replace existing profiles. If a
    profile cannot be made, a warning is logged.
    """

    def __init__(
        self, directory: AnyPath | str, *, first_step: int | None, num_steps: int = 5, ledger: Ledger | None = None
    ):
        """Prepares a profile of `num_steps` steps from `first_step` on (1 is a run's first; None: no profile).

        `directory` is the folder of all profiles. `ledger` records the time for starting and writing the profile.
        """
        self._first_step = first_step
        self._last_step = (first_step or 0) + num_steps - 1
        self._steps = first_step, self._last_step
        self._folder = parse_path(directory) / "plugins" / "profile" / f"steps_{first_step}-{self._last_step}"
        self._ledger = ledger or Ledger()
        self._temporary: tempfile.TemporaryDirectory | None = None  # while steps are profiled

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Surrounds a step, its batch included, and labels it with its number in the profile."""
        if step == self._first_step:
            self._begin()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def end_of_step(self, step: int, results: Any) -> bool:
        """Ends a step. After the last profiled one, waits for its results, writes the profile and returns True."""
        if not self._temporary or step < self._last_step:
            return False
        jax.block_until_ready(results)
        self._end()
        return True

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary:
            self._end()  # the run ended in the middle; the profile may show why

    def _begin(self) -> None:
        with self._ledger.spent_on("profiling"):
            try:
                if list(self._folder.glob(f"*_{jax.process_index()}.xplane.pb")):
                    logger.info("steps %d to %d are profiled in %s already", *self._steps, self._folder)
                    return
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # tracing every Python call would slow the host and fill the file
                # Written to a temporary folder first: JAX names folders by the second, which may differ between
                # processes, takes several processes of one host for one, and needs TensorFlow for a bucket.
                temporary = tempfile.TemporaryDirectory()
                jax.profiler.start_trace(temporary.name, create_perfetto_trace=True, profiler_options=options)
                self._temporary = temporary
            except Exception:  # another profile is being made, the disk is full, ...
                logger.warning("could not begin a profile", exc_info=True)

    def _end(self) -> None:
        folder, self._temporary = self._temporary, None
        if folder is None:  # no profile was started
            return
        with self._ledger.spent_on("profiling"), folder as temporary:
            try:
                jax.profiler.stop_trace()
                self._save(pathlib.Path(temporary))
                logger.info("profile of steps %d to %d: %s", *self._steps, self._folder)
            except Exception:
                logger.warning("could not write the profile", exc_info=True)

    def _save(self, temporary: pathlib.Path) -> None:
        (written,) = temporary.glob("plugins/profile/*/*.xplane.pb")
        name = f"{written.name.removesuffix('.xplane.pb')}_{jax.process_index()}"
        perfetto = written.with_name("perfetto_trace.json.gz")
        write_atomically(self._folder / f"{name}.trace.json.gz", perfetto.read_bytes())
        write_atomically(self._folder / f"{name}.xplane.pb", written.read_bytes())  # last: it marks a complete profile
