"""What tests of the service may ask for: servers of their own settings, no bug in the log, a trusted certificate."""

from __future__ import annotations

import logging
import ssl
from contextlib import ExitStack

import grpc
import pytest
import trustme

from queryselect_service import server
from queryselect_service.settings import Settings
from queryselect_service.sources import https
from queryselect_service.stream import Inbox
from tests.service.streams import READING


@pytest.fixture(scope="session", autouse=True)
def _streams_that_are_read():
    """`READING` is kept. Threads are not asked where they are: CPython may crash or stand still for it."""
    read = Inbox._read

    def watched(inbox: Inbox) -> None:
        READING.add(inbox)
        try:
            read(inbox)
        finally:
            READING.discard(inbox)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inbox, "_read", watched)
        yield


@pytest.fixture
def no_bugs(caplog):
    """A caller's fault, or its leaving, is no bug of the server: none is logged."""
    yield
    assert [each for each in caplog.get_records("call") if each.levelno >= logging.ERROR] == []


@pytest.fixture
def serve():
    """Starts servers of their own settings: server and channel."""
    with ExitStack() as stack:

        def begin(**options):
            started = server.start(Settings(port=0, metrics_port=-1, **options))
            stack.callback(started.drain, 0.1)
            return started, stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{started.port}"))

        yield begin


@pytest.fixture(scope="session")
def authority():
    return trustme.CA()


@pytest.fixture
def trusted(authority, monkeypatch, tmp_path):
    """What speaks TLS as localhost, whose certificate this process trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    https._direct.cache_clear()
    yield context
    https._direct.cache_clear()
