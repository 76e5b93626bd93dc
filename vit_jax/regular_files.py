"""Opens nothing but regular files: a FIFO would block for ever, and a device such as /dev/zero never ends."""

import os
import pathlib
import stat

AnyPath = str | os.PathLike[str]


def stat_regular(path: AnyPath) -> os.stat_result:
    """The status of a regular file, links followed.

    Raises:
      OSError: there is none, or it is a folder, a FIFO, a socket or a device.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(_what(status.st_mode))
    return status


def open_regular(path: AnyPath) -> int:
    """Opens a regular file for reading; returns its descriptor, which the caller closes.

    Raises:
      OSError: as of `stat_regular`.
    """
    stat_regular(path)
    # Should it have become a FIFO since, O_NONBLOCK opens even that at once.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
            raise OSError(_what(mode))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: AnyPath, most: int, start: int | None = None) -> bytes:
    """Reads a regular file whole, or its first `start` bytes.

    Args:
      path: of the file.
      most: bytes; a larger file is refused before anything is read.
      start: number of bytes to read; None: all.

    Raises:
      OSError: it is not there, larger, or as of `stat_regular`.
    """
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        if start is not None:
            return file.read(start)
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise OSError(f"it has {size:,} bytes, and at most {most:,} are read")
        return file.readall()


def read_text_lines(path: pathlib.Path, most: int = 2**26) -> list[str]:
    """The lines of a text file in UTF-8, with or without the byte order mark that Windows puts before it.

    Raises:
      OSError: as of `read_regular`.
      ValueError: it is not UTF-8.
    """
    content = read_regular(path, most)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16: save it as UTF-8")
    return content.decode("utf-8-sig").splitlines()


def _what(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a regular file"
