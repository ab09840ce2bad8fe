"""Addresses, paths and answers that try to get out of what the operator allowed. None may."""

from __future__ import annotations

import io
import os
import socket
import struct
import threading
import time
import tracemalloc
from contextlib import ExitStack, suppress

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

import queryselect
from queryselect import Client, TensorRef
from queryselect_service import server
from queryselect_service.settings import Settings
from queryselect_service.sources import fetch, https, s3, watch
from queryselect_service.sources.address import Allowed, parse
from tests.service.stores import Answer, Store, npy
from tests.service.test_sources import s3_environment
from tests.waiting import until

SECRET = np.arange(40, dtype=np.float32).reshape(10, 4)
ALLOWED = "file:///srv/pools,https://data.example:8443/pools/2026,s3://pools/a,gs://pools/a"

#: None of these is within ALLOWED.
OUTSIDE = [
    "",
    " ",
    "/srv/pools/x.npy",
    "srv/pools/x.npy",
    "file:/srv/pools/x.npy",
    "file:srv/pools/x.npy",
    "file://srv/pools/x.npy",
    "file://localhost/srv/pools/x.npy",
    "file://127.0.0.1/srv/pools/x.npy",
    "FILE:///srv/pools/x.npy",
    "file:////srv/pools/x.npy",
    "file:///srv//pools/x.npy",
    "file:///srv/pools//x.npy",
    "file:///srv/pools/./x.npy",
    "file:///srv/pools/../x.npy",
    "file:///srv/pools/..",
    "file:///srv/pools/a/../../x.npy",
    "file:///srv/pools/%2e%2e/x.npy",
    "file:///srv/pools/%2E%2E/x.npy",
    "file:///srv/pools/%2e./x.npy",
    "file:///srv/pools/%252e%252e/x.npy",
    "file:///srv/pools/..%2fx.npy",
    "file:///srv/pools/a%2f..%2f..%2fx.npy",
    "file:///srv/pools/..%5cx.npy",
    "file:///srv/pools/..\\x.npy",
    "file:///srv/pools\\..\\x.npy",
    "file:///srv/pools/x.npy%00.txt",
    "file:///srv/pools/x.npy\0.txt",
    "file:///srv/pools/x.npy\n",
    "file:///srv/pools/x.npy?a=b",
    "file:///srv/pools/x.npy#a",
    "file:///srv/pools/%",
    "file:///srv/pools/%zz",
    "file:///srv/pools/%ff",
    "file:///srv/pools/%C0%AE%C0%AE/x.npy",
    "file:///srv/pools/\u2024\u2024/x.npy",
    "file:///srv/pools/\uff0e\uff0e/x.npy",
    "file:///srv/pools2/x.npy",
    "file:///srv/pool",
    "file:///srv",
    "file:///",
    "file://",
    "file:///etc/passwd",
    "file:///proc/self/environ",
    "file:///dev/zero",
    "https://data.example/pools/2026/x.npy",
    "https://data.example:443/pools/2026/x.npy",
    "https://data.example:08443/pools/2026/x.npy",
    "https://data.example:8443/pools/20261/x.npy",
    "https://data.example:8443/pools/x.npy",
    "https://data.example:8443/pools/2026/../x.npy",
    "https://data.example:8443/pools/2026/%2e%2e/x.npy",
    "https://data.example:8443/pools/2026/..;/x.npy/..",
    "https://data.example:8443//pools/2026/x.npy",
    "https://data.example:8443/pools/2026/x.npy?x=1",
    "https://data.example:8443/pools/2026/x.npy#",
    "https://data.example:8443@evil.example/pools/2026/x.npy",
    "https://user:password@data.example:8443/pools/2026/x.npy",
    "https://evil.example/data.example:8443/pools/2026/x.npy",
    "https://evil.example#data.example:8443/pools/2026/x.npy",
    "https://evil.example\\@data.example:8443/pools/2026/x.npy",
    "https://data.example:8443.evil.example/pools/2026/x.npy",
    "https://data.example.:8443/pools/2026/x.npy",
    "https://DATA.example:8443/pools/2026/x.npy",
    "https://d\u0430ta.example:8443/pools/2026/x.npy",
    "https://data.example:8443:8443/pools/2026/x.npy",
    "https://data%2eexample:8443/pools/2026/x.npy",
    "https:///pools/2026/x.npy",
    "https:data.example:8443/pools/2026/x.npy",
    "https://[::1]:8443/pools/2026/x.npy",
    "https://127.0.0.1:8443/pools/2026/x.npy",
    "https://169.254.169.254/latest/meta-data/",
    "https://2130706433:8443/pools/2026/x.npy",
    "https://data.example:8443\r\nHost: evil.example/pools/2026/x.npy",
    "https://data.example:8443/pools/2026/x.npy HTTP/1.1\r\nX: y",
    "http://data.example:8443/pools/2026/x.npy",
    "ftp://data.example:8443/pools/2026/x.npy",
    "gopher://data.example:8443/pools/2026/x.npy",
    "jar:https://data.example:8443/pools/2026/x.npy!/",
    "s3://pools/b/x.npy",
    "s3://pools/ab/x.npy",
    "s3://pools/a/../b/x.npy",
    "s3://pools/a//x.npy",
    "s3://pools/a/./x.npy",
    "s3://pools/a/x.npy?versionId=1",
    "s3://pools.evil/a/x.npy",
    "s3://POOLS/a/x.npy",
    "s3://key:secret@pools/a/x.npy",
    "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/pools/a/x.npy",
    "s3://../pools/a/x.npy",
    "s3a://pools/a/x.npy",
    "gs://pools/b/x.npy",
    "gs://pools/a/..",
    "gs://pools@evil/a/x.npy",
    "s3://pools/a/" + "x" * 3000,
    "file:///srv/pools/" + "a/../" * 100 + "x.npy",
]


