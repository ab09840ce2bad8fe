"""Bearer tokens: who may call what, what a token may have, what hostile headers get, and what stands in no log."""

from __future__ import annotations

import hmac
import logging
import threading
import time
import tomllib
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from queryselect import Client, TooLarge, Unauthenticated, _tokens, cli
from queryselect.v1 import selection_pb2_grpc, server_pb2, server_pb2_grpc, strategy_pb2, strategy_pb2_grpc
from queryselect_service import auth, server
from queryselect_service.settings import Settings, load
from tests.service import http2
from tests.service.streams import Talk, ask, counted, free, start, streamed, told_of, whole
from tests.service.test_errors import FAR, at_work, busy, detail, request, sleepy, tensor
from tests.waiting import until

STUDIO, LAB = (_tokens.make(name) for name in ("studio", "lab"))
TOKEN = STUDIO[0]
SECRET = TOKEN.rpartition("_")[2]
INFO = "/queryselect.v1.ServerService/GetServerInfo"


def stanza(made=STUDIO, **more) -> str:
    token, salt, hashed = made
    entries = {"name": token.split("_")[1], "salt": salt.hex(), "hash": hashed.hex(), **more}
    texts = (
        f"{key} = {value.isoformat() if isinstance(value, datetime) else repr(value)}" for key, value in entries.items()
    )
    return "\n".join(("[[tokens]]", *texts, ""))


def bearer(token: str = TOKEN):
    return (("authorization", f"Bearer {token}"),)


def put(path, text: str) -> None:
    """As a file should be replaced: at once."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A token file that is looked at for every call."""
    monkeypatch.setattr(auth, "LOOK_EVERY", 0.0)
    path = tmp_path / "tokens.toml"
    path.write_text(stanza())
    return path


@pytest.fixture
def guarded(serve, file):
    """A server that wants a token, its channel, and its file."""
    return *serve(token_file=str(file)), file


def refusal(call) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED, error
    return error


def calls(channel):
    """Every RPC that needs a token, as a function of metadata."""
    selection = selection_pb2_grpc.SelectionServiceStub(channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    return {
        "Select": lambda metadata: selection.Select(request(), metadata=metadata),
        "SelectStream": lambda metadata: list(selection.SelectStream(iter(whole(request())), metadata=metadata)),
        "ListStrategies": lambda metadata: strategy_pb2_grpc.StrategyServiceStub(channel).ListStrategies(
            strategy_pb2.ListStrategiesRequest(), metadata=metadata
        ),
        "GetServerInfo": lambda metadata: server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(
            server_pb2.GetServerInfoRequest(), metadata=metadata
        ),
        "reflection": lambda metadata: list(
            reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([question]), metadata=metadata)
        ),
    }


# Who may call what


@pytest.mark.parametrize("rpc", calls(grpc.insecure_channel("127.0.0.1:1")))
def test_every_rpc_needs_a_token(guarded, rpc):
    own, channel, _ = guarded
    call = calls(channel)[rpc]
    error = refusal(lambda: call(None))
    assert error.details() == auth.NEEDED
    assert detail(rpc_status.from_call(error), error_details_pb2.ErrorInfo).reason == "UNAUTHENTICATED"
    refusal(lambda: call(bearer(LAB[0])))
    assert call(bearer())
    free(own)


def test_health_is_open(guarded):
    _, channel, _ = guarded
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "queryselect.v1.SelectionService"):
        assert stub.Check(health_pb2.HealthCheckRequest(service=service)).status == 1
        assert next(stub.Watch(health_pb2.HealthCheckRequest(service=service))).status == 1


