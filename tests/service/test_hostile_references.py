"""Addresses, paths and answers that try to get out of what the operator allowed. None may."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from contextlib import ExitStack

import numpy as np
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

import queryselect
from queryselect import Client, TensorRef
from queryselect_service import server
from queryselect_service.settings import Settings
from queryselect_service.sources import https, s3
from queryselect_service.sources.address import Allowed, parse
from tests.service.stores import Answer, Store, npy
from tests.service.test_sources import s3_environment

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
    def stores(self, monkeypatch, tmp_path):
        """A store that may be read, and one that may not, both trusted."""
        authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        monkeypatch.setattr(https, "TRIES", 1)
        https._direct.cache_clear()
        good, evil = Store({"/pools/x.npy": npy(SECRET)}), Store({"/pools/x.npy": npy(SECRET)})
        stops = [good.start(context), evil.start(context)]
        yield good, evil
        for stop in stops:
            stop()
        https._direct.cache_clear()

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
