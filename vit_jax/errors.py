"""Errors for people: what was given, what was expected, what to type instead."""

import difflib
from collections.abc import Iterable

_SHOWN = 40  # names; if there are more, an error lists only the nearest


class UserError(ValueError):
    """A mistake that the user can fix. `vit_jax.main` prints its message without a traceback."""


def unknown_name(kind: str, given: str, known: Iterable[str]) -> UserError:
    """Makes the error for an unknown name, which suggests the nearest known one.

    Args:
      kind: kind of the name, such as "model".
      given: the unknown name.
      known: the known names.
    """
    known, given = sorted(known), str(given)
    lowered = {name.lower() for name in known}
    nearest = difflib.get_close_matches(given.lower(), lowered, n=1, cutoff=0.0)
    # Among names that differ only in case, such as "ViT-B/16" and "ViT-b/16", prefers the given case.
    same = difflib.get_close_matches(given, [name for name in known if name.lower() in nearest], n=1, cutoff=0.0)
    hint = f" Did you mean {same[0]!r}?" if same else ""
    shown = ", ".join(known)
    if len(known) > _SHOWN:
        closest = difflib.get_close_matches(given, known, n=_SHOWN // 4, cutoff=0.0)
        shown = f"{', '.join(closest)} and {len(known) - len(closest)} more"
    return UserError(f"unknown {kind} {given!r}.{hint} Known: {shown}.")