@pytest.mark.parametrize("uri", OUTSIDE)
def test_outside(uri):
    try:
        address = parse(uri)
    except ValueError as error:
        assert uri.strip() in ("", "a") or uri[:200] not in str(error)  # nothing of it comes back
        return
    assert Allowed(ALLOWED).prefix_of(address) is None


@pytest.mark.parametrize(
    "uri",
    [
        "file:///srv/pools/x.npy",
        "file:///srv/pools/a%20b/%C3%A4.npy",
        "file:///srv/pools/...",
        "https://data.example:8443/pools/2026/x.npy",
        "https://data.example:8443/pools/2026/a~b;c=d/x.npy",
        "s3://pools/a",
        "s3://pools/a/x y%2e.npy",
        "gs://pools/a/b/c/d.parquet",
    ],
)
def test_inside(uri):
    """What is as it should be gets through: the rules above are no wall."""
    assert Allowed(ALLOWED).prefix_of(parse(uri)) is not None


@given(st.text(alphabet="./%2eEfF\\a0?#@:\n", max_size=30))
def test_no_text_leaves_the_directory(text):
    """What any text below a prefix opens is below it, by the system's own reading of the path."""
    try:
        address = parse(f"file:///srv/pools/{text}")
    except ValueError:
        return
    if Allowed("file:///srv/pools").prefix_of(address) is not None:
        assert os.path.normpath(f"/{address.path}") == f"/{address.path}"
        assert f"/{address.path}/".startswith("/srv/pools/")


@pytest.mark.parametrize(
    "text",
    ["file:///", "file://host/x", "http://x", "pools", "s3://", "s3://a/../b", "https://u@h/", "file:///a?b", "*"],
)
def test_prefixes_that_cannot_be(text):
    with pytest.raises(ValueError, match="allow_uris: "):
        Allowed(f"s3://fine,{text}")


def refused(client: Client, uri: str, kind=queryselect.PermissionDenied, **choice) -> str:
    with pytest.raises(kind) as caught:
        client.select("margin", budget=2, logits=TensorRef(uri=uri, **choice), timeout=20)
    return str(caught.value)


