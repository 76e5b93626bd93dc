"""What the commands that take a --config share: flags, and mistakes told in one message."""

import re
import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from vit_jax.errors import UserError


def define_config() -> flags.FlagHolder[ConfigDict]:
    """Defines --config and --config.<field>; once in a process."""
    return config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/quickstart.py.", lock_config=True)


def parse(argv: Sequence[str], config: flags.FlagHolder[ConfigDict], check: Callable[[], None]) -> list[str]:
    """Parses the command line; a mistake in it is one message and exit status 1, not a traceback.

    Args:
      argv: the program's name and its arguments.
      config: from `define_config`.
      check: called when all is parsed; raises `UserError` if flags are missing or do not go together.

    Returns:
      The positional arguments.
    """
    try:
        positional = flags.FLAGS(argv)
        if len(positional) > 1:
            raise UserError(f"unexpected argument {positional[1]!r}; fields are set with --config.<field>=<value>.")
        if config.value is None:
            raise UserError("--config is missing, e.g. --config=configs/quickstart.py. --help tells more.")
        config.value.lock()  # fails if the config file itself could not be read
        check()
        return positional
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise SystemExit(report(error)) from error


def report(error: Exception) -> int:
    """Prints an error for people; returns the exit status."""
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if nearest := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message):  # from ml_collections
        message = f"unknown config field {nearest[2]!r}. Did you mean {nearest[1]!r}?"
    # What a config file itself refuses arrives as text: a traceback that ends with our error.
    message = message.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1
