"""Downloads files of weights over http(s) into the cache; requests speaks HTTP.

A file gets its name in the cache only when it is complete and verified.

Environment variables:

VIT_JAX_CACHE          see `vit_jax.files`; downloads are in weights/ below it
VIT_JAX_GCS_ENDPOINT   a mirror: gs://bucket/key is fetched from <endpoint>/bucket/key; otherwise
                       https://storage.googleapis.com
"""

import binascii
import concurrent.futures
import dataclasses
import difflib
import hashlib
import logging
import os
import pathlib
import re
import shlex
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import vit_jax
from vit_jax.console import Progress
from vit_jax.errors import UserError
from vit_jax.files import CACHE_VARIABLE, cache_folder, check_space, lock, replacing

if TYPE_CHECKING:
    import requests

logger = logging.getLogger(__name__)

ENDPOINT_VARIABLE = "VIT_JAX_GCS_ENDPOINT"
DEFAULT_ENDPOINT = "https://storage.googleapis.com"

_LONGEST_NAME = 200  # bytes; file systems allow 255
_PLAIN = "-_.~+=,@()!"  # file names in the cache keep these besides letters and digits
_HOST = r"([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}|[0-9a-f:.]+:[0-9a-f:.]*"  # a name or an IPv6 address
_HINT = "Give a path, or the address of a file: https://host/file, gs://bucket/file."

_CHUNK = 1 << 18  # bytes
_MAX_BYTES = 2**40  # no file of weights is larger
_SPARE_BYTES = 1_000_000  # of disk space, for small files and other processes
_SLOWEST = 1_000  # bytes per second
_RETRIED = (408, 425, 429, 500, 502, 503, 504)  # statuses of servers with temporary problems


def fetch(
    place: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    retry_seconds: Sequence[float] = (1, 3, 9),
    timeout_seconds: float = 30,
    limit_seconds: float = 24 * 3600,
) -> pathlib.Path:
    """Returns the local path of a file; downloads it if it is remote and not in the cache.

    Args:
      place: a path of a file or folder, or an address: file://, http://, https:// or gs://.
      sha256: hexadecimal digest that the file must have.
      retry_seconds: waits between attempts.
      timeout_seconds: how long the server may be silent.
      limit_seconds: how long an attempt may take.

    Raises:
      UserError: the file does not exist, cannot be downloaded, or has another digest.
    """
    place = os.fspath(place)
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256 := sha256.lower()):
        raise UserError(
            f"{sha256!r} is not a SHA-256 digest. It has 64 hexadecimal digits, as `sha256sum` prints them."
        )
    if not is_remote(place):
        path = local_path(place)
        if sha256 is not None:
            _check_digest(path, sha256, "Check that it is the right file, or omit sha256.")
        return path
    url, path = url_of(place), cached_path(place)
    if not _is_there(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to the cache {path.parent}: {error.strerror or error}. Set {CACHE_VARIABLE} to a folder "
                "you can write to."
            ) from error
        waiting = f"waiting for another process that downloads {path}"
        with lock(path.with_name(path.name + ".lock"), waiting, on_wait=lambda: logger.warning(waiting)):
            if not _is_there(path):  # the other process may have failed
                _Download(url, path, sha256, timeout_seconds, limit_seconds).run(retry_seconds)
                return path
    if sha256 is not None:
        _check_digest(path, sha256, f"If the digest you gave is right, delete the file: rm {shlex.quote(str(path))}")
    return path