def test_reflection_can_be_switched_off(serve):
    _, channel = serve(reflection=False)
    with pytest.raises(grpc.RpcError) as caught:
        calls(channel)["reflection"](None)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_client_sends_its_token_and_is_told_once_where_it_is_none(guarded):
    own, _, _ = guarded
    target = f"127.0.0.1:{own.port}"
    with Client(target, token=TOKEN) as client:
        assert len(client.select("random", 2, num_rows=5)) == 2
        assert client.strategies()
        assert client.server_info().version
    for token in (None, LAB[0]):
        before = own.frontend.metrics.requests.labels("Select", "", "UNAUTHENTICATED")._value.get()
        with Client(target, token=token) as client:
            with pytest.raises(Unauthenticated, match="queryselect token") as caught:
                client.select("random", 2, num_rows=5)
            assert not caught.value.retryable
        assert own.frontend.metrics.requests.labels("Select", "", "UNAUTHENTICATED")._value.get() == before + 1


# What hostile headers get

HOSTILE = {
    "nothing": [],
    "empty": [("authorization", "")],
    "the token alone": [("authorization", TOKEN)],
    "the scheme alone": [("authorization", "Bearer")],
    "the scheme and a space": [("authorization", "Bearer ")],
    "Basic": [("authorization", f"Basic {TOKEN}")],
    "Bearer twice": [("authorization", f"Bearer Bearer {TOKEN}")],
    "two spaces": [("authorization", f"Bearer  {TOKEN}")],
    "no space": [("authorization", f"Bearer{TOKEN}")],
    "a list": [("authorization", f"Bearer {TOKEN}, Bearer {TOKEN}")],
    "quoted": [("authorization", f'Bearer "{TOKEN}"')],
    "parameters": [("authorization", f"Bearer {TOKEN}; admin=true")],
    "two headers": [*bearer(), *bearer()],
    "a good one after a bad one": [*bearer(LAB[0]), *bearer()],
    "a good one before a bad one": [*bearer(), *bearer(LAB[0])],
    "another's token": [*bearer(LAB[0])],
    "another's name": [*bearer(f"qs_lab_{SECRET}")],
    "the secret alone": [*bearer(SECRET)],
    "upper case": [*bearer(TOKEN.upper())],
    "an upper-case secret": [*bearer(f"qs_studio_{SECRET.upper()}")],
    "one digit less": [*bearer(TOKEN[:-1])],
    "one digit more": [*bearer(TOKEN + "0")],
    "a path for a name": [*bearer(f"qs_../../etc/passwd_{SECRET}")],
    "a name with a wild card": [*bearer(f"qs_*_{SECRET}")],
    "no name": [*bearer(f"qs__{SECRET}")],
    "the name of nobody": [*bearer("qs_nobody_" + "0" * 64)],
    "no name and no secret": [*bearer("qs__" + "0" * 64)],
    "the hash": [*bearer(f"qs_studio_{STUDIO[2].hex()}")],
    "percent-encoded": [*bearer(TOKEN.replace("_", "%5F"))],
    "7 KB": [("authorization", "Bearer " + "x" * 7000)],
    "7 KB that begin well": [*bearer(TOKEN + "0" * 7000)],
    "in binary": [("authorization-bin", f"Bearer {TOKEN}".encode())],
    "by another name": [("x-authorization", f"Bearer {TOKEN}"), ("proxy-authorization", f"Bearer {TOKEN}")],
    "in a cookie": [("cookie", f"authorization=Bearer {TOKEN}"), ("x-api-key", TOKEN)],
    "an id that is none": [("x-request-id", "x" * 200)],
    "an id that is a token": [("x-request-id", TOKEN)],
}
#: What gRPC's own client would not send.
RAW = {
    "a line feed": [(b"authorization", f"Bearer {TOKEN}\n".encode())],
    "a line feed before": [(b"authorization", f"\nBearer {TOKEN}".encode())],
    "NUL": [(b"authorization", f"Bearer {TOKEN}\0".encode())],
    "NUL in between": [(b"authorization", f"Bearer\0{TOKEN}".encode())],
    "a tab": [(b"authorization", f"Bearer\t{TOKEN}".encode())],
    "a header in a header": [(b"x-request-id", f"1\r\nauthorization: Bearer {TOKEN}".encode())],
    "no ASCII": [(b"authorization", f"Bearer {TOKEN}é".encode())],
    "no UTF-8": [(b"authorization", b"Bearer \xff\xfe" + TOKEN.encode())],
    "wide digits": [(b"authorization", f"Bearer qs_studio_{SECRET[:-1]}１".encode())],
    "upper-case key": [(b"Authorization", f"Bearer {TOKEN}".encode())],
    "a header twice, apart": [
        (b"authorization", f"Bearer {TOKEN}".encode()), (b"a", b"b"), (b"authorization", f"Bearer {TOKEN}".encode())
    ],
    "an id of many lines": [(b"x-request-id", b"1\r\n2\r\n")],
    "binary that is none": [(b"authorization-bin", b"\xff\xff")],
    "16 KB": [(b"authorization", b"Bearer " + b"x" * 16_000)],
}  # fmt: skip


