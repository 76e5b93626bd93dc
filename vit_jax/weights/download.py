"""Brings files of weights here: from a path, over http(s), or from a public Google Cloud Storage bucket.

A download lies in the cache under its final name only when it is whole and verified. Until then it is
`<name>.partial`, which any later attempt goes on with. Environment variables:

VIT_JAX_CACHE          the cache; otherwise $XDG_CACHE_HOME/vit_jax/weights, otherwise ~/.cache/vit_jax/weights
VIT_JAX_GCS_ENDPOINT   where gs://bucket/key is asked for, as <endpoint>/bucket/key: a mirror, for instance;
                       otherwise https://storage.googleapis.com
"""

import base64
import binascii
import concurrent.futures
import contextlib
import dataclasses
import datetime
import difflib
import errno
import fcntl
import hashlib
import http.client
import json
import logging
import os
import pathlib
import re
import shlex
import shutil
import ssl
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, TypeVar

import vit_jax
from vit_jax.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

CACHE_VARIABLE = "VIT_JAX_CACHE"
ENDPOINT_VARIABLE = "VIT_JAX_GCS_ENDPOINT"
DEFAULT_ENDPOINT = "https://storage.googleapis.com"

_CHUNK = 1 << 18  # bytes; what is read at once
_SPARE_BYTES = 1_000_000  # for folders, the small files beside a download, and other processes
_LONGEST_NAME = 200  # most file systems take 255 bytes, and `.partial.json` must fit behind
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
_LIMIT_SECONDS = 24 * 3600.0
_MAX_BYTES = 2**40  # more is no file of weights, but an answer without end
_HEADER_TIMEOUTS = 4  # times `timeout_seconds`, for connection, redirects and headers together
_SLOWEST = 1_000  # bytes a second, over `timeout_seconds` twice; whoever brings less is not waited for
_PLAIN = "-_.~+=,@()!"  # besides letters and digits, these stay as they are in names of cached files
_HOST = r"([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}|[0-9a-f:.]+:[0-9a-f:.]*"  # a name or an IPv6 address
_HINT = "Give a path, or the address of a file: https://host/file, gs://bucket/file."


def fetch(
    place: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    cache: pathlib.Path | None = None,
    progress: bool = True,
    retry_seconds: Sequence[float] = (1, 3, 9),
    timeout_seconds: float = 30,
    limit_seconds: float = _LIMIT_SECONDS,
) -> pathlib.Path:
    """Brings a file here, if it is not here already.

    Args:
      place: a path (of a file or folder), or an address that starts with file://, http://, https:// or gs://.
      sha256: hexadecimal digest the file must have.
      cache: folder of downloads; see the top of this module where it is not given.
      progress: whether to tell on stderr how far a download is.
      retry_seconds: how long to wait after each attempt in a row that brought nothing new.
      timeout_seconds: how long the server may be silent.
      limit_seconds: how long the whole download may take.

    Returns:
      where the file is.

    Raises:
      UserError: there is no such file, it could not be brought here, or it has another digest.
    """
    place = os.fspath(place)
    if sha256 is not None:
        sha256 = sha256.lower()
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise UserError(
                f"{sha256!r} is no SHA-256 digest. It has 64 hexadecimal digits, as `sha256sum` prints them."
            )
    if not _is_remote(place):
        path = _local_path(place)
        if sha256 is not None:
            if path.is_dir():
                raise UserError(f"{path} is a folder, and a folder has no SHA-256 digest. Leave sha256 out.")
            _check_digest(path, sha256, "Check that it is the file you mean, or leave sha256 out.")
        return path

    url = _url(place)
    final = cached_path(place, cache)
    if not _is_there(final):
        download = _Download(
            url, final, sha256, progress=progress, timeout_seconds=timeout_seconds, limit_seconds=limit_seconds
        )
        with download.errors_for_people(), _locked(final):
            if not _is_there(final):  # another process may have brought it meanwhile
                download.run(retry_seconds)
                return final
    if sha256 is not None:
        _check_digest(final, sha256, f"If the digest you gave is right, delete the file: rm {_quoted(final)}")
    return final