@pytest.fixture
def serving():
    with ExitStack() as stack:

        def begin(allow: str) -> Client:
            started = server.start(Settings(port=0, metrics_port=-1, allow_uris=allow))
            stack.callback(started.drain, 0.5)
            return stack.enter_context(Client(f"127.0.0.1:{started.port}", retries=0))

        yield begin


class TestFiles:
    @pytest.fixture
    def pools(self, tmp_path, serving):
        """A directory that is allowed, a secret beside it, and a client."""
        (tmp_path / "secret.npy").write_bytes(npy(SECRET))
        (tmp_path / "pools").mkdir()
        (tmp_path / "pools" / "x.npy").write_bytes(npy(SECRET))
        return tmp_path / "pools", serving(f"file://{tmp_path}/pools")

    def test_links(self, pools):
        """No link leads out, whatever it is part of, nor in."""
        pool, client = pools
        (pool / "link.npy").symlink_to(pool.parent / "secret.npy")
        (pool / "up").symlink_to(pool.parent)
        (pool / "near.npy").symlink_to("x.npy")
        (pool / "loop.npy").symlink_to("loop.npy")
        (pool / "root").symlink_to("/")
        for name in ("link.npy", "up/secret.npy", "up/pools/x.npy", "near.npy", "loop.npy", "root/etc/hostname"):
            assert "secret" not in refused(client, f"file://{pool}/{name}", queryselect.NotFound, format=1)
        assert len(client.select("margin", budget=2, logits=TensorRef(uri=f"file://{pool}/x.npy"))) == 2

    def test_the_directory_itself_may_be_a_link(self, pools, serving):
        """The operator named it."""
        pool, _ = pools
        (pool.parent / "today").symlink_to("pools")
        client = serving(f"file://{pool.parent}/today/")
        assert len(client.select("margin", budget=2, logits=TensorRef(uri=f"file://{pool.parent}/today/x.npy"))) == 2

    def test_a_link_that_comes_at_the_last_moment(self, pools):
        """A name that is a file and a link in turn: what is read is never what the link names."""
        pool, client = pools
        other = SECRET[::-1].copy()
        (pool.parent / "secret.npy").write_bytes(npy(np.concatenate([other, other])))
        stop = threading.Event()

        def swap() -> None:
            while not stop.is_set():
                (pool / "new").symlink_to(pool.parent / "secret.npy")
                (pool / "new").rename(pool / "swap.npy")
                (pool / "new").write_bytes(npy(SECRET))
                (pool / "new").rename(pool / "swap.npy")

        thread = threading.Thread(target=swap)
        thread.start()
        seen = 0
        try:
            for _ in range(150):
                try:
                    ref = TensorRef(uri=f"file://{pool}/swap.npy")
                    picks = client.select("margin", budget=2, logits=ref, return_pool_scores=True)
                    assert len(picks.pool_scores) == len(SECRET)
                    seen += 1
                except (queryselect.NotFound, queryselect.Aborted):
                    pass
        finally:
            stop.set()
            thread.join()
        assert seen

    def test_what_is_no_file(self, pools):
        pool, client = pools
        os.mkfifo(pool / "fifo.npy")
        (pool / "dir.npy").mkdir()
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(pool / "s.npy"))
            for name in ("fifo.npy", "dir.npy", "s.npy", "x.npy/y.npy", "none.npy", "y" * 300 + ".npy"):
                refused(client, f"file://{pool}/{name}", queryselect.NotFound)

    def test_what_the_servers_user_may_not_read(self, pools, monkeypatch):
        """Said by the system, which says it to no root: said for it here."""
        pool, client = pools
        opened = os.open

        def ours(path, *rest, **options):
            if path == "x.npy":
                raise PermissionError(13, "Permission denied", path)
            return opened(path, *rest, **options)

        monkeypatch.setattr(os, "open", ours)
        assert str(pool) not in refused(client, f"file://{pool}/x.npy")

    def test_devices(self, serving):
        """Even of a directory that an operator should not have named."""
        client = serving("file:///dev,file:///proc/self")
        for path in ("/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/root/etc/hostname"):
            refused(client, f"file://{path}", queryselect.NotFound, format=1)


