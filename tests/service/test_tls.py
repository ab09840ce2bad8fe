"""TLS: certificates that are replaced while requests travel, who is let in by mTLS, health in plain text."""

from __future__ import annotations

import itertools
import json
import socket
import ssl
import threading
import time
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.service.loopback import QUIETLY, process
from queryselect import Client, Unauthenticated, Unavailable, _tokens, cli
from queryselect.v1 import selection_pb2_grpc
from queryselect_service import server
from queryselect_service.settings import Settings
from tests.service.streams import Talk, cut, free, streamed, told_of
from tests.service.test_errors import FAR, request, tensor
from tests.waiting import until

LONG_AGO = datetime.now(UTC) - timedelta(days=1)


class Issued:
    """A CA of its own, and a certificate of it for this machine."""

    def __init__(self, **options) -> None:
        self.ca = trustme.CA()
        self.root = self.ca.cert_pem.bytes()
        self.chain, self.key = self.pair(**options)

    def pair(self, **options) -> tuple[bytes, bytes]:
        leaf = self.ca.issue_cert("127.0.0.1", "localhost", **options)
        return b"".join(each.bytes() for each in leaf.cert_chain_pems), leaf.private_key_pem.bytes()


@pytest.fixture(scope="module")
def issued():
    return [Issued() for _ in range(2)]


def write(folder: Path, pair: tuple[bytes, bytes]) -> None:
    for name, data in zip(("tls.crt", "tls.key"), pair, strict=True):
        (folder / name).write_bytes(data)


def paths(folder: Path) -> dict[str, str]:
    return {"tls_cert": str(folder / "tls.crt"), "tls_key": str(folder / "tls.key")}


@contextmanager
def serving(folder: Path, **options):
    own = server.start(Settings(port=0, metrics_port=-1, **paths(folder), **options))
    yield own
    own.drain(0.1)


def credentials(*roots: bytes, pair: tuple[bytes, bytes] = (None, None)) -> grpc.ChannelCredentials:
    chain, key = pair
    return grpc.ssl_channel_credentials(b"".join(roots), key, chain)


def channel_to(own, *roots: bytes, **options) -> grpc.Channel:
    alone = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.secure_channel(f"127.0.0.1:{own.port}", credentials(*roots, **options), alone)