def _is_there(final: pathlib.Path) -> bool:
    return final.is_file() and final.stat().st_size > 0  # an empty file is what an older version kept of a bad answer


def cache_folder() -> pathlib.Path:
    """The folder of downloads; see the top of this module."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return pathlib.Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "vit_jax" / "weights"


def cached_path(place: str, cache: pathlib.Path | None = None) -> pathlib.Path:
    """Where the file at an address lies once it is downloaded, and where to put it by hand; always inside the cache.

    Args:
      place: starts with http://, https:// or gs://. A gs:// address has the same name whatever the endpoint.
      cache: as in `fetch`.
    """
    url = urllib.parse.urlsplit(_url(place, endpoint=DEFAULT_ENDPOINT))
    folder, *names = [_file_name(urllib.parse.unquote(part)) for part in (url.netloc.lower() + url.path).split("/")]
    if url.query:
        # Another query is another file. It may contain a secret, so it does not go into the name.
        stem, suffix = os.path.splitext(names[-1])
        names[-1] = f"{stem}%3F{hashlib.sha256(url.query.encode()).hexdigest()[:16]}{suffix}"
    cache = cache_folder() if cache is None else cache
    return pathlib.Path(cache).expanduser().absolute().joinpath(folder, *names)


def _file_name(text: str) -> str:
    """A name for one folder or file that depends on the whole text and leads nowhere else."""
    name = urllib.parse.quote(text, safe=_PLAIN, errors="surrogatepass")
    if not name.strip("."):  # "", "." and ".."; a quoted name has no such "%"
        name = name.replace(".", "%2E") or "%"
    # Not the name of what lies beside another file's download.
    name = re.sub(r"\.(partial|partial\.json|lock|unverified)$", r"%2E\1", name)
    if len(name) > _LONGEST_NAME:
        suffix = os.path.splitext(name)[1][-20:]
        name = f"{name[:100]}~{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:16]}{suffix}"
    return name


def _scheme(place: str) -> str | None:
    match = re.match("([a-z][a-z0-9+.-]*)://", place, re.IGNORECASE)
    return match[1].lower() if match else None


def _is_remote(place: str) -> bool:
    scheme = _scheme(place)
    if scheme not in (None, "file", "http", "https", "gs"):
        raise UserError(f"cannot read {place!r}: {scheme}:// is not supported. {_HINT}")
    return scheme in ("http", "https", "gs")


def _local_path(place: str) -> pathlib.Path:
    if not place or "\0" in place:
        raise UserError(f"{place!r} is no path. {_HINT}")
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


def _url(place: str, endpoint: str | None = None) -> str:
    """The http(s) address of a place; quoted, and without a fragment."""
    if _scheme(place) == "gs":
        bucket, _, key = place[len("gs://") :].partition("/")
        if not re.fullmatch("[a-z0-9][a-z0-9._-]*", bucket):
            raise UserError(f"{place!r} does not name a bucket. It should look like gs://vit_models/augreg/name.npz.")
        if endpoint is None:
            endpoint = os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT
        if _scheme(endpoint) not in ("http", "https"):
            raise UserError(
                f"{ENDPOINT_VARIABLE} is {endpoint!r}. Give it as http(s)://host, like {DEFAULT_ENDPOINT}, or unset it."
            )
        place = f"{endpoint.rstrip('/')}/{bucket}/{urllib.parse.quote(key, safe='/' + _PLAIN)}"
    try:
        url = urllib.parse.urlsplit(place)
        _ = url.port  # raises if it is no number
    except ValueError as error:
        raise UserError(f"{place!r} is no address ({error}). {_HINT}") from error
    if "@" in url.netloc or not re.fullmatch(_HOST, url.hostname or "", re.IGNORECASE):
        raise UserError(f"{place!r} does not name a host, or names a user too. {_HINT}")
    if not url.path.strip("/") or url.path.endswith("/"):
        raise UserError(f"{place!r} does not name a file. {_HINT}")
    path = urllib.parse.quote(url.path, safe="/%:;&$*'" + _PLAIN)
    query = urllib.parse.quote(url.query, safe="/%:;&$*'?" + _PLAIN)
    return urllib.parse.urlunsplit((url.scheme.lower(), url.netloc, path, query, ""))


def _quoted(path: pathlib.Path) -> str:
    """The path, as one types it in a shell."""
    return shlex.quote(str(path))


def _digests(path: pathlib.Path) -> tuple[str, str]:
    """SHA-256 and MD5 of a file."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            md5.update(chunk)
    return sha256.hexdigest(), md5.hexdigest()