def outcomes(own, rpc: str) -> dict[str, float]:
    """How often calls of a method ended how."""
    (metric,) = own.frontend.metrics.requests.collect()
    found: dict[str, float] = {}
    for each in metric.samples:
        if each.name.endswith("_total") and each.labels["rpc"] == rpc:
            found[each.labels["code"]] = found.get(each.labels["code"], 0) + each.value
    return found


@pytest.fixture(scope="module")
def fortress(tmp_path_factory):
    """One server for all hostile headers."""
    file = tmp_path_factory.mktemp("auth") / "tokens.toml"
    file.write_text(stanza())
    own = server.start(Settings(port=0, metrics_port=-1, token_file=str(file)))
    with grpc.insecure_channel(f"127.0.0.1:{own.port}") as channel:
        yield own, channel
    own.drain(0.1)


@pytest.mark.parametrize("metadata", HOSTILE.values(), ids=HOSTILE)
def test_no_hostile_header_gets_through(fortress, metadata, caplog):
    own, channel = fortress
    caplog.set_level(logging.DEBUG)
    for call in calls(channel).values():
        error = refusal(lambda call=call: call(metadata))
        told = f"{error.details()} {error.trailing_metadata()}"
        assert SECRET not in told
        assert "xxx" not in told
    assert SECRET not in caplog.text
    assert own.frontend._running == 0


@pytest.mark.parametrize("headers", RAW.values(), ids=RAW)
def test_no_header_that_grpc_would_not_send_gets_through(fortress, headers, caplog):
    own, _ = fortress
    caplog.set_level(logging.DEBUG)
    good = (b"authorization", f"Bearer {TOKEN}".encode())
    before = outcomes(own, "GetServerInfo")
    http2.send(own.port, INFO, *headers)
    now = outcomes(own, "GetServerInfo")
    assert {code for code in now if now[code] != before.get(code, 0)} <= {"UNAUTHENTICATED"}
    assert http2.send(own.port, INFO, good) == http2.HEADERS
    assert outcomes(own, "GetServerInfo")["OK"] == before.get("OK", 0) + 1, "and a good one does"
    assert SECRET not in caplog.text


