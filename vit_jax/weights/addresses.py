"""Locates files of weights: local paths, addresses, and their places in the cache.

Environment variables:

VIT_JAX_CACHE          see `vit_jax.files`; downloads are in weights/ below it
VIT_JAX_GCS_ENDPOINT   a mirror: gs://bucket/key is fetched from <endpoint>/bucket/key; otherwise
                       https://storage.googleapis.com
"""

import difflib
import hashlib
import os
import pathlib
import re
import urllib.parse

from vit_jax.errors import UserError
from vit_jax.files import CACHE_VARIABLE, cache_folder

ENDPOINT_VARIABLE = "VIT_JAX_GCS_ENDPOINT"
DEFAULT_ENDPOINT = "https://storage.googleapis.com"

_LONGEST_NAME = 200  # bytes; file systems allow 255
_PLAIN = "-_.~+=,@()!"  # file names in the cache keep these besides letters and digits
_HOST = r"([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}|[0-9a-f:.]+:[0-9a-f:.]*"  # a name or an IPv6 address
_HINT = "Give a path, or the address of a file: https://host/file, gs://bucket/file."


def _scheme(place: str) -> str | None:
    match = re.match("([a-z][a-z0-9+.-]*)://", place, re.IGNORECASE)
    return match[1].lower() if match else None


def is_remote(place: str) -> bool:
    """Whether a place must be downloaded: an http://, https:// or gs:// address.

    Raises:
      UserError: it is an address of another kind, except file://.
    """
    scheme = _scheme(place)
    if scheme not in (None, "file", "http", "https", "gs"):
        raise UserError(f"cannot read {place!r}: {scheme}:// is not supported. {_HINT}")
    return scheme in ("http", "https", "gs")


def local_path(place: str) -> pathlib.Path:
    """Returns the existing file or folder of a path or a file:// address.

    Raises:
      UserError: it does not exist; the message names the nearest one.
    """
    if not place or "\0" in place:
        raise UserError(f"{place!r} is not a path. {_HINT}")
    given = place
    if _scheme(place) == "file":
        url = urllib.parse.urlsplit(place)
        if url.netloc.lower() not in ("", "localhost"):
            raise UserError(f"{place} names the machine {url.netloc!r}. Type three slashes: file:///path/of/the/file.")
        place = urllib.parse.unquote(url.path)
    path = pathlib.Path(place).expanduser()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no {given}.{_nearest(path)} {_HINT}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {given}: {getattr(error, 'strerror', None) or error}.") from error
    return path


def _nearest(path: pathlib.Path) -> str:
    try:
        names = sorted(each.name for each in path.parent.iterdir())
    except OSError:
        return f" The folder {path.parent} cannot be read or does not exist."
    nearest = difflib.get_close_matches(path.name, names, n=1, cutoff=0.0)
    return f" Did you mean {str(path.parent / nearest[0])!r}?" if nearest else f" The folder {path.parent} is empty."


def url_of(place: str, endpoint: str | None = None) -> str:
    """The http(s) address of a remote place, quoted and without a fragment; `endpoint` serves gs:// addresses.

    Raises:
      UserError: it does not name a host and a file.
    """
    if _scheme(place) == "gs":
        bucket, _, key = place[len("gs://") :].partition("/")
        if not re.fullmatch("[a-z0-9][a-z0-9._-]*", bucket):
            raise UserError(f"{place!r} does not name a bucket. It should look like gs://vit_models/augreg/name.npz.")
        endpoint = endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT
        if _scheme(endpoint) not in ("http", "https"):
            raise UserError(
                f"{ENDPOINT_VARIABLE} is {endpoint!r}. Give it as http(s)://host, like {DEFAULT_ENDPOINT}, or unset it."
            )
        place = f"{endpoint.rstrip('/')}/{bucket}/{urllib.parse.quote(key, safe='/' + _PLAIN)}"
    try:
        url = urllib.parse.urlsplit(place)
        _ = url.port  # raises if it is not a number
    except ValueError as error:
        raise UserError(f"{place!r} is not an address ({error}). {_HINT}") from error
    if "@" in url.netloc or not re.fullmatch(_HOST, url.hostname or "", re.IGNORECASE):
        raise UserError(f"{place!r} does not name a host, or names a user too. {_HINT}")
    if not url.path.strip("/") or url.path.endswith("/"):
        raise UserError(f"{place!r} does not name a file. {_HINT}")
    path = urllib.parse.quote(url.path, safe="/%:;&$*'" + _PLAIN)
    query = urllib.parse.quote(url.query, safe="/%:;&$*'?" + _PLAIN)
    return urllib.parse.urlunsplit((url.scheme.lower(), url.netloc, path, query, ""))


def cached_path(place: str) -> pathlib.Path:
    """The path of a download from an http(s):// or gs:// address, which may not exist yet; always inside the cache."""
    url = urllib.parse.urlsplit(url_of(place, endpoint=DEFAULT_ENDPOINT))
    names = [_file_name(urllib.parse.unquote(part)) for part in (url.netloc.lower() + url.path).split("/")]
    if url.query:
        # Another query means another file. A query may contain a secret, so the name contains its digest.
        stem, suffix = os.path.splitext(names[-1])
        names[-1] = f"{stem}%3F{hashlib.sha256(url.query.encode()).hexdigest()[:16]}{suffix}"
    folder = cache_folder("weights").absolute()
    if os.environ.get(CACHE_VARIABLE) and (older := folder.parent.joinpath(*names)).is_file():
        return older  # the variable once named the folder of weights itself
    return folder.joinpath(*names)


def _file_name(text: str) -> str:
    """A name of a folder or file that depends on the whole text and contains no path."""
    name = urllib.parse.quote(text, safe=_PLAIN, errors="surrogatepass")
    if not name.strip("."):  # "", "." and ".."; a quoted name has no such "%"
        name = name.replace(".", "%2E") or "%"
    name = re.sub(r"\.lock$", "%2Elock", name)  # not the lock of another file
    if len(name) > _LONGEST_NAME:
        suffix = os.path.splitext(name)[1][-20:]
        name = f"{name[:100]}~{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:16]}{suffix}"
    return name