def _check_digest(path: pathlib.Path, expected: str, advice: str) -> None:
    try:
        found = _digests(path)[0]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    if found != expected:
        raise UserError(f"{path} is another file than expected.\n  SHA-256: {found}\n expected: {expected}\n{advice}")


@contextlib.contextmanager
def _locked(final: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from downloading the same file. A lock ends with its process, however that ends."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with _beside(final, ".lock").open("w") as lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("waiting for another process that downloads %s", final)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            logger.warning("%s cannot be locked; do not download it in two processes at once", final.parent)
        yield


def _beside(final: pathlib.Path, suffix: str) -> pathlib.Path:
    return final.with_name(final.name + suffix)


class _TryAgainError(Exception):
    """An attempt failed for a reason that may pass; `is_slow`: the server brought too little."""

    def __init__(self, reason: str, *, is_slow: bool = False):
        super().__init__(reason)
        self.is_slow = is_slow


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only, and from https to https only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        schemes = urllib.parse.urlsplit(req.full_url).scheme, urllib.parse.urlsplit(newurl).scheme
        if schemes[1] not in ("http", "https") or schemes == ("https", "http"):
            raise UserError(
                f"{req.full_url.partition('?')[0]} redirects from {schemes[0]}:// to {schemes[1]}://, which is not "
                "followed. Give the address of the file itself."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@dataclasses.dataclass(frozen=True)
class _Remote:
    """What the server says of a file; kept beside the partial one, to know later whether it is still the same.

    Attributes:
      size: bytes, if known.
      etag: strong entity tag, if any.
      last_modified: a date as the server writes it, if any.
      md5: hexadecimal, if the server tells.
    """

    size: int | None
    etag: str | None
    last_modified: str | None
    md5: str | None

    @property
    def validator(self) -> str | None:
        return self.etag or self.last_modified

    @classmethod
    def of(cls, response: http.client.HTTPResponse, size: int | None) -> "_Remote":
        headers = response.headers
        etag = headers.get("ETag")
        if etag and etag.startswith("W/"):  # may stay the same when bytes change
            etag = None
        md5 = None
        for part in ",".join(headers.get_all("x-goog-hash") or []).split(","):
            name, _, value = part.strip().partition("=")
            if name == "md5":
                with contextlib.suppress(binascii.Error):
                    md5 = base64.b64decode(value, validate=True).hex()
        return cls(size=size, etag=etag, last_modified=headers.get("Last-Modified"), md5=md5)

    @classmethod
    def read(cls, path: pathlib.Path) -> "_Remote | None":
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):  # absent, cut off, or of another version: then start over
            return None

    def write(self, path: pathlib.Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))