def shown(own) -> bytes:
    """The certificate that a new connection is shown, as PEM."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", own.port), 10) as line, context.wrap_socket(line) as secured:
        return ssl.DER_cert_to_PEM_cert(secured.getpeercert(binary_form=True)).encode()


def works(own, *roots: bytes, **options) -> bool:
    with channel_to(own, *roots, **options) as channel:
        try:
            return selection_pb2_grpc.SelectionServiceStub(channel).Select(request(), timeout=10).HasField("indices")
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error
            return False


def one_by_one(folder: Path, pair: tuple[bytes, bytes]) -> None:
    """The certificate first, and a moment later its key."""
    for name, data in zip(("tls.crt", "tls.key"), pair, strict=True):
        new = folder / f"{name}.new"
        new.write_bytes(data)
        new.replace(folder / name)
        time.sleep(0.03)


def in_place(folder: Path, pair: tuple[bytes, bytes]) -> None:
    """In halves, as a slow writer would."""
    for name, data in zip(("tls.crt", "tls.key"), pair, strict=True):
        with (folder / name).open("wb", buffering=0) as file:
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                file.write(part)
                time.sleep(0.02)


def by_link(folder: Path, pair: tuple[bytes, bytes]) -> None:
    """As Kubernetes mounts secrets: tls.crt -> ..data/tls.crt, and ..data leads to another folder at once."""
    for number in itertools.count():
        data = folder / f"..{number}"
        if not data.exists():
            break
    data.mkdir()
    write(data, pair)
    (folder / "new").symlink_to(data.name)
    (folder / "new").replace(folder / "..data")
    for name in ("tls.crt", "tls.key"):
        if not (folder / name).is_symlink():
            (folder / "new").symlink_to(Path("..data") / name)
            (folder / "new").replace(folder / name)


class Traffic:
    """Threads that select all the while: one in one connection, one in a new connection for every request."""

    def __init__(self, own, roots: bytes) -> None:
        self._own, self._roots, self._stop = own, roots, threading.Event()
        self.answered, self.failed = 0, []
        self._threads = [threading.Thread(target=work) for work in (self._stay, self._come_anew)]

    def __enter__(self):
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for each in self._threads:
            each.join()

    def _select(self, channel) -> None:
        try:
            selection_pb2_grpc.SelectionServiceStub(channel).Select(request(), timeout=10)
            self.answered += 1
        except grpc.RpcError as error:
            self.failed.append(error)

    def _stay(self) -> None:
        with channel_to(self._own, self._roots) as channel:
            while not self._stop.is_set():
                self._select(channel)
                time.sleep(0.002)

    def _come_anew(self) -> None:
        while not self._stop.is_set():
            with channel_to(self._own, self._roots) as channel:
                self._select(channel)


def test_certificates_change_and_no_request_is_dropped(tmp_path, issued):
    """Six times, in three ways, while requests come in old and new connections and one stream is open throughout."""
    pairs = [issue.pair() for _ in range(3) for issue in issued]
    write(tmp_path, issued[0].pair())
    roots = b"".join(each.root for each in issued)
    x = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
    first, data = streamed(request(FAR, embeddings=tensor(x)))
    parts = cut("pool.embeddings", data["pool.embeddings"], 1000)
    with serving(tmp_path) as own, channel_to(own, roots) as channel, Talk(channel, first, timeout=60) as talk:
        talk.until("admitted")
        with Traffic(own, roots) as traffic:
            for pair, way in zip(pairs, 2 * [one_by_one, in_place, by_link], strict=True):
                before = traffic.answered
                way(tmp_path, pair)
                assert shown(own) in pair[0]
                talk.send(parts.pop(0))
                until(lambda goal=before + 10: traffic.answered >= goal, 10)
        talk.send(*parts)
        talk.end()
        assert talk.until("result").HasField("indices")
        assert traffic.failed == []
        assert traffic.answered > 60
        assert works(own, issued[1].root)
        assert not works(own, issued[0].root), "the last one is of the second CA"
        free(own)


FAULTS = {
    "a certificate without its key": lambda one, _: {"tls.crt": one.pair()[0]},
    "another's key": lambda _, two: {"tls.key": two.key},
    "half a certificate": lambda one, _: {"tls.crt": one.chain[:300]},
    "half a key": lambda one, _: {"tls.key": one.key[:100]},
    "an empty key": lambda *_: {"tls.key": b""},
    "bytes": lambda *_: {"tls.crt": b"\0\xff" * 100},
    "an encrypted key": lambda one, _: {"tls.key": encrypted(one.key)},
    "no file": lambda *_: {"tls.key": None},
}


def encrypted(key: bytes) -> bytes:
    loaded = serialization.load_pem_private_key(key, None)
    return loaded.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_pair_that_can_not_be_used_leaves_the_old_one_and_is_told_once(tmp_path, issued, fault, caplog):
    write(tmp_path, issued[0].pair())
    with serving(tmp_path) as own:
        before = shown(own)
        assert told_of(own, "current") == 1
        for name, data in fault(*issued).items():
            (tmp_path / name).unlink()
            if data is not None:
                (tmp_path / name).write_bytes(data)
        assert told_of(own, "current") == 0, "though nobody has connected since"
        for _ in range(3):
            assert shown(own) == before
        assert works(own, issued[0].root)
        (told,) = (each.message for each in caplog.records if each.name.endswith("reload"))
        assert told.startswith("certificate: the new one is not used: tls_")
        assert "PRIVATE" not in told
        with pytest.raises(ValueError, match="tls_"):
            server.start(Settings(port=0, metrics_port=-1, **paths(tmp_path)))
        pair = issued[1].pair()
        one_by_one(tmp_path, pair)
        assert shown(own) in pair[0]
        assert told_of(own, "current") == 1


def test_when_the_certificate_ends_is_told(tmp_path, issued):
    """Of one that goes on and of one that has ended; whoever looks need not connect."""
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).replace(microsecond=0)
    write(tmp_path, issued[0].pair(not_after=tomorrow))
    with serving(tmp_path) as own:
        assert told_of(own, "expiry_timestamp_seconds") == tomorrow.timestamp()
        one_by_one(
            tmp_path, issued[0].pair(not_before=LONG_AGO - timedelta(1), not_after=LONG_AGO.replace(microsecond=0))
        )
        assert told_of(own, "expiry_timestamp_seconds") == LONG_AGO.replace(microsecond=0).timestamp()
        one_by_one(tmp_path, one_of_its_own(tomorrow))
        assert told_of(own, "expiry_timestamp_seconds") == tomorrow.timestamp()


def one_of_its_own(ends: datetime) -> tuple[bytes, bytes]:
    """A certificate that no CA has signed, and its key, as openssl makes them."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, ends - timedelta(days=9), ends)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def test_mtls_lets_in_who_has_a_certificate_of_the_ca(tmp_path, issued):
    mine, other = issued
    write(tmp_path, mine.pair())
    (tmp_path / "ca.crt").write_bytes(mine.root)
    with serving(tmp_path, tls_client_ca=str(tmp_path / "ca.crt")) as own:
        assert works(own, mine.root, pair=mine.pair())
        assert not works(own, mine.root)
        assert not works(own, mine.root, pair=other.pair())
        assert not works(own, mine.root, pair=mine.pair(not_before=LONG_AGO - timedelta(days=9), not_after=LONG_AGO))
        new = tmp_path / "ca.new"
        new.write_bytes(other.root)
        new.replace(tmp_path / "ca.crt")
        assert works(own, mine.root, pair=other.pair()), "another CA may take its place"
        assert not works(own, mine.root, pair=mine.pair())
        new.write_bytes(b"-----BEGIN CERTIFICATE-----\nhalf")
        new.replace(tmp_path / "ca.crt")
        assert works(own, mine.root, pair=other.pair()), "and stays where what comes is none"
        assert not works(own, mine.root, pair=mine.pair())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_does_not_outlive_its_ca(tmp_path, issued, version):
    """Who was let in once is looked at again when the CA is another, though it has a ticket."""
    mine, other = issued
    write(tmp_path, mine.pair())
    (tmp_path / "ca.crt").write_bytes(mine.root)
    for name, data in zip(("client.crt", "client.key"), mine.pair(), strict=True):
        (tmp_path / name).write_bytes(data)
    context = ssl.create_default_context(cadata=mine.root.decode())
    context.load_cert_chain(tmp_path / "client.crt", tmp_path / "client.key")
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])

    def visit(session=None):
        """A connection that is greeted; whether by its ticket, and its new one."""
        with (
            socket.create_connection(("127.0.0.1", own.port), 10) as line,
            context.wrap_socket(line, server_hostname="127.0.0.1", session=session) as secured,
        ):
            secured.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            assert secured.recv(9)[3:4] == b"\4", "HTTP/2's settings"
            return secured.session_reused, secured.session

    with serving(tmp_path, tls_client_ca=str(tmp_path / "ca.crt")) as own:
        reused, session = visit()
        assert not reused
        assert visit(session)[0], "as long as nothing changes"
        (tmp_path / "ca.new").write_bytes(other.root)
        (tmp_path / "ca.new").replace(tmp_path / "ca.crt")
        with pytest.raises((OSError, AssertionError)):
            visit(session)


