"""Flags shared by commands with --config, their --help, and one message for each mistake."""

import re
import sys
import textwrap
from collections.abc import Callable, Sequence

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from vit_jax.config import base_config, flatten, set_length
from vit_jax.console import run_command
from vit_jax.errors import UserError, unknown_name

_CLEAR = re.compile(r"--config\.([\w.]+)=None")
_HELP = ("--help", "-help", "-h", "--helpshort", "-?")
_COLUMNS = 100


def define_config() -> flags.FlagHolder[ConfigDict]:
    """Defines --config and --config.<field>; call it once in a process."""
    return config_flags.DEFINE_config_file(
        "config", None, "Config file, such as configs/quickstart.py; its arguments follow a colon.", lock_config=True
    )


class _DryRunParser(flags.ArgumentParser):
    """Takes --dry_run, --dry_run=full and --nodry_run."""

    def parse(self, argument: object) -> str:
        values = {"true": "summary", "summary": "summary", "full": "full", "false": ""}
        text = str(argument).lower()
        if text not in values:
            raise ValueError("--dry_run takes no value, or full for every field of the config and every array")
        return values[text]

    def flag_type(self) -> str:
        return "summary|full"


def define_dry_run() -> flags.FlagHolder[str]:
    """Defines --dry_run[=full]; its value is "summary", "full", or "" without the flag."""
    text = "Print what would be trained, or evaluated, and exit; =full also prints all fields and arrays."
    return flags.DEFINE_flag(
        flags.Flag(_DryRunParser(), flags.ArgumentSerializer(), "dry_run", "false", text, boolean=True)
    )


def run(
    main: Callable[[list[str]], object], config: flags.FlagHolder[ConfigDict], check: Callable[[], None] = lambda: None
) -> None:
    """Runs a command with flags: parses them, or prints --help, and exits with the status that `main` returns.

    A mistake in the command line is one message and exit status 1, not a traceback. `check` is called after parsing,
    and raises `UserError` if flags are missing or contradict each other.
    """
    run_command(lambda _: app.run(main, flags_parser=lambda argv: _parse(argv, config, check)))


def _parse(argv: Sequence[str], config: flags.FlagHolder[ConfigDict], check: Callable[[], None]) -> list[str]:
    if any(each in _HELP for each in argv[1:]):
        print(_help())
        raise SystemExit(0)
    try:
        cleared = [match[1] for each in argv if (match := _CLEAR.fullmatch(each))]
        positional = flags.FLAGS([each for each in argv if not _CLEAR.fullmatch(each)])
        if len(positional) > 1:
            raise UserError(f"unexpected argument {positional[1]!r}; fields are set with --config.<field>=<value>.")
        if config.value is None:
            raise UserError("--config is missing, e.g. --config=configs/quickstart.py. --help lists all flags.")
        config.value.lock()  # raises if the config file itself could not be read
        for field in cleared:
            clear_field(config.value, field)
        set_length(config.value, config_flags.get_override_values(flags.FLAGS[config.name]).keys() - set(cleared))
        check()
        return positional
    except (AttributeError, KeyError) as error:
        raise SystemExit(report(_unknown_field(error, argv))) from error
    except (flags.Error, TypeError, ValueError, OSError) as error:
        raise SystemExit(report(error)) from error


def _unknown_field(error: AttributeError | KeyError, argv: Sequence[str]) -> Exception:
    """Makes a clear error if ml_collections names a field that it does not know, and nothing else."""
    name = str(error.args[0] if error.args else "").strip("'\"")
    for each in argv:
        if re.fullmatch(r"\w+", name) and (match := re.match(rf"--config\.((?:\w+\.)*{name})[.=]", each)):
            known, group = flatten(base_config().to_dict()), match[1].rpartition(".")[0]
            beside = [field for field in known if field.startswith(f"{group}.")]
            return unknown_name("config field", match[1], beside or known)
    return error


def _help() -> str:
    """Returns the docstring of the command, and all flags that it and this module define."""
    ours = [name for name in flags.FLAGS.flags_by_module_dict() if name in (sys.argv[0], __name__)]
    found = {flag.name: flag for module in ours for flag in flags.FLAGS.get_flags_for_module(module)}
    entries = list(map(_describe, found.values()))
    entries.append(("--config.<field>=<value>", "Sets a field of the config; vit_jax/config.py lists all of them."))
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "\nflags:"]
    for usage, text in sorted(entries):
        lines += [f"  {usage}", *textwrap.wrap(text, _COLUMNS, initial_indent="      ", subsequent_indent="      ")]
    return "\n".join(lines)


def _describe(flag: flags.Flag) -> tuple[str, str]:
    kind = "|".join(getattr(flag.parser, "enum_values", ())) or flag.flag_type().replace("config object", "file")
    usage = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}=<{kind}>"
    default = f" Default: {flag.default}." if flag.default else ""
    return usage, f"{flag.help.removeprefix(f'<{kind}>: ')}{default}"


def clear_field(config: ConfigDict, field: str) -> None:
    """Sets a field to None, which its parser would read as text or refuse; or removes an entry of `evals`."""
    *path, name = field.split(".")
    for each in path:
        config = config[each]
    if path == ["evals"] and name in config:
        with config.unlocked():
            del config[name]
        return
    if isinstance(config[name], ConfigDict):
        raise UserError(f"{field} is a group of fields and cannot be None.")
    with config.ignore_type():
        config[name] = None


def report(error: Exception) -> int:
    """Prints an error; returns the exit status."""
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if nearest := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message):  # from ml_collections
        message = f"unknown config field {nearest[2]!r}. Did you mean {nearest[1]!r}?"
    if renamed := re.search(r"['\"](eval_every_steps|fewshot|variants)['\"]", message):
        message = f"config.{renamed[1]} is now part of config.evals, as docs/evaluation.md describes."
    # An error in a config file arrives as text: a traceback that ends with our error.
    message = message.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1