class TestWeb:
    @pytest.fixture
    def stores(self, trusted, monkeypatch):
        """A store that may be read, and one that may not, both trusted."""
        monkeypatch.setattr(https, "TRIES", 1)
        good, evil = Store({"/pools/x.npy": npy(SECRET)}), Store({"/pools/x.npy": npy(SECRET)})
        stops = [good.start(trusted), evil.start(trusted)]
        yield good, evil
        for stop in stops:
            stop()

    @pytest.mark.parametrize("status", [300, 301, 302, 303, 305, 307, 308])
    @pytest.mark.parametrize(
        "target", ["https://localhost:{evil}/pools/x.npy", "/pools/y.npy", "//localhost:{evil}/", "file:///etc/passwd"]
    )
    def test_redirects(self, stores, serving, status, target):
        """None is followed, not even to where one might go by oneself."""
        good, evil = stores
        good.objects["/pools/y.npy"] = npy(SECRET)
        location = target.format(evil=evil.port)
        good.bend["/pools/x.npy"] = lambda *_: Answer(status, {"Location": location}, b"")
        words = refused(serving(f"https://localhost:{good.port}/pools"), f"https://localhost:{good.port}/pools/x.npy")
        assert "redirects are not followed" in words
        assert location not in words
        assert (len(good.asked), evil.asked) == (1, [])

    LIES = {
        "ignores the range": lambda answer: Answer(200, {}, npy(SECRET)),
        "sends another range": lambda answer: Answer(206, {"Content-Range": "bytes 5-20/1000"}, b"x" * 16),
        "sends a longer range": lambda answer: Answer(206, {"Content-Range": "bytes 0-99999999/100000000"}, b"x" * 999),
        "says no range": lambda answer: Answer(206, {}, answer.body),
        "says a range that is none": lambda answer: Answer(206, {"Content-Range": "bytes a-b/c"}, answer.body),
        "says a size without end": lambda answer: Answer(206, {"Content-Range": "bytes 0-1/*"}, b"xx"),
        "says a huge size": lambda answer: Answer(206, {"Content-Range": f"bytes 0-{'9' * 30}/{'9' * 31}"}, b"xx"),
        "sends too little": lambda answer: Answer(
            answer.status, {**answer.headers, "Content-Length": "9"}, answer.body[:9]
        ),
        "compresses": lambda answer: Answer(206, {**answer.headers, "Content-Encoding": "gzip"}, answer.body),
        "breaks off": lambda answer: Answer(206, {**answer.headers, "Content-Length": "288"}, answer.body[:50]),
        "answers with no content": lambda answer: Answer(204, {}, b""),
        "answers with an error": lambda answer: Answer(500, {}, b"secret"),
        "is a teapot": lambda answer: Answer(418, {}, b"secret"),
        "wants a password": lambda answer: Answer(401, {"WWW-Authenticate": "Basic"}, b""),
        "wants a proxy's password": lambda answer: Answer(407, {"Proxy-Authenticate": "Basic"}, b""),
        "sends a header without end": lambda answer: Answer(206, {"X": "y" * 100_000}, b""),
        "has headers without end": lambda answer: Answer(206, {f"X{at}": "y" for at in range(500)}, b""),
    }

    @pytest.mark.parametrize("lie", LIES)
    def test_lies(self, stores, serving, no_bugs, lie):
        good, _ = stores
        good.bend["/pools/x.npy"] = lambda answer, _: self.LIES[lie](answer)
        kinds = (queryselect.InvalidInput, queryselect.PermissionDenied, queryselect.Unavailable)
        client = serving(f"https://localhost:{good.port}/pools")
        assert "secret" not in refused(client, f"https://localhost:{good.port}/pools/x.npy", kinds)

    def test_more_than_was_asked_for(self, stores, serving):
        """What comes beyond the range is not read."""
        good, _ = stores
        good.bend["/pools/x.npy"] = lambda answer, _: Answer(206, answer.headers, answer.body + b"x" * 10_000_000)
        picks = serving(f"https://localhost:{good.port}").select(
            "margin", budget=2, logits=TensorRef(uri=f"https://localhost:{good.port}/pools/x.npy")
        )
        assert len(picks) == 2

    def test_the_environment_is_not_the_callers(self, stores, serving):
        """Another port of the same host is another host."""
        good, evil = stores
        client = serving(f"https://localhost:{good.port}")
        refused(client, f"https://localhost:{evil.port}/pools/x.npy")
        refused(client, f"https://127.0.0.1:{good.port}/pools/x.npy")
        assert good.asked == evil.asked == []

    def test_all_addresses_are_asked_before_any_is_opened(self, stores, serving):
        good, evil = stores
        client = serving(f"https://localhost:{good.port}")
        fine, other = (TensorRef(uri=f"https://localhost:{each.port}/pools/x.npy") for each in (good, evil))
        with pytest.raises(queryselect.PermissionDenied):
            client.select("expected_gradient_length", budget=2, logits=fine, embeddings=other)
        assert good.asked == evil.asked == []

    @pytest.mark.parametrize("status", [301, 302, 307, 308])
    def test_buckets_that_redirect(self, stores, serving, monkeypatch, status):
        """A store that speaks S3 and redirects: nothing is asked elsewhere, and no credentials go there."""
        _, evil = stores
        store = Store()
        stop = store.start()
        answer = Answer(status, {"Location": f"https://localhost:{evil.port}/pools/x.npy"}, b"")
        store.bend["/pools/x.npy"] = lambda *_: answer
        s3_environment(monkeypatch, f"http://127.0.0.1:{store.port}")
        try:
            refused(serving("s3://pools"), "s3://pools/x.npy")
        finally:
            stop()
            s3._client.cache_clear()
        assert evil.asked == []

    def test_credentials_stay_in_the_environment(self, stores, serving, monkeypatch, caplog):
        """Neither answers nor logs tell of them."""
        store = Store()
        stop = store.start()
        store.bend["/pools/x.npy"] = lambda *_: Answer(403, {}, b"<Error><Code>InvalidAccessKeyId</Code></Error>")
        s3_environment(monkeypatch, f"http://127.0.0.1:{store.port}")
        caplog.set_level("DEBUG", "queryselect_service")
        try:
            words = refused(serving("s3://pools"), "s3://pools/x.npy")
        finally:
            stop()
            s3._client.cache_clear()
        assert "secret-of-the-server" not in words + caplog.text
        assert "127.0.0.1" not in words