def test_a_server_of_its_own_says_nothing_secret(tmp_path, issued):
    """All settings by the environment, everything logged, good tokens and bad ones."""
    write(tmp_path, issued[0].pair())
    token, salt, hashed = _tokens.make("studio")
    (tmp_path / "tokens.toml").write_text(
        f'[[tokens]]\nname = "studio"\nsalt = "{salt.hex()}"\nhash = "{hashed.hex()}"\n'
    )
    told = {**paths(tmp_path), "token_file": str(tmp_path / "tokens.toml"), "health_port": "0", "log_level": "DEBUG"}
    with pytest.MonkeyPatch.context() as patch, (tmp_path / "log").open("w") as log:
        for name, value in told.items():
            patch.setenv(f"QUERYSELECT_{name.upper()}", value)
        with process("-m", "queryselect_service", *QUIETLY[:4], errors=log) as (_, (port, metrics, plain)):
            assert health(f"127.0.0.1:{plain}") == 0
            tls = credentials(issued[0].root)
            with Client(f"localhost:{port}", tls=tls, token=token) as client:
                assert len(client.select("random", 2, num_rows=5)) == 2
            for bad in (token[:-1] + "x", f"qs_studio_{hashed.hex()}"):
                with Client(f"localhost:{port}", tls=tls, token=bad) as client, pytest.raises(Unauthenticated):
                    client.select("random", 2, num_rows=5)
            with Client(f"localhost:{port}", retries=0) as client, pytest.raises(Unavailable):
                client.select("random", 2, num_rows=5)  # no handshake
            with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics") as page:
                shown = page.read().decode()
    written = (tmp_path / "log").read_text()
    assert str(tmp_path / "tokens.toml") in written, "the settings"
    assert "UNAUTHENTICATED" in written
    lines = [json.loads(line) for line in written.splitlines()]
    (serves,) = (each for each in lines if each["message"] == "serving")
    assert (serves["port"], serves["metrics_port"], serves["health_port"]) == (port, metrics, plain)
    for secret in (token.rpartition("_")[2][:-1], salt.hex(), hashed.hex(), "PRIVATE KEY"):
        assert secret not in written + shown


def test_the_client_speaks_tls(tmp_path, issued):
    write(tmp_path, issued[0].pair())
    with serving(tmp_path) as own:
        target = f"localhost:{own.port}"
        with Client(target, tls=credentials(issued[0].root)) as client:
            assert len(client.select("random", 2, num_rows=5)) == 2
            large = np.random.default_rng(0).normal(size=(300_000, 4))
            assert len(client.select("k_center_greedy", 2, embeddings=large)) == 2, "a stream"
        with Client(target, tls=credentials(issued[1].root), retries=0) as client, pytest.raises(Unavailable):
            client.select("random", 2, num_rows=5)
        with Client(target, retries=0) as client, pytest.raises(Unavailable):
            client.select("random", 2, num_rows=5)


