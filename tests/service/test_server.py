"""What a server offers beside selections: health, reflection, descriptions, metrics, ids, warnings, a graceful end."""

from __future__ import annotations

import dataclasses
import time
import urllib.request

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from queryselect import Client, InvalidInput
from queryselect.strategies import v1 as strategies
from queryselect.v1 import selection_pb2, selection_pb2_grpc, strategy_pb2, tensor_pb2
from queryselect_service import server
from queryselect_service import strategy as registry
from queryselect_service.settings import Settings, load
from queryselect_service.spec import Spec

SERVICES = ("queryselect.v1.SelectionService", "queryselect.v1.StrategyService", "queryselect.v1.ServerService")
P = np.random.default_rng(0).dirichlet(np.ones(4), 10)


def margin(**fields) -> selection_pb2.SelectRequest:
    p = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F64, shape=P.shape, data=P.tobytes())
    return selection_pb2.SelectRequest(
        pool=selection_pb2.Pool(probabilities=p, **fields.pop("pool", {})),
        strategy=strategy_pb2.Strategy(margin=strategies.Margin()),
        stop=selection_pb2.Stop(max_items=3),
        **fields,
    )


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_health_is_serving(channel, service):
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_draining_server_says_so_before_it_goes():
    started = server.start(Settings(port=0, metrics_port=-1))
    with grpc.insecure_channel(f"127.0.0.1:{started.port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        started.health.enter_graceful_shutdown()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    started.drain(0.1)


def test_a_health_check_of_no_service_is_not_found(channel):
    with pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_an_open_watch_does_not_hold_up_the_end():
    started = server.start(Settings(port=0, metrics_port=-1))
    with grpc.insecure_channel(f"127.0.0.1:{started.port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        next(watch)
        before = time.monotonic()
        started.drain(30.0)
        assert time.monotonic() - before < 10


def test_reflection_names_every_service_and_method(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {*SERVICES, "grpc.health.v1.Health"} <= set(database.get_services())
    file = database.FindFileContainingSymbol("queryselect.v1.SelectionService")
    assert [each.name for each in file.service[0].method] == ["Select", "SelectStream"]


def test_server_info_tells_devices_limits_and_types(remote: Client, running):
    info = remote.server_info()
    assert info.version
    (device,) = info.devices
    assert device.name == "cpu"
    assert 0 < device.free_bytes < device.total_bytes
    settings = Settings()
    assert device.capacity_bytes == settings.max_host_bytes
    assert info.limits.rows == settings.max_rows == 50_000_000
    assert info.limits.inline_bytes == 64 << 20
    assert info.limits.queue_wait.ToSeconds() == 120
    assert info.limits.upload_grace.ToSeconds() == 60
    assert info.limits.min_upload_rate == 64 << 10
    assert info.limits.sources == 64
    assert len(info.limits.ListFields()) == 17
    assert len(info.dtypes) == 8
    assert list(info.uri_schemes) == []
    assert info.recommended_chunk_bytes == 1 << 20


def test_the_default_limits_are_those_documented():
    settings = dataclasses.asdict(Settings())
    others = ("max_host_bytes", "max_connection_age")  # the machine's; no limit of requests
    assert {name: settings[name] for name in settings if name.startswith("max_") and name not in others} == {
        "max_rows": 50_000_000,
        "max_dims": 65_536,
        "max_classes": 100_000,
        "max_budget": 1_000_000,
        "max_inline_bytes": 64 << 20,
        "max_id_bytes": 128,
        "max_quotas": 8,
        "max_references": 16,
        "max_sources": 64,
        "max_streams_per_peer": 64,
        "max_queue": 64,
    }
    assert (settings["idle_stream"], settings["queue_wait"], settings["drain_grace"]) == (30.0, 120.0, 60.0)


def scrape(running) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{running.metrics_port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_metrics_count_requests_and_seconds(running, remote: Client):
    good = 'queryselect_requests_total{code="OK",rpc="Select",strategy="margin"}'
    bad = 'queryselect_requests_total{code="INVALID_ARGUMENT",rpc="Select",strategy="margin"}'
    took = 'queryselect_request_duration_seconds_{}{{rpc="Select",strategy="margin"}}'
    before = scrape(running)
    remote.select("margin", 2, probabilities=P)
    with pytest.raises(InvalidInput):
        remote.select("margin", 200, probabilities=P)
    after = scrape(running)
    assert after[good] - before.get(good, 0) == 1
    assert after[bad] - before.get(bad, 0) == 1
    assert after[took.format("count")] - before.get(took.format("count"), 0) == 2
    assert after[took.format("sum")] > before.get(took.format("sum"), 0)
    (build,) = (name for name in after if name.startswith("queryselect_build_info"))
    assert after[build] == 1
    assert 'version="' in build


def test_an_answer_tells_how_it_came_about(channel):
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    answer, call = stub.Select.with_call(margin(request_id="job-7", seed=9))
    assert answer.request_id == "job-7"
    assert dict(call.trailing_metadata())["x-request-id"] == "job-7"
    info = answer.info
    assert info.device == "cpu"
    assert info.compute_dtype == tensor_pb2.DATA_TYPE_F64
    assert info.seed == 9
    assert info.version
    parts = [getattr(info, name).ToNanoseconds() for name in ("queue", "receive", "decode", "transfer", "kernel")]
    assert 0 < sum(parts) <= info.total.ToNanoseconds()
    assert answer.score_kind == strategy_pb2.SCORE_KIND_POINT
    assert answer.strategy.margin.label_aggregation == strategies.LABEL_AGGREGATION_MEAN
    assert answer.indices.dtype == tensor_pb2.DATA_TYPE_I64
    assert answer.scores.dtype == tensor_pb2.DATA_TYPE_F64
    assert not answer.HasField("pool_scores")


def test_a_request_id_may_come_as_metadata_and_is_made_up_otherwise(channel):
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    assert stub.Select(margin(), metadata=(("x-request-id", "abc"),)).request_id == "abc"
    one, two = (stub.Select(margin()).request_id for _ in range(2))
    assert one != two
    assert len(one) == 32


def test_ids_come_back_for_the_picks(channel):
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    rows = np.frombuffer(stub.Select(margin()).indices.data, np.int64)
    names = [f"image-{row}.png" for row in range(10)]
    texts = selection_pb2.Ids(strings=selection_pb2.Strings(values=names))
    assert list(stub.Select(margin(pool={"ids": texts})).ids.strings.values) == [names[row] for row in rows]
    numbers = np.arange(10) * 7 + 10**12
    integers = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_I64, shape=[10], data=numbers.tobytes())
    got = stub.Select(margin(pool={"ids": selection_pb2.Ids(integers=integers)})).ids.integers
    assert np.frombuffer(got.data, np.int64).tolist() == numbers[rows].tolist()


def test_validate_only_checks_everything_and_selects_nothing(channel):
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    answer = stub.Select(margin(validate_only=True))
    assert not answer.HasField("indices")
    assert answer.strategy.WhichOneof("kind") == "margin"
    bad = margin(validate_only=True)
    bad.pool.probabilities.data = (P * 2).tobytes()
    with pytest.raises(grpc.RpcError) as caught:
        stub.Select(bad)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_num_rows_that_agrees_is_welcome(channel):
    assert selection_pb2_grpc.SelectionServiceStub(channel).Select(margin(pool={"num_rows": 10})).HasField("indices")


@pytest.mark.parametrize("method", ["grpc.health.v1.Health/Check", "queryselect.v1.SelectionService/Select"])
def test_a_small_message_that_unpacks_to_a_large_one_is_refused(channel, method):
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{method}")(bytes(66 << 20), timeout=30, compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in caught.value.details()


def test_a_taken_port_is_an_error(running):
    with pytest.raises(RuntimeError, match="bind"):
        server.start(Settings(port=running.port, metrics_port=-1))


def test_a_device_that_does_not_exist_is_an_error():
    with pytest.raises(RuntimeError, match="device cuda:99 does not work"):
        server.start(Settings(port=0, metrics_port=-1, device="cuda:99"))


def test_settings_come_from_flags_then_environment_then_file(tmp_path):
    config = tmp_path / "queryselect.toml"
    config.write_text('port = 1\nmax_rows = 10\nhost = "::1"\nqueue_wait = 1.5\n')
    environment = {"QUERYSELECT_PORT": "2", "QUERYSELECT_MAX_ROWS": "20", "UNRELATED": "x"}
    settings = load(["--config", str(config), "--port", "3"], environment)
    assert (settings.port, settings.max_rows, settings.host, settings.queue_wait) == (3, 20, "::1", 1.5)
    assert load([], {"QUERYSELECT_CONFIG": str(config)}).port == 1
    assert "port = 3" in str(settings)


def test_what_kubernetes_tells_of_services_is_no_setting():
    links = {
        "QUERYSELECT_PORT": "tcp://10.0.0.1:50051",
        "QUERYSELECT_METRICS_PORT": "tcp://10.0.0.2:9090",
        "QUERYSELECT_SERVICE_HOST": "10.0.0.1",
        "QUERYSELECT_SERVICE_PORT": "50051",
        "QUERYSELECT_SERVICE_PORT_GRPC_TLS": "50051",
        "QUERYSELECT_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "QUERYSELECT_PORT_50051_TCP_PROTO": "tcp",
        "QUERYSELECT_PORT_50051_TCP_PORT": "50051",
        "QUERYSELECT_PORT_50051_TCP_ADDR": "10.0.0.1",
        "QUERYSELECT_OTHER_SERVICE_HOST": "10.0.0.2",
    }
    assert load([], links) == Settings()


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ([], {"QUERYSELECT_PORT": "many"}, "port must be of type int; it is 'many'"),
        ([], {"QUERYSELECT_MAX_ROWS": "0"}, "max_rows must be at least 1; it is 0"),
        (["--port", "70000"], {}, "port must be at most 65535; it is 70000"),
        (["--metrics-port", "70000"], {}, "metrics_port must be at most 65535"),
        ([], {"QUERYSELECT_TOKENFILE": "tokens.toml"}, "there is no setting QUERYSELECT_TOKENFILE; there are host, "),
        ([], {"QUERYSELECT_SERVICE_HOSTS": "a"}, "there is no setting QUERYSELECT_SERVICE_HOSTS"),
        ([], {"QUERYSELECT_METRIC_PORT": "9090"}, "there is no setting QUERYSELECT_METRIC_PORT"),
        ([], {"QUERYSELECT_token_file": "tokens.toml"}, "there is no setting QUERYSELECT_token_file"),
        *(
            ([f"--{name}", value], {}, f"{name.replace('-', '_')} must be at most 86400")
            for name in ("drain-grace", "queue-wait", "idle-stream", "upload-grace", "queue-ageing")
            for value in ("inf", "1e10")
        ),
        (["--config", "CONFIG"], {}, "there is no setting colour"),
        (["--config", "MISSING"], {}, "config MISSING: "),
        (["--config", "BROKEN"], {}, "BROKEN: "),
        (["--config", "TYPES"], {}, "port must be of type int; it is 1.5"),
        (["--config", "TRUTH"], {}, "metrics_port must be of type int; it is True"),
    ],
)
def test_wrong_settings_are_named(tmp_path, arguments, environment, words):
    files = {"CONFIG": 'colour = "blue"', "TYPES": "port = 1.5", "TRUTH": "metrics_port = true", "BROKEN": "port ="}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        load([str(tmp_path / each) if each in files else each for each in arguments], environment)


def test_plug_ins_are_loaded_from_their_entry_points(tmp_path, monkeypatch):
    """An installed distribution, as pip leaves it: a module and its metadata."""
    (tmp_path / "third_party.py").write_text(
        "from queryselect_service.spec import Spec\n"
        "from queryselect_service.strategy import ScoreKind, Selection, strategy\n"
        "class First(Spec): pass\n"
        "@strategy(First, kind=ScoreKind.POINT, cost='O(1)', citation='2026')\n"
        "def first(*, k, candidates, pool):\n"
        "    'Takes the first rows.'\n"
        "    return Selection(*pool.top(candidates.double(), k, candidates))\n"
    )
    info = tmp_path / "third_party-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[queryselect.strategies]\nfirst = third_party\n")
    monkeypatch.syspath_prepend(tmp_path)
    with Client("local:") as client:
        assert client.select(strategies.Custom(name="first"), 2, num_rows=5, labeled=[0]).indices.tolist() == [1, 2]
        (found,) = (each for each in client.strategies() if each.name == "first")
        assert found.custom
    (info / "entry_points.txt").write_text("[queryselect.strategies]\ngone = third_party_gone\n")
    with pytest.raises(RuntimeError, match="plug-in gone"):
        Client("local:")
    registry.PLUGINS.pop("first")


def test_a_plug_in_may_not_take_the_name_of_a_strategy():
    class Margin(Spec):
        pass

    def margin(*, k, candidates, pool):
        """Is not the real one."""

    with pytest.raises(ValueError, match="there is a query strategy margin already"):
        registry.strategy(Margin, kind=registry.ScoreKind.POINT, cost="O(1)", citation="2026")(margin)