def begin_handshake(line: socket.socket) -> None:
    """The head of a record of TLS, and a byte of it now and then."""
    line.sendall(b"\x16\x03\x03\x40\x00")
    trickle(line)


def trickle(line) -> None:
    with suppress(OSError):
        while True:
            line.sendall(b"x")
            time.sleep(0.05)


def begin_headers(line) -> None:
    line.sendall(b"HTTP/1.1 206 Partial Content\r\nX: ")
    trickle(line)


def go_on(line) -> None:
    with suppress(OSError):
        while True:
            line.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(0.05)


class TestSilence:
    """Stores that go on and on and never come to the point."""

    @pytest.fixture
    def endless(self, trusted):
        """Starts a server that greets connections by `way`, within TLS or before it; its address."""
        lines = []
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def begin(way) -> str:
                def greet(line: socket.socket) -> None:
                    with suppress(OSError):
                        if way is not begin_handshake:
                            line = trusted.wrap_socket(line, server_side=True)
                            line.recv(65_536)
                        lines.append(line)
                        way(line)

                def listen() -> None:
                    with suppress(OSError):
                        while True:
                            threading.Thread(target=greet, args=(listening.accept()[0],), daemon=True).start()

                threading.Thread(target=listen, daemon=True).start()
                return f"https://localhost:{listening.getsockname()[1]}"

            yield begin
            listening.shutdown(socket.SHUT_RDWR)
        for each in lines:
            each.close()

    @pytest.mark.parametrize("way", [begin_handshake, begin_headers, go_on])
    def test_who_has_gone_keeps_no_thread(self, endless, serving, tmp_path, way):
        """And while they are there, other stores are read."""
        (tmp_path / "x.npy").write_bytes(npy(SECRET))
        store = endless(way)
        client = serving(f"{store},file://{tmp_path}")
        jobs = [
            client.submit("margin", 2, logits=TensorRef(uri=f"{store}/{number}.npy"), timeout=1.5)
            for number in range(fetch.THREADS + 4)
        ]
        assert until(lambda: len(watch.PATIENCE._waiting) == fetch.THREADS)
        assert len(client.select("margin", 2, logits=TensorRef(uri=f"file://{tmp_path}/x.npy"), timeout=1)) == 2
        for each in jobs:
            with pytest.raises(queryselect.DeadlineExceeded):
                each.result(10)
        assert until(lambda: not watch.PATIENCE._waiting, 3)

    def test_who_waits_is_told(self, endless, serving, monkeypatch):
        monkeypatch.setattr(https, "WHOLE", 0.4)
        store = endless(begin_headers)
        words = refused(serving(store), f"{store}/x.npy", queryselect.Unavailable)
        assert "its server did not answer within 0.4 s" in words

    @pytest.fixture
    def store(self, monkeypatch):
        """What stands in the place of S3."""
        store = Store()
        stop = store.start()
        s3_environment(monkeypatch, f"http://127.0.0.1:{store.port}")
        yield store
        stop()
        s3._client.cache_clear()

    def test_a_bucket(self, store, serving, monkeypatch):
        store.objects["/pools/x.npy"] = npy(np.zeros((10_000, 4), np.float32))
        store.bend["/pools/x.npy"] = lambda answer, _: setattr(answer, "pause", 0.1) or answer
        client, began = serving("s3://pools"), time.monotonic()
        with pytest.raises(queryselect.DeadlineExceeded):
            client.select("margin", 2, logits=TensorRef(uri="s3://pools/x.npy"), timeout=0.5)
        monkeypatch.setattr(https, "WHOLE", 0.5)
        assert "within 0.5 s" in refused(client, "s3://pools/x.npy", queryselect.Unavailable)
        assert time.monotonic() - began < 10

    BUCKETS = {
        "says no size": {"Content-Range": "bytes 0-287/*"},
        "says another range": {"Content-Range": "bytes 5-292/1000"},
        "says no range": {"Content-Range": ""},
        "tells no version": {"ETag": ""},
        "has a date that is none": {"Last-Modified": "yesterday"},
        "has a length that is none": {"Content-Length": "many"},
    }

    @pytest.mark.parametrize("told", BUCKETS.values(), ids=BUCKETS)
    def test_what_a_bucket_should_not_say(self, store, serving, told, no_bugs):
        store.objects["/pools/x.npy"] = npy(SECRET)
        store.bend["/pools/x.npy"] = lambda answer, _: answer.headers.update(told) or answer
        refused(serving("s3://pools"), "s3://pools/x.npy", (queryselect.InvalidInput, queryselect.Unavailable))


