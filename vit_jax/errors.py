"""Errors for people: what was given, what was expected, what to type instead."""

import difflib
from collections.abc import Iterable

_SHOWN = 40  # names; of more an error lists the nearest


class UserError(ValueError):
    """A mistake the user can mend. `vit_jax.main` prints its message without a traceback."""


def unknown_name(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest one that does.

    Args:
      kind: what the name is of, e.g. "model".
      given: the name that was asked for.
      known: the names that exist.
    """
    known, given = sorted(known), str(given)
    lowered = {name.lower() for name in known}
    nearest = difflib.get_close_matches(given.lower(), lowered, n=1, cutoff=0.0)
    # Of names that differ in case alone, such as "ViT-B/16" and "ViT-b/16", the one that keeps to the given case.
    same = difflib.get_close_matches(given, [name for name in known if name.lower() in nearest], n=1, cutoff=0.0)
    hint = f" Did you mean {same[0]!r}?" if same else ""
    shown = ", ".join(known)
    if len(known) > _SHOWN:
        closest = difflib.get_close_matches(given, known, n=_SHOWN // 4, cutoff=0.0)
        shown = f"{', '.join(closest)} and {len(known) - len(closest)} more"
    return UserError(f"unknown {kind} {given!r}.{hint} Known: {shown}.")
