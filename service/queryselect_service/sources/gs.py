"""gs://: objects of Google Cloud Storage, by its XML API, which speaks HTTP's ranges and etags.

Credentials are the server's own, as google-auth finds them: GOOGLE_APPLICATION_CREDENTIALS, the workload's identity, or
none where the environment has none. STORAGE_EMULATOR_HOST names an emulator instead.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import google.auth.exceptions
import urllib3
from google.auth.transport.urllib3 import Request

from queryselect_service.errors import SourceRefused
from queryselect_service.sources.address import Address
from queryselect_service.sources.https import Web

HOST = "https://storage.googleapis.com"
SCOPES = ("https://www.googleapis.com/auth/devstorage.read_only",)
_LOCK = threading.Lock()


def open_object(address: Address, _: Address, check: Callable[[], None]) -> Web:
    """Opens an object."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    host = HOST if not emulator else emulator.rstrip("/")
    return Web(f"{host}/{address.host}{address.url_path}", check, dict if emulator else _authorization)


def _authorization() -> Mapping[str, str]:
    """The header that tells who this server is."""
    headers: dict[str, str] = {}
    try:
        with _LOCK:  # one refresh at a time
            credentials = _credentials()
            if credentials is not None:
                credentials.before_request(_request(), "GET", HOST, headers)
    except google.auth.exceptions.GoogleAuthError:
        raise SourceRefused("this server's credentials for gs:// do not work") from None
    return headers


@cache
def _credentials() -> Any:
    try:
        return google.auth.default(scopes=SCOPES)[0]
    except google.auth.exceptions.DefaultCredentialsError:
        return None  # what everybody may read


@cache
def _request() -> Any:
    return Request(urllib3.PoolManager())  # type: ignore[no-untyped-call]
