"""s3://: objects of S3, or of a store that speaks its protocol.

Credentials, region and endpoint are the server's own, as boto3 finds them: AWS_ACCESS_KEY_ID, AWS_REGION,
AWS_ENDPOINT_URL_S3, a profile, or the workload's identity. boto3 follows no Location header: a bucket of another region
is asked for at that region's own endpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from urllib3.exceptions import HTTPError

from queryselect_service.errors import NotFound, ObjectChanged, SourceRefused, SourceUnavailable
from queryselect_service.sources.address import Address
from queryselect_service.sources.https import CONNECT, SILENCE, TRIES, length_of, take
from queryselect_service.sources.objects import Content, Remote, bare

_LOCK = threading.Lock()


class Key(Remote):
    """An object in a bucket."""

    def __init__(self, client: Any, bucket: str, key: str, check: Callable[[], None]) -> None:
        """check: called while bytes come; may raise."""
        self._client, self._bucket, self._key, self._check = client, bucket, key, check
        self._etag, self.size = "", -1
        super().__init__()
        self.version = bare(self._etag)

    def _get(self, start: int, stop: int) -> bytes:
        conditions = {"IfMatch": self._etag} if self._etag else {}
        self._check()
        try:
            answer = self._client.get_object(
                Bucket=self._bucket, Key=self._key, Range=f"bytes={start}-{stop - 1}", **conditions
            )
            size = length_of(answer.get("ContentRange", ""), start, stop)
            etag = str(answer.get("ETag", ""))
            if not etag:
                raise Content("its store tells no version to go by, an etag")
            with answer["Body"] as body:
                data = take(body.read1, min(stop, size) - start, self._check)  # read would wait for all of it
        except ClientError as error:
            _refuse(error.response)
        except (HTTPClientError, HTTPError, ValueError) as error:  # the last: of a header with a date or a number
            raise SourceUnavailable(f"its store does not answer as it should: {type(error).__name__}") from None
        except BotoCoreError as error:  # no credentials, or none that can be
            raise SourceRefused(f"this server's settings for s3:// do not work: {type(error).__name__}") from None
        if self.size < 0:
            self._etag, self.size = etag, size
        elif (etag, size) != (self._etag, self.size):
            raise ObjectChanged("it changed while it was read")
        return data


def open_object(address: Address, _: Address, check: Callable[[], None]) -> Key:
    """Opens an object."""
    with _LOCK:  # to be made one at a time; one serves all threads
        client = _client()
    return Key(client, address.host, address.path, check)


@cache
def _client() -> Any:
    config = Config(
        connect_timeout=CONNECT,
        read_timeout=SILENCE,
        retries={"max_attempts": TRIES, "mode": "standard"},
        max_pool_connections=16,
    )
    return boto3.session.Session().client("s3", config=config)


def _refuse(response: dict[str, Any]) -> NoReturn:
    status, code = response["ResponseMetadata"].get("HTTPStatusCode", 0), response["Error"].get("Code", "")
    if status == 404:
        raise NotFound("there is no such object")
    if status in (400, 401, 403):
        raise SourceRefused(f"its store does not let this server read it ({code[:40]})")
    if status == 412:
        raise ObjectChanged("it changed while it was read")
    if status == 416:
        raise Content("it has no bytes there")
    if 300 <= status < 400:
        raise SourceRefused("its store redirects elsewhere, and redirects are not followed")
    raise SourceUnavailable(f"its store answers with status {status}")