class _Download:
    """One file on its way into the cache."""

    def __init__(
        self,
        url: str,
        final: pathlib.Path,
        sha256: str | None,
        *,
        progress: bool,
        timeout_seconds: float,
        limit_seconds: float = _LIMIT_SECONDS,
    ) -> None:
        self._url, self._final, self._sha256 = url, final, sha256
        self._shown_url = url.partition("?")[0]  # the query may contain a secret
        self._show_progress, self._timeout_seconds = progress, timeout_seconds
        self._limit_seconds, self._end = limit_seconds, time.monotonic() + limit_seconds
        self._partial = _beside(final, ".partial")
        self._sidecar = _beside(final, ".partial.json")
        self._size: int | None = None

    def run(self, retry_seconds: Sequence[float]) -> None:
        """Downloads, verifies, and only then gives the file its name."""
        attempts, tries_in_vain, most = 0, 0, self._have()
        while True:
            attempts += 1
            try:
                remote = self._receive()
                self._verify(remote)
                break
            except _TryAgainError as error:
                self._check_time()
                if self._have() > most and not error.is_slow:  # the line is bad, but it does bring the file
                    most, tries_in_vain = self._have(), 0
                if tries_in_vain == len(retry_seconds):
                    kept = f" The {self._have():,} bytes that came are kept; the same command goes on from there."
                    raise UserError(
                        f"could not download {self._shown_url} in {attempts} attempts: {error}."
                        f"{kept if self._have() else ''}\n{self._by_hand()}"
                    ) from error
                wait = retry_seconds[tries_in_vain]
                tries_in_vain += 1
                logger.warning("%s: %s; trying again in %g s", self._final.name, error, wait)
                time.sleep(wait)
        self._partial.replace(self._final)
        self._sidecar.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # some file systems cannot; the file itself is on disk
            folder = os.open(self._final.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextlib.contextmanager
    def errors_for_people(self) -> Iterator[None]:
        """Explains errors in writing to the cache."""
        try:
            yield
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise self._no_space() from error
            raise UserError(
                f"cannot write to the cache {self._final.parent}: {error.strerror or error}. Set {CACHE_VARIABLE} to a "
                "folder you can write to."
            ) from error

    def _have(self) -> int:
        return self._partial.stat().st_size if self._partial.exists() else 0

    def _forget(self) -> None:
        self._partial.unlink(missing_ok=True)
        self._sidecar.unlink(missing_ok=True)

    def _receive(self) -> _Remote:
        """Makes the partial file whole, going on from what there is of it."""
        before = _Remote.read(self._sidecar)
        have = self._have()
        if before is not None and before.size == have > 0:  # stopped between the last byte and the new name
            self._size = have
            return before
        if before is None or before.validator is None:
            have = 0
        headers = {"User-Agent": f"vit_jax/{vit_jax.__version__}", "Accept-Encoding": "identity"}
        if have and before is not None and before.validator is not None:
            # If-Range: should the file have changed, the answer is the whole new one.
            headers |= {"Range": f"bytes={have}-", "If-Range": before.validator}
        with self._open(headers) as response:
            if response.status not in (http.HTTPStatus.OK, http.HTTPStatus.PARTIAL_CONTENT):
                raise self._refused(response.status, response.reason)
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:
                start, size = _content_range(response)
                remote = _Remote.of(response, size)
                if start != have or before is None or not _continues(before, remote):
                    self._forget()
                    raise _TryAgainError("the file changed on the server, or it does not say that it did not")
            else:
                if have:
                    logger.warning("%s: the file changed, or the server cannot resume; starting over", self._final.name)
                have = 0
                remote = _Remote.of(response, response.length)
            self._size = remote.size
            self._check_answer(response)
            with self._partial.open("ab" if have else "wb") as file:
                if not have:
                    remote.write(self._sidecar)
                self._check_space(have)
                have = self._copy(response, file, have)
        if not have:
            self._forget()
            raise _TryAgainError("the server sent an empty file")
        if remote.size is not None and have != remote.size:
            if have > remote.size:
                self._forget()
            raise _TryAgainError(f"the connection ended after {have:,} of {remote.size:,} bytes")
        return remote

    def _copy(self, response: http.client.HTTPResponse, file: BinaryIO, have: int) -> int:
        """Appends what comes to the partial file; returns how long it is then."""
        progress = _Progress(self._final.name, have, self._size) if self._show_progress else None
        window, due = have, time.monotonic() + 2 * self._timeout_seconds
        try:
            while chunk := self._read(response):
                if not have:
                    self._check_start(chunk)
                file.write(chunk)
                file.flush()  # so that it outlives a kill
                have += len(chunk)
                if progress:
                    progress.update(have)
                self._check_time()
                if have > _MAX_BYTES:
                    raise UserError(f"{self._shown_url} has no end: {have:,} bytes came. {self._by_hand()}")
                if time.monotonic() > due:
                    if have - window < 2 * self._timeout_seconds * _SLOWEST:
                        raise _TryAgainError("less than a kilobyte a second comes", is_slow=True)
                    window, due = have, time.monotonic() + 2 * self._timeout_seconds
            os.fsync(file.fileno())
        finally:
            if progress:
                progress.close()
        return have

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        # Apart from writing: an OSError here is about the connection, there about the disk.
        try:
            return response.read1(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgainError(f"the connection broke ({_reason(error)})") from error

    def _check_time(self) -> None:
        if time.monotonic() > self._end:
            raise UserError(
                f"{self._shown_url} did not come in {self._limit_seconds:,.0f} seconds. The {self._have():,} bytes "
                f"that came are kept; the same command goes on from there.\n{self._by_hand()}"
            )

    def _check_start(self, chunk: bytes) -> None:
        if chunk.lstrip()[:5].lower() in (b"<!doc", b"<html") and not self._shown_url.endswith((".html", ".htm")):
            self._forget()
            raise self._web_page()

    def _web_page(self) -> UserError:
        return UserError(
            f"{self._shown_url} brought a web page instead of a file; does this network want you to sign in?\n"
            f"{self._by_hand()}"
        )

    @contextlib.contextmanager
    def _open(self, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
        request = urllib.request.Request(self._url, headers=headers)  # noqa: S310 - only http(s) comes here
        try:
            opener = urllib.request.build_opener(_Redirects())
            response = _in_time(
                lambda: opener.open(request, timeout=self._timeout_seconds), _HEADER_TIMEOUTS * self._timeout_seconds
            )
        except urllib.error.HTTPError as error:
            error.close()
            raise self._refused(error.code, error.reason) from error
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            host = urllib.parse.urlsplit(self._url).netloc
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise UserError(
                    f"{host} could not prove that it is {host}: {cause.verify_message}. Check the clock and the "
                    f"certificates of this machine (SSL_CERT_FILE names others).\n{self._by_hand()}"
                ) from error
            raise _TryAgainError(f"cannot reach {host} ({_reason(cause)})") from error
        with response:
            yield response

    def _refused(self, status: int, reason: str) -> Exception:
        if status in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE):
            return UserError(
                f"there is no {self._shown_url} ({status} {reason}). Check the spelling, upper and lower case too; "
                "vit_jax.weights.list_checkpoints() lists the released files."
            )
        if status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self._forget()
            return _TryAgainError("the server does not have the part that is missing")
        if status in _PASSING_STATUS:
            return _TryAgainError(f"the server answered {status} {reason}")
        return UserError(
            f"the server does not give {self._shown_url} ({status} {reason}). Only public files can be downloaded.\n"
            f"{self._by_hand()}"
        )

    def _check_answer(self, response: http.client.HTTPResponse) -> None:
        kind = response.headers.get_content_type() if response.headers.get("Content-Type") else ""
        if kind == "text/html" and not self._shown_url.endswith((".html", ".htm")):
            raise self._web_page()
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise UserError(f"{self._shown_url} comes encoded ({encoding}) though it should not.\n{self._by_hand()}")
        if self._size is None and not response.chunked and self._sha256 is None:
            # The end of such an answer looks the same as a broken connection.
            raise UserError(
                f"the server does not tell the length of {self._shown_url}. Pass sha256, so that it can be checked."
            )

    def _check_space(self, have: int) -> None:
        needed = (self._size or have) - have
        if needed and shutil.disk_usage(self._final.parent).free < needed + _SPARE_BYTES:
            raise self._no_space()

    def _no_space(self) -> UserError:
        folder = self._final.parent
        while not folder.exists():
            folder = folder.parent
        needed = f"{self._size - self._have():,} bytes more are needed, " if self._size is not None else ""
        return UserError(
            f"no space left for {self._final}: {needed}{shutil.disk_usage(folder).free:,} are free. Free some, or set "
            f"{CACHE_VARIABLE} to a folder on another disk; the same command then goes on."
        )

    def _verify(self, remote: _Remote) -> None:
        if self._sha256 is None and remote.md5 is None:
            return
        sha256, md5 = _digests(self._partial)
        if self._sha256 is not None and sha256 != self._sha256:
            # Perhaps the file is good and the digest a slip, so it is not deleted.
            aside = _beside(self._final, ".unverified")
            self._partial.replace(aside)
            self._sidecar.unlink(missing_ok=True)
            raise UserError(
                f"{self._shown_url} is another file than expected.\n  SHA-256: {sha256}\n expected: {self._sha256}\n"
                f"What came is in {aside}; delete it (rm {_quoted(aside)}) and try again, or give the right digest."
            )
        if remote.md5 is not None and md5 != remote.md5:
            self._forget()
            raise _TryAgainError(f"the file was damaged on its way (MD5 {md5}, the server says {remote.md5})")

    def _by_hand(self) -> str:
        return (
            f"Or bring the file by hand: download {self._shown_url} on another machine and put it here:\n"
            f"  {self._final}"
        )


def _continues(before: _Remote, now: _Remote) -> bool:
    """Whether a later part is surely of the same file: it has the same length and the same If-Range validator."""
    is_same = before.etag == now.etag if before.etag else before.last_modified == now.last_modified
    return is_same and before.size in (None, now.size) and (before.md5 is None or now.md5 in (None, before.md5))


def _content_range(response: http.client.HTTPResponse) -> tuple[int | None, int | None]:
    """First byte and full size, from `Content-Range: bytes 100-199/200`."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if not match:
        return None, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _in_time(call: Callable[[], T], seconds: float) -> T:
    """Returns what a call returns, or raises `TimeoutError`; the call then goes on in a thread that nothing waits for.

    A time-out of a socket is for one read, and a server may send its headers a byte at a time.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="download", daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError as error:
        if future.done():  # the call's own
            raise
        raise TimeoutError(f"no whole answer in {seconds:g} s") from error


def _reason(error: object) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _Progress:
    """Tells on stderr how far a download is: on a terminal in one line that changes, else in a line each 10 %."""

    EVERY_SECONDS = 0.3  # on a terminal
    EVERY_SECONDS_UNKNOWN = 10.0  # elsewhere, if the size is not known
    EVERY_PERCENT = 10

    def __init__(self, what: str, have: int, size: int | None):
        self._what, self._size, self._stream = what, size, sys.stderr
        self._terminal = self._stream.isatty()
        self._first, self._start = have, time.monotonic()
        self._last, self._written = self._start, 0
        self._next_percent = self._percent(have) // self.EVERY_PERCENT * self.EVERY_PERCENT + self.EVERY_PERCENT
        self._have, self._told = have, -1

    def _percent(self, have: int) -> int:
        return 100 * have // self._size if self._size else 0

    def update(self, have: int) -> None:
        """Tells, if it is time to."""
        self._have = have
        now = time.monotonic()
        if self._terminal:
            due = now - self._last >= self.EVERY_SECONDS
        elif self._size:
            due = self._percent(have) >= self._next_percent
        else:
            due = now - self._last >= self.EVERY_SECONDS_UNKNOWN
        if due:
            self._tell(now)

    def _tell(self, now: float) -> None:
        with contextlib.suppress(OSError):  # nobody reads stderr any more, but the file may still be wanted
            self._write_line(now)

    def _write_line(self, now: float) -> None:
        self._last, self._told = now, self._have
        self._next_percent = self._percent(self._have) // self.EVERY_PERCENT * self.EVERY_PERCENT + self.EVERY_PERCENT
        rate = (self._have - self._first) / max(now - self._start, 1e-3)
        parts = [f"{self._what}: {self._have / 1e6:.1f}"]
        if self._size:
            parts[0] += f"/{self._size / 1e6:.1f} MB"
            left = datetime.timedelta(seconds=round((self._size - self._have) / max(rate, 1.0)))
            parts += [f"{self._percent(self._have):3d}%", f"{rate / 1e6:.1f} MB/s", f"{left} left"]
        else:
            parts[0] += " MB"
            parts += [f"{rate / 1e6:.1f} MB/s"]
        line = "  ".join(parts)
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            line = line if len(line) <= width else line[-width:]  # the numbers are at its end
            self._stream.write("\r" + line.ljust(self._written))
            self._written = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Tells where it ended, and ends the line."""
        if self._told != self._have and self._have > self._first:
            self._tell(time.monotonic())
        if self._written:
            with contextlib.suppress(OSError):
                self._stream.write("\n")
                self._stream.flush()
