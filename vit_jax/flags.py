"""What the commands that take a --config share: flags, and mistakes told in one message."""

import re
import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from vit_jax.config import set_length
from vit_jax.errors import UserError

_CLEAR = re.compile(r"--config\.([\w.]+)=None")


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
        cleared = [match[1] for each in argv if (match := _CLEAR.fullmatch(each))]
        positional = flags.FLAGS([each for each in argv if not _CLEAR.fullmatch(each)])
        if len(positional) > 1:
            raise UserError(f"unexpected argument {positional[1]!r}; fields are set with --config.<field>=<value>.")
        if config.value is None:
            raise UserError("--config is missing, e.g. --config=configs/quickstart.py. --help tells more.")
        config.value.lock()  # fails if the config file itself could not be read
        for field in cleared:
            _clear(config.value, field)
        set_length(config.value, config_flags.get_override_values(flags.FLAGS[config.name]).keys() - set(cleared))
        check()
        return positional
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise SystemExit(report(error)) from error


def _clear(config: ConfigDict, field: str) -> None:
    """Sets a field to None, which its own parser would take for text or refuse."""
    *path, name = field.split(".")
    for each in path:
        config = config[each]
    if isinstance(config[name], ConfigDict):
        raise UserError(f"{field} is a group of fields and cannot be None.")
    with config.ignore_type():
        config[name] = None


def report(error: Exception) -> int:
    """Prints an error for people; returns the exit status."""
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if nearest := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message):  # from ml_collections
        message = f"unknown config field {nearest[2]!r}. Did you mean {nearest[1]!r}?"
    # What a config file itself refuses arrives as text: a traceback that ends with our error.
    message = message.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1