class TestObjects:
    """Files that a format's own reader would take, and that would take the server with it."""

    @pytest.fixture
    def select(self, tmp_path, serving):
        client = serving(f"file://{tmp_path}")

        def begin(name: str, data: bytes | None = None, kind=queryselect.InvalidInput, **choice):
            if data is not None:
                (tmp_path / name).write_bytes(data)
            return refused(client, f"file://{tmp_path}/{name}", kind, **choice)

        return begin

    def test_numbers_that_take_minutes_to_multiply(self, select, no_bugs):
        shape = ",".join(["9" * 600] * 5000)
        text = f'{{"x": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, 4]}}}}'.encode()
        began = time.process_time()
        assert "contradicts itself" in select("x.safetensors", len(text).to_bytes(8, "little") + text + b"1234")
        assert time.process_time() - began < 5, "it was 40 s"

    def test_a_name_that_is_no_text(self, select, no_bugs):
        text = b'{"secret-\\ud800": {}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
        text = text.replace(b"{}", b'{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}')
        assert "secret-?" in select("x.safetensors", len(text).to_bytes(8, "little") + text + b"1234")

    @pytest.mark.parametrize("kind", ["parquet", "arrow"])
    def test_a_first_row_without_end(self, select, tmp_path, kind, no_bugs):
        """Its length is asked for, and no Python object made of an entry."""
        most = 4_000_000
        stops = pa.array([0, most, 2 * most], pa.int32())
        lists = pa.ListArray.from_arrays(stops, pa.array(np.zeros(2 * most, np.float32)))
        table = pa.table({"x": lists})
        if kind == "parquet":
            pyarrow.parquet.write_table(table, tmp_path / "x.parquet", compression="zstd")
        else:
            pyarrow.feather.write_feather(table, tmp_path / "x.arrow", compression="zstd")
        tracemalloc.start()
        try:
            assert "classes: 4000000 is over" in select(f"x.{kind}", kind=queryselect.TooLarge)
            assert tracemalloc.get_traced_memory()[1] < 20e6, "entries as objects take 100 MB"
        finally:
            tracemalloc.stop()

    def test_a_footer_that_says_there_are_millions(self, select, no_bugs):
        """Of Parquet's: 41 bytes for which memory of gigabytes was taken."""
        root, leaf = b"\x48\x01s\x15\x02\x00", b"\x15\x08\x25\x00\x18\x01x\x00"
        many = b"\xfc\x80\x92\xf4\x01"  # a list of 4,000,000
        footer = b"\x15\x04\x19\x2c" + root + leaf + b"\x16\x00\x19\xfc\x01\x19" + many
        data = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
        assert "Exceeded size limit" in select("x.parquet", data)

    def test_a_footer_that_names_one_batch_a_thousand_times(self, select, no_bugs):
        """Each time it would be unpacked anew, for hours."""
        many, big, out = 1001, np.zeros(1_000_000, np.float32), io.BytesIO()
        schema = pa.schema([("x", pa.float32())])
        with pa.ipc.new_file(out, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as file:
            file.write(pa.record_batch([pa.array(big)], schema))
            for _ in range(many - 1):
                file.write(pa.record_batch([pa.array(big[:1])], schema))
        data = bytearray(out.getvalue())
        footer = data[len(data) - 10 - int.from_bytes(data[-10:-6], "little") : -10]
        at = footer.rfind(many.to_bytes(4, "little")) + 4
        places = [struct.unpack_from("<qiiq", footer, at + 24 * each) for each in range(many)]
        first = min(places)
        assert first[0] >= 8
        footer[at : at + 24 * many] = struct.pack("<qiiq", *first) * many
        size = len(footer).to_bytes(4, "little")
        hostile = bytes(data[: first[0] + first[1] + first[3]] + footer + size + b"ARROW1")
        assert "the same bytes again and again" in select("x.arrow", hostile)

    @pytest.mark.parametrize("nested", [False, True])
    def test_dictionaries_are_not_read(self, select, tmp_path, nested, no_bugs):
        """Arrow's reader takes all that there are, of every column, and keeps them."""
        column = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), pa.array(["a"]))
        column = pa.StructArray.from_arrays([column], ["inner"]) if nested else column
        table = pa.table({"x": pa.array(np.zeros(1, np.float32)), "kind": column})
        with pa.ipc.new_file(tmp_path / "x.arrow", table.schema) as file:
            file.write(table)
        assert "columns of categories" in select("x.arrow", column="x")

    def test_a_link_where_a_second_prefix_begins(self, tmp_path, serving):
        """Who may write below the first could make one of it."""
        pools, secret = tmp_path / "pools", tmp_path / "secret"
        pools.mkdir()
        secret.mkdir()
        (secret / "x.npy").write_bytes(npy(SECRET))
        (pools / "scratch").symlink_to(secret)
        client = serving(f"file://{pools},file://{pools}/scratch")
        assert "symbolic link" in refused(client, f"file://{pools}/scratch/x.npy", queryselect.NotFound)
