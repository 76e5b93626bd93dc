"""Files on a disk."""

import contextlib
import pathlib
import time

_LEFT_OVER_SECONDS = 60.0  # what is younger may be in use


def delete_left_over(folder: pathlib.Path, *patterns: str) -> None:
    """Deletes temporary files that a kill left: those that match a pattern and were last written a minute ago.

    Args:
      folder: where they are; it need not exist.
      *patterns: as of `pathlib.Path.glob`, such as ".config.json.*.tmp".
    """
    for pattern in patterns:
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # somebody else's, or gone already
                if path.is_file() and time.time() - path.stat().st_mtime > _LEFT_OVER_SECONDS:
                    path.unlink()
