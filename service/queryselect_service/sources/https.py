"""https://: objects of a web server that answers range requests.

Redirects are never followed: where they lead is not the operator's choice. Cookies are not kept, proxies are those of
the server's environment, as are the certificates that are trusted (SSL_CERT_FILE, SSL_CERT_DIR).
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Mapping
from datetime import timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from typing import NoReturn, TypeVar

import urllib3

from queryselect_service.errors import NotFound, ObjectChanged, ServiceError, SourceRefused, SourceUnavailable
from queryselect_service.sources.address import Address
from queryselect_service.sources.objects import HEAD_BYTES, Content, Remote, bare
from queryselect_service.sources.watch import Spare, watched

#: Seconds to connect, between two bytes, and for one read from its beginning to its end; how often a read is tried.
CONNECT, SILENCE, WHOLE, TRIES = 5.0, 15.0, 60.0, 3
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
#: The age from which a date tells versions apart, in seconds: within it an object may have changed twice.
OLD = 60.0
_AGAIN = (408, 429, 500, 502, 503, 504)

Headers = Mapping[str, str]
Pools = TypeVar("Pools", bound=urllib3.PoolManager)


class _Plain(Spare, urllib3.connection.HTTPConnection):
    pass


class _Secure(Spare, urllib3.connection.HTTPSConnection):
    pass


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Plain


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Secure


class Web(Remote):
    """An object on a web server."""

    def __init__(self, url: str, check: Callable[[], None], headers: Callable[[], Headers] = dict) -> None:
        """check: called while bytes come; may raise. headers: of every request, such as credentials."""
        self._url, self._check, self._headers = url, check, headers
        self._etag, self.version, self.size = "", "", -1
        super().__init__()

    def _get(self, start: int, stop: int) -> bytes:
        for tried in range(TRIES):
            self._check()
            with watched(WHOLE, self._check) as request:
                try:
                    return self._try(start, stop)
                except Exception as error:
                    self._check()
                    if request.late:  # what was cut off may look like anything
                        raise SourceUnavailable(f"its server did not answer within {WHOLE:g} s") from None
                    if not isinstance(error, (urllib3.exceptions.HTTPError, OSError, SourceUnavailable)):
                        raise
                    if tried == TRIES - 1:
                        raise SourceUnavailable(f"its server does not answer as it should: {_words(error)}") from None
            time.sleep(0.2 * 2**tried)
        raise AssertionError("the last try returns or raises")

    def _try(self, start: int, stop: int) -> bytes:
        conditions = {"If-Match": self._etag} if self._etag else {}
        response = _pool(self._url).request(
            "GET",
            self._url,
            headers={
                **self._headers(),
                **conditions,
                "Range": f"bytes={start}-{stop - 1}",
                "Accept-Encoding": "identity",
            },
            redirect=False,
            retries=False,
            preload_content=False,
            timeout=urllib3.Timeout(connect=CONNECT, read=SILENCE),
        )
        try:
            if response.status != 206:
                _refuse(response.status)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise Content("its server compresses what it was asked to send as it is")
            size = length_of(response.headers.get("Content-Range", ""), start, stop)
            data = take(response.read1, min(stop, size) - start, self._check)
        finally:
            response.close() if response.length_remaining else response.release_conn()
        self._same(response.headers, size)
        return data

    def _same(self, headers: Headers, size: int) -> None:
        """Raises ObjectChanged where the object is not what it was; Content where nothing can tell."""
        etag = headers.get("ETag", "")
        strong = etag if etag.startswith('"') else ""
        version = bare(strong) or _date(headers)
        if self.size < 0:
            if not version and size > HEAD_BYTES:
                raise Content("its server tells no version to go by, a strong etag or a date that is not of just now")
            self._etag, self.version, self.size = strong, version, size
        elif (version, size) != (self.version, self.size):
            raise ObjectChanged("it changed while it was read")


def _date(headers: Headers) -> str:
    """When the object changed last, where that tells versions apart: long before the answer (RFC 9110, 8.8.2)."""
    try:
        changed, now = (parsedate_to_datetime(headers.get(name, "")) for name in ("Last-Modified", "Date"))
        return headers["Last-Modified"] if now - changed >= timedelta(seconds=OLD) else ""
    except (ValueError, TypeError):  # none, or one with a zone and one without
        return ""


def length_of(told: str, start: int, stop: int) -> int:
    """The object's bytes, by the Content-Range of an answer to a request for [start, stop)."""
    found = _RANGE.fullmatch(told)
    first, last, size = map(int, found.groups()) if found else (-1, -1, -1)
    if (first, last) != (start, min(stop, size) - 1):
        raise Content("its server answers range requests with other bytes than were asked for")
    return size


def take(read: Callable[[int], bytes], size: int, check: Callable[[], None]) -> bytes:
    """So many bytes and no more, within a time, of what `read` gives at most so many of. check: called in between."""
    data, until = bytearray(), time.monotonic() + WHOLE
    while len(data) < size:
        check()
        if time.monotonic() > until:
            raise SourceUnavailable(f"{len(data)} of {size} bytes came within {WHOLE:g} s")
        some = read(min(size - len(data), 1 << 20))
        if not some:
            raise SourceUnavailable(f"{len(data)} of {size} bytes came")
        data += some
    return bytes(data)


def open_object(address: Address, _: Address, check: Callable[[], None]) -> Web:
    """Opens an object."""
    return Web(f"https://{address.host}{address.url_path}", check)


def _refuse(status: int) -> NoReturn:
    if 300 <= status < 400:
        raise SourceRefused("its server redirects elsewhere, and redirects are not followed")
    if status in (401, 403, 407):
        raise SourceRefused("its server does not let this server read it")
    if status in (404, 410):
        raise NotFound("there is no such object")
    if status == 412:
        raise ObjectChanged("it changed while it was read")
    if status == 416:
        raise Content("it has no bytes there")
    if status == 200:
        raise Content("its server does not answer range requests, of which it is read")
    if status in _AGAIN:
        raise SourceUnavailable(f"status {status}")
    raise Content(f"its server answers with status {status}")


def _words(error: Exception) -> str:
    """What can be told of a failure: its kind, and nothing that may name hosts behind a proxy."""
    return error.message if isinstance(error, ServiceError) else type(error).__name__


@cache
def _direct() -> urllib3.PoolManager:
    return _watched(urllib3.PoolManager(maxsize=16))


@cache
def _through(proxy: str) -> urllib3.ProxyManager:
    return _watched(urllib3.ProxyManager(proxy, maxsize=16))


def _watched(pools: Pools) -> Pools:
    pools.pool_classes_by_scheme = {"http": _PlainPool, "https": _SecurePool}
    return pools


def _pool(url: str) -> urllib3.PoolManager:
    """Connections, kept for next time: direct, or through the proxy of the environment."""
    host = urllib3.util.parse_url(url).host or ""
    proxy = urllib.request.getproxies().get("https")
    return _direct() if not proxy or urllib.request.proxy_bypass(host) else _through(proxy)