def health(*arguments: str) -> int:
    return cli.main(["health", "--timeout", "5", *arguments])


def test_the_health_command_speaks_tls(tmp_path, issued, capsys):
    mine, other = issued
    write(tmp_path, mine.pair())
    (tmp_path / "ca.crt").write_bytes(mine.root)
    (tmp_path / "other.crt").write_bytes(other.root)
    own_ca, other_ca = str(tmp_path / "ca.crt"), str(tmp_path / "other.crt")
    with serving(tmp_path, tls_client_ca=own_ca) as own:
        target, pair = (
            f"127.0.0.1:{own.port}",
            ["--cert", str(tmp_path / "tls.crt"), "--key", str(tmp_path / "tls.key")],
        )
        assert health(target, "--ca", own_ca, *pair) == 0
        assert capsys.readouterr().out == "SERVING\n"
        assert health(target, "--ca", own_ca, *pair, "--server-name", "localhost") == 0
        assert health(target, "--ca", own_ca, *pair, "--server-name", "example.org") == 2
        assert health(target, "--ca", own_ca) == 2
        assert health(target, "--ca", other_ca, *pair) == 2
        assert health(target, "--tls", *pair) == 2
        assert health(target) == 2
    capsys.readouterr()
    for wrong in (["--cert", own_ca], ["--key", own_ca], ["--ca", str(tmp_path / "none")]):
        with pytest.raises(SystemExit) as ended:
            health("localhost:1", *wrong)
        assert ended.value.code == 2
        assert "queryselect health: error: " in capsys.readouterr().err


def test_health_may_have_a_port_of_its_own_and_nothing_else_there(tmp_path, issued):
    """As for probes that speak no TLS and have no token."""
    write(tmp_path, issued[0].pair())
    with serving(tmp_path, health_port=0) as own:
        assert health(f"127.0.0.1:{own.health_port}") == 0
        assert health(f"127.0.0.1:{own.health_port}", "--service", "") == 0
        with grpc.insecure_channel(f"127.0.0.1:{own.health_port}") as plain:
            with pytest.raises(grpc.RpcError) as caught:
                selection_pb2_grpc.SelectionServiceStub(plain).Select(request())
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            watch = health_pb2_grpc.HealthStub(plain).Watch(
                health_pb2.HealthCheckRequest(service="queryselect.v1.SelectionService")
            )
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            own.health.enter_graceful_shutdown()
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_connection_that_says_nothing_is_closed(tmp_path, issued, monkeypatch):
    monkeypatch.setattr(server, "HANDSHAKE_MS", 300)
    write(tmp_path, issued[0].pair())
    with serving(tmp_path) as own, socket.create_connection(("127.0.0.1", own.port), 10) as line:
        assert line.recv(1) == b""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tls_cert": "a"}, "tls_cert and tls_key need each other; only one is set"),
        ({"tls_key": "a"}, "tls_cert and tls_key need each other; only one is set"),
        ({"tls_client_ca": "a"}, "tls_client_ca needs tls_cert and tls_key; they are not set"),
    ],
)
def test_settings_that_contradict_each_other_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Settings(**options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tls.crt": None}, "tls_cert {}/tls.crt: No such file"),
        ({"tls.crt": b"x"}, "tls_cert {0}/tls.crt and tls_key {0}/tls.key: no PEM that can be used"),
        ({"tls.key": "other"}, "tls_cert {0}/tls.crt and tls_key {0}/tls.key: the key is not the certificate's"),
        ({"tls.key": "encrypted"}, "the key is encrypted; it must not be"),
        ({"ca.crt": None}, "tls_client_ca {}/ca.crt: No such file"),
        ({"ca.crt": b""}, "tls_client_ca {}/ca.crt: no PEM that can be used"),
    ],
)
def test_a_server_whose_files_can_not_be_used_does_not_start_and_says_why(tmp_path, issued, change, words):
    write(tmp_path, (issued[0].chain, issued[0].key))
    (tmp_path / "ca.crt").write_bytes(issued[0].root)
    for name, given in change.items():
        (tmp_path / name).unlink()
        data = {"other": issued[1].key, "encrypted": encrypted(issued[0].key)}.get(given, given)
        if data is not None:
            (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError) as caught:
        server.start(Settings(port=0, metrics_port=-1, tls_client_ca=str(tmp_path / "ca.crt"), **paths(tmp_path)))
    assert words.format(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