def _is_there(path: pathlib.Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _check_digest(path: pathlib.Path, expected: str, advice: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. Only files have digests.") from error
    if found != expected:
        raise UserError(f"{path} is another file than expected.\n  SHA-256: {found}\n expected: {expected}\n{advice}")


class _TryAgainError(Exception):
    """An attempt failed for a reason that may be temporary."""


@dataclasses.dataclass(frozen=True)
class _Download:
    """The download of `url` to `path` in the cache; other attributes as `fetch` has them."""

    url: str
    path: pathlib.Path
    sha256: str | None
    timeout_seconds: float
    limit_seconds: float

    def run(self, retry_seconds: Sequence[float]) -> None:
        for attempt, wait in enumerate((*retry_seconds, None), start=1):
            try:
                with replacing(self.path) as temporary:
                    self._receive(temporary)
                return
            except _TryAgainError as error:
                if wait is None:
                    raise self._error(f"could not download {self._shown} in {attempt} attempts: {error}.") from error
                logger.warning("%s: %s; trying again in %g s", self.path.name, error, wait)
                time.sleep(wait)

    def _receive(self, temporary: pathlib.Path) -> None:
        import requests

        def open_url() -> requests.Response:
            headers = {"User-Agent": f"vit_jax/{vit_jax.__version__}", "Accept-Encoding": "identity"}
            hooks = {"response": self._check_redirect}
            return requests.get(self.url, headers=headers, hooks=hooks, stream=True, timeout=self.timeout_seconds)

        host = urllib.parse.urlsplit(self.url).netloc
        try:
            response = _in_time(open_url, 4 * self.timeout_seconds)
        except requests.exceptions.SSLError as error:
            raise self._error(
                f"{host} could not prove that it is {host} ({_reason(error)}). Check the clock and the certificates of "
                "this machine (REQUESTS_CA_BUNDLE names others)."
            ) from error
        except (requests.RequestException, TimeoutError) as error:
            raise _TryAgainError(f"cannot reach {host} ({_reason(error)})") from error
        with response:
            self._check_answer(response)
            try:
                self._copy(response, temporary)
            except requests.RequestException as error:
                raise _TryAgainError(f"the connection broke ({_reason(error)})") from error

    def _copy(self, response: "requests.Response", temporary: pathlib.Path) -> None:
        """Writes what the server sends, and verifies it."""
        total = int(response.headers.get("Content-Length", 0)) or None
        remedy = f"Free some, or set {CACHE_VARIABLE} to a folder on another disk."
        check_space(self.path.parent, (total or 0) + _SPARE_BYTES, remedy)
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        start, window = time.monotonic(), 2 * self.timeout_seconds
        count, before, due = 0, 0, start + window
        with temporary.open("wb") as file, Progress(self.path.name, total, unit="bytes") as progress:
            for chunk in response.iter_content(_CHUNK):
                if not count and chunk.lstrip()[:5].lower() in (b"<!doc", b"<html"):
                    raise self._web_page()
                file.write(chunk)
                sha256.update(chunk)
                md5.update(chunk)
                count += len(chunk)
                progress.add(len(chunk))
                now = time.monotonic()
                if count > _MAX_BYTES or now > start + self.limit_seconds:
                    raise self._error(f"{self._shown} has no end: {count:,} bytes in {now - start:,.0f} seconds.")
                if now > due:
                    if count - before < window * _SLOWEST:
                        raise _TryAgainError("it arrives at less than a kilobyte a second")
                    before, due = count, now + window
        if not count:
            raise _TryAgainError("the server sent an empty file")
        if self.sha256 not in (None, sha256.hexdigest()):
            raise UserError(
                f"{self._shown} is another file than expected.\n  SHA-256: {sha256.hexdigest()}\n expected: "
                f"{self.sha256}\nCorrect the digest, or omit it."
            )
        if _stored_md5(response) not in (None, md5.digest()):
            raise _TryAgainError("the file was damaged during the download: its MD5 differs from the server's")

    def _check_redirect(self, response: "requests.Response", **_: object) -> None:
        if response.is_redirect:
            target = urllib.parse.urljoin(response.url, response.headers["Location"])
            old, new = (urllib.parse.urlsplit(url).scheme for url in (response.url, target))
            if new not in ("http", "https") or (old, new) == ("https", "http"):
                raise UserError(
                    f"{response.url.partition('?')[0]} redirects from {old}:// to {new}://, which is not followed. "
                    "Give the address of the file itself."
                )

    def _check_answer(self, response: "requests.Response") -> None:
        status, headers = f"{response.status_code} {response.reason}", response.headers
        if response.status_code in (404, 410):
            raise UserError(
                f"there is no {self._shown} ({status}). Check the spelling, upper and lower case too; `python -m "
                "vit_jax.weights list` shows the released files."
            )
        if response.status_code in _RETRIED:
            raise _TryAgainError(f"the server answered {status}")
        if response.status_code != 200:
            raise self._error(f"the server refuses {self._shown} ({status}). Only public files can be downloaded.")
        if headers.get("Content-Type", "").startswith("text/html"):
            raise self._web_page()
        is_delimited = "Content-Length" in headers or headers.get("Transfer-Encoding", "").lower() == "chunked"
        if not is_delimited and self.sha256 is None:
            # A broken connection would look like the end of the file.
            raise self._error(f"the server does not state the length of {self._shown}, so it may be cut off unnoticed.")

    def _web_page(self) -> UserError:
        return self._error(f"{self._shown} is a web page, not a file. Does this network require you to sign in?")

    @property
    def _shown(self) -> str:
        """The address without the query, which may contain a secret."""
        return self.url.partition("?")[0]

    def _error(self, what: str) -> UserError:
        return UserError(f"{what}\nOr download {self._shown} on another machine and put it here:\n  {self.path}")


def _stored_md5(response: "requests.Response") -> bytes | None:
    """The MD5 that Google Cloud Storage states."""
    match = re.search(r"\bmd5=([A-Za-z0-9+/]{22}==)", response.headers.get("x-goog-hash", ""))
    return None if match is None else binascii.a2b_base64(match[1])


def _in_time(call: Callable[[], Any], seconds: float) -> Any:
    """Calls a function in a thread, and raises `TimeoutError` after `seconds`.

    The timeout of a socket is for one read, and a server may send its headers a byte at a time.
    """
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="download", daemon=True).start()
    if not concurrent.futures.wait([future], timeout=seconds).done:
        raise TimeoutError(f"no complete answer in {seconds:g} s")
    return future.result()


def _reason(error: BaseException) -> str:
    """The cause of an error of requests, whose own text shows the query of the address."""
    while error.__context__ is not None:
        error = error.__context__
    return getattr(error, "verify_message", None) or getattr(error, "strerror", None) or str(error)


# --- Paths and addresses ---


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