@pytest.mark.parametrize("request_id", ["x" * 129, "x" * 7000])
def test_a_bad_id_is_told_to_those_who_may_call(fortress, request_id):
    _, channel = fortress
    with pytest.raises(grpc.RpcError) as caught:
        calls(channel)["Select"]((*bearer(), ("x-request-id", request_id)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_scheme_has_any_case(fortress, scheme):
    _, channel = fortress
    assert calls(channel)["GetServerInfo"]((("authorization", f"{scheme} {TOKEN}"),))


@pytest.mark.parametrize("rpc", ["Select", "SelectStream", "ListStrategies", "GetServerInfo"])
def test_who_has_no_token_is_refused_before_its_message_comes(fortress, rpc):
    own, _ = fortress
    service = {"ListStrategies": "Strategy", "GetServerInfo": "Server"}.get(rpc, "Selection")
    before = outcomes(own, rpc).get("UNAUTHENTICATED", 0)
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(http2.begin(own.port, f"/queryselect.v1.{service}Service/{rpc}"))
        assert until(lambda: outcomes(own, rpc).get("UNAUTHENTICATED", 0) >= before + 50, 10)


# What a bad token costs


def test_a_bad_token_costs_one_hash_and_one_comparison_whatever_is_bad(file, monkeypatch):
    file.write_text(stanza() + "".join(stanza(_tokens.make(f"team-{number}")) for number in range(50)))
    tokens, worked = auth.Tokens(file), []
    real, compare = _tokens.digest, hmac.compare_digest

    def digest(secret, salt):
        worked.append(("hash", len(secret), len(salt)))
        return real(secret, salt)

    def compared(one, two):
        worked.append(("compare", len(one), len(two)))
        return compare(one, two)

    monkeypatch.setattr(_tokens, "digest", digest)
    monkeypatch.setattr(hmac, "compare_digest", compared)
    bad = [*HOSTILE.values(), [*bearer(f"qs_studio_{'f' * 64}")], [*bearer(SECRET.join(["qs_studio_", ""])[:-1] + "g")]]
    for metadata in bad:
        worked.clear()
        with pytest.raises(auth.Unauthenticated):
            tokens.caller(metadata)
        assert worked == [("hash", 64, 16), ("compare", 32, 32)]
    worked.clear()
    assert tokens.caller(bearer()).name == "studio"
    assert worked == [("hash", 64, 16), ("compare", 32, 32)]


# The file changes


def test_tokens_come_and_go_while_the_server_serves(guarded):
    own, channel, file = guarded
    call = calls(channel)["GetServerInfo"]
    refusal(lambda: call(bearer(LAB[0])))
    put(file, stanza(STUDIO) + stanza(LAB))
    assert call(bearer())
    assert call(bearer(LAB[0]))
    put(file, stanza(LAB))
    refusal(lambda: call(bearer()))
    assert call(bearer(LAB[0]))
    fresh = _tokens.make("lab")
    put(file, stanza(fresh))
    refusal(lambda: call(bearer(LAB[0])))
    assert call(bearer(fresh[0]))
    free(own)


BROKEN = {
    "empty": ("", "needs one or more"),
    "half a file": (stanza()[:40], "token_file"),
    "no TOML": (f"{SECRET} {STUDIO[2].hex()}", "token_file"),
    "another table": (stanza() + "[other]\n", "and nothing else"),
    "no table": ('tokens = ["x"]', "needs one or more"),
    "no name": (stanza().replace("name", "nom"), "there is no key nom"),
    "a bad name": (stanza().replace("studio", "../x"), "name needs"),
    "no salt": (stanza().replace("salt", "#"), "salt needs 32 hexadecimal digits"),
    "a bad hash": (stanza().replace(STUDIO[2].hex(), SECRET[:-1] + "g"), "hash needs 64 hexadecimal digits"),
    "a bad limit": (stanza(max_rows=0), "max_rows needs a whole number"),
    "a truth for a limit": (stanza() + "max_bytes = true\n", "max_bytes needs a whole number"),
    "a date without an offset": (stanza() + "expires = 2030-01-01T00:00:00\n", "expires needs"),
    "one name twice": (stanza() + stanza(), "two tokens studio"),
}


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_keeps_the_tokens_and_is_told_once(guarded, text, words, caplog):
    _, channel, file = guarded
    put(file, text)
    call = calls(channel)["GetServerInfo"]
    for _ in range(3):
        assert call(bearer())
        refusal(lambda: call(bearer(LAB[0])))
    (told,) = (each.message for each in caplog.records if each.name.endswith("reload"))
    assert words in told
    assert not any(each in told for each in (SECRET[:-1], STUDIO[1].hex(), STUDIO[2].hex()))
    with pytest.raises(ValueError, match="token_file"):
        server.start(Settings(port=0, metrics_port=-1, token_file=str(file)))


def test_a_file_that_is_gone_keeps_the_tokens_and_is_told(guarded, caplog):
    own, channel, file = guarded
    assert told_of(own, "current", "token_file") == 1
    assert told_of(own, "current", "certificate") is None
    file.unlink()
    assert calls(channel)["GetServerInfo"](bearer())
    assert "No such file" in caplog.text
    assert told_of(own, "current", "token_file") == 0
    put(file, stanza(LAB))
    assert told_of(own, "current", "token_file") == 1
    refusal(lambda: calls(channel)["GetServerInfo"](bearer()))


def test_the_file_is_looked_at_once_a_second(tmp_path):
    path = tmp_path / "tokens.toml"
    path.write_text(stanza())
    tokens = auth.Tokens(path)
    put(path, stanza(LAB))
    assert tokens.caller(bearer()).name == "studio"

    def known() -> bool:
        try:
            return tokens.caller(bearer(LAB[0])).name == "lab"
        except auth.Unauthenticated:
            return False

    assert until(known)


def test_a_token_may_end(guarded, caplog):
    caplog.set_level(logging.INFO, "queryselect_service")
    _, channel, file = guarded
    call, now = calls(channel)["GetServerInfo"], datetime.now(UTC)
    put(file, stanza(expires=now + timedelta(hours=1)))
    assert call(bearer())
    put(file, stanza(expires=now - timedelta(seconds=1)))
    caplog.clear()
    error = refusal(lambda: call(bearer()))
    assert "has expired" in error.details()
    assert detail(rpc_status.from_call(error), error_details_pb2.ErrorInfo).reason == "TOKEN_EXPIRED"
    (line,) = (each for each in caplog.records if each.name.endswith("servicer"))
    assert line.fields["peer"] == "studio", "whoever is to make another sees whose"
    assert refusal(lambda: call(bearer(f"qs_studio_{'0' * 64}"))).details() == auth.NEEDED, "only its owner is told"


# What a token may have


def over(call, setting: str, limit: int) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE, caught.value
    metadata = detail(rpc_status.from_call(caught.value), error_details_pb2.ErrorInfo).metadata
    assert (metadata["setting"], metadata["limit"]) == (setting, str(limit))
    assert f"over this token's limit of {limit} ({setting})" in caught.value.details()


def test_rows_of_references_count_too(file):
    own = server.start(Settings(port=0, metrics_port=-1, token_file=str(file), max_rows=12))
    file.write_text(stanza(max_rows=9))

    def samples(rows: int):
        return np.random.default_rng(0).dirichlet([1] * 3, (rows, 4))

    def select(rows: int):
        return client.select("epig", 1, samples=samples(9), references=[{"role": "TARGET", "samples": samples(rows)}])

    with Client(f"127.0.0.1:{own.port}", token=TOKEN) as client:
        assert len(select(9)) == 1
        with pytest.raises(TooLarge, match="rows: 10 is over this token's limit of 9"):
            select(10)
        with pytest.raises(TooLarge, match="rows of references: 13 is over this server's limit of 12"):
            select(13)
    own.drain(0.1)


def test_rows_of_a_token(guarded):
    own, channel, file = guarded
    put(file, stanza(max_rows=9) + stanza(LAB, max_rows=10))
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    over(lambda: stub.Select(request(), metadata=bearer()), "max_rows", 9)
    over(lambda: stub.Select(request(validate_only=True), metadata=bearer()), "max_rows", 9)
    over(lambda: ask(channel, whole(request())[:1], metadata=bearer()), "max_rows", 9)
    assert counted(own, "OUT_OF_RANGE") == 1, "before its bytes travel"
    assert ask(channel, whole(request()), metadata=bearer(LAB[0])).response.HasField("indices")
    assert stub.Select(request(), metadata=bearer(LAB[0])).HasField("indices")
    free(own)


def test_bytes_of_a_token(guarded):
    own, channel, file = guarded
    message = request(FAR, embeddings=tensor(np.eye(300, dtype=np.float32)))
    first, _ = streamed(message)
    with Talk(channel, first, metadata=bearer()) as talk:
        reserved = talk.until("admitted").reserved_bytes
    put(file, stanza(max_bytes=reserved - 1) + stanza(LAB, max_bytes=reserved))
    over(lambda: ask(channel, [first], metadata=bearer()), "max_bytes", reserved - 1)
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    over(lambda: stub.Select(message, metadata=bearer()), "max_bytes", reserved - 1)
    assert ask(channel, whole(message), metadata=bearer(LAB[0])).response.HasField("indices")
    assert stub.Select(request(), metadata=bearer()).HasField("indices")
    free(own)


def test_limits_are_told_as_they_hold_for_whoever_asks(guarded):
    own, _, file = guarded
    put(file, stanza(max_rows=9, max_bytes=10**15, max_in_flight=2) + stanza(LAB))
    limits = {}
    for name, token in (("studio", TOKEN), ("lab", LAB[0])):
        with Client(f"127.0.0.1:{own.port}", token=token) as client:
            limits[name] = client.server_info().limits
    assert (limits["studio"].rows, limits["studio"].in_flight) == (9, 2)
    assert (limits["lab"].rows, limits["lab"].HasField("in_flight")) == (own.frontend.service.settings.max_rows, False)
    assert limits["studio"].host_bytes == limits["lab"].host_bytes, "the lower one holds"


def test_selections_of_a_token_at_a_time(guarded):
    own, channel, file = guarded
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    with Talk(channel, start(request(FAR)), metadata=bearer()), Talk(channel, metadata=bearer()):
        assert until(lambda: own.frontend._selecting.taken >= 2)
        put(file, stanza(max_in_flight=2) + stanza(LAB))  # a new limit counts what was open before it
        busy(lambda: stub.Select(request(), metadata=bearer()), "this client has 2 selections open already")
        busy(lambda: ask(channel, whole(request()), metadata=bearer()), "selections open")
        assert stub.Select(request(), metadata=bearer(LAB[0])).HasField("indices")
        assert calls(channel)["GetServerInfo"](bearer())
    free(own)
    assert stub.Select(request(), metadata=bearer()).HasField("indices")


def test_a_token_is_one_peer_however_many_connections_have_it(serve, file):
    """What it has waiting in one makes room for another token, and not for itself in another connection."""
    put(file, stanza(STUDIO) + stanza(LAB))
    own, channel = serve(max_queue=1, token_file=str(file))
    options = [("grpc.use_local_subchannel_pool", 1)]
    with ExitStack() as stack:
        many = [selection_pb2_grpc.SelectionServiceStub(channel)]
        for _ in range(2):
            another = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{own.port}", options))
            many.append(selection_pb2_grpc.SelectionServiceStub(another))

        class Mine:
            Select = staticmethod(lambda message: None)

        Mine.Select.future = lambda message: many[0].Select.future(message, metadata=bearer())
        running = at_work(Mine, 1.0)
        waits = many[1].Select.future(sleepy(seconds=0.01), metadata=bearer())
        assert until(lambda: own.frontend.service.engine.host.taken >= 2)
        busy(lambda: many[2].Select(request(), metadata=bearer()), "requests are waiting")
        assert many[2].Select(request(), metadata=bearer(LAB[0])).HasField("indices")
        busy(waits.result, "another client")
        running.cancel()
    free(own)


def test_many_callers_and_a_file_that_changes(guarded):
    """Four threads with a token that stays, while another comes, goes and the file breaks: none is refused."""
    own, channel, file = guarded
    stop, failed = threading.Event(), []
    call = calls(channel)["GetServerInfo"]

    def work():
        while not stop.is_set():
            try:
                call(bearer())
            except grpc.RpcError as error:
                failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for number in range(60):
        put(file, (stanza(), stanza(LAB) + stanza(), "half")[number % 3])
        time.sleep(0.005)
    stop.set()
    for each in threads:
        each.join()
    assert failed == []
    assert outcomes(own, "GetServerInfo")["OK"] > 50


# The command that makes tokens, and the settings


def test_a_token_that_the_command_makes_is_served(guarded, capsys):
    _, channel, file = guarded
    arguments = [
        "token",
        "night-shift",
        "--max-rows",
        "5",
        "--max-bytes",
        "1000000",
        "--max-in-flight",
        "1",
        "--days",
        "2",
    ]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    (entry,) = tomllib.loads(out)["tokens"]
    token = err.split()[-1]
    assert token.startswith("qs_night-shift_")
    assert token.rpartition("_")[2] not in out
    assert (entry["max_rows"], entry["max_bytes"], entry["max_in_flight"]) == (5, 1_000_000, 1)
    assert timedelta(days=1) < entry["expires"] - datetime.now(UTC) <= timedelta(days=2)
    put(file, stanza().rstrip() + out)  # a line of an editor that ends none
    assert calls(channel)["GetServerInfo"](bearer(token))
    over(lambda: calls(channel)["Select"](bearer(token)), "max_rows", 5)
    assert cli.main(["token", "plain"]) == 0
    assert set(tomllib.loads(capsys.readouterr().out)["tokens"][0]) == {"name", "salt", "hash"}


@pytest.mark.parametrize(
    "arguments", [[], ["Studio"], ["a_b"], ["-x"], ["x" * 64], ["é"], ["x", "--max-rows", "0"], ["x", "--days", "two"]]
)
def test_a_bad_name_or_limit_of_a_token_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["token", *arguments])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "queryselect token: error: " in err


@pytest.mark.parametrize("text", ["true", "True", "yes", "on", "1"])
def test_a_truth_is_told_alike_by_flag_environment_and_file(tmp_path, text):
    config = tmp_path / "queryselect.toml"
    config.write_text("reflection = false\nallow_plaintext_tokens = true\n")
    from_file = load(["--config", str(config)], {})
    assert (from_file.reflection, from_file.allow_plaintext_tokens) == (False, True)
    assert load(["--config", str(config), "--reflection", text], {}).reflection
    assert load(["--config", str(config)], {"QUERYSELECT_REFLECTION": text}).reflection


@pytest.mark.parametrize("text", ["false", "False", "no", "off", "0"])
def test_a_falsehood_is_none_the_less_told(text):
    assert Settings().reflection
    assert not load(["--reflection", text], {}).reflection
    assert not load([], {"QUERYSELECT_REFLECTION": text}).reflection


@pytest.mark.parametrize("text", ["", "maybe", "2"])
def test_what_is_no_truth_is_refused(tmp_path, text, capsys):
    with pytest.raises(SystemExit):
        load(["--reflection", text], {})
    assert "must be true or false; it is" in capsys.readouterr().err
    with pytest.raises(ValueError, match="reflection must be of type bool"):
        load([], {"QUERYSELECT_REFLECTION": text})
    (tmp_path / "c.toml").write_text("reflection = 1")
    with pytest.raises(ValueError, match="reflection must be of type bool"):
        load(["--config", str(tmp_path / "c.toml")], {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "selection.example.org"])
def test_tokens_do_not_travel_in_clear_text_unless_told_so(host):
    with pytest.raises(ValueError, match="clear text"):
        Settings(host=host, token_file="tokens.toml")
    Settings(host=host, token_file="tokens.toml", allow_plaintext_tokens=True)
    Settings(host=host, token_file="tokens.toml", tls_cert="a", tls_key="b")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_tokens_may_travel_in_clear_text_within_a_machine(host):
    Settings(host=host, token_file="tokens.toml")
