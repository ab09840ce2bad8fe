"""https://: objects of a web server that answers range requests.

Redirects are never followed: where they lead is not the operator's choice. Cookies are not kept, proxies are those of
the server's environment, as are the certificates that are trusted (SSL_CERT_FILE, SSL_CERT_DIR).
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Mapping
from functools import cache
from typing import NoReturn

import urllib3

from queryselect_service.errors import NotFound, ObjectChanged, ServiceError, SourceRefused, SourceUnavailable
from queryselect_service.sources.address import Address
from queryselect_service.sources.objects import Content, Remote, bare

#: Seconds to connect, between two bytes, and for all bytes of one read; how often a read is tried.
CONNECT, SILENCE, WHOLE, TRIES = 5.0, 15.0, 60.0, 3
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_AGAIN = (408, 429, 500, 502, 503, 504)

Headers = Mapping[str, str]


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
            try:
                return self._try(start, stop)
            except (urllib3.exceptions.HTTPError, SourceUnavailable) as error:
                if tried == TRIES - 1:
                    raise SourceUnavailable(f"its server does not answer as it should: {_words(error)}") from None
                time.sleep(0.2 * 2**tried)
        raise AssertionError("the last try returns or raises")

    def _try(self, start: int, stop: int) -> bytes:
        conditions = {"If-Match": self._etag} if self._etag.startswith('"') else {}
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
            first, last, size = self._told(response, start, stop)
            data = take(response.read1, last + 1 - first, self._check)
        finally:
            response.close() if response.length_remaining else response.release_conn()
        self._same(response.headers, size)
        return data

    def _told(self, response: urllib3.BaseHTTPResponse, start: int, stop: int) -> tuple[int, int, int]:
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        first, last, size = map(int, found.groups()) if found else (-1, -1, -1)
        if (first, last) != (start, min(stop, size) - 1):
            raise Content("its server answers range requests with other bytes than were asked for")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise Content("its server compresses what it was asked to send as it is")
        return first, last, size

    def _same(self, headers: Headers, size: int) -> None:
        """Raises ObjectChanged where the object is not what it was, by its etag or, without one, its date."""
        etag = headers.get("ETag", "")
        version = bare(etag) or headers.get("Last-Modified", "")
        if self.size < 0:
            self._etag, self.version, self.size = etag, version, size
        elif (version, size) != (self.version, self.size):
            raise ObjectChanged("it changed while it was read")


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
    return urllib3.PoolManager(maxsize=16)


@cache
def _through(proxy: str) -> urllib3.ProxyManager:
    return urllib3.ProxyManager(proxy, maxsize=16)


def _pool(url: str) -> urllib3.PoolManager:
    """Connections, kept for next time: direct, or through the proxy of the environment."""
    host = urllib3.util.parse_url(url).host or ""
    proxy = urllib.request.getproxies().get("https")
    return _direct() if not proxy or urllib.request.proxy_bypass(host) else _through(proxy)
