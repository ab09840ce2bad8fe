"""Traces: one span per RPC and one per phase, with times that are true; whose they are and whether they are taken the
caller's traceparent says.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from queryselect.v1 import selection_pb2_grpc, server_pb2, server_pb2_grpc
from queryselect_service import server
from queryselect_service.settings import Settings
from queryselect_service.tracing import Tracing
from tests.service.streams import Talk, ask, streamed, whole
from tests.service.test_auth import TOKEN, bearer, stanza
from tests.service.test_errors import FAR, P, X, request, sleepy, tensor
from tests.waiting import until

SELECT, STREAM = (f"queryselect.v1.SelectionService/{name}" for name in ("Select", "SelectStream"))
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PHASES = {"receive", "queue", "decode", "transfer", "kernel", "encode"}


def kept(started: server.Server) -> InMemorySpanExporter:
    """Has a server keep its spans."""
    exporter = InMemorySpanExporter()
    started.frontend.tracing = Tracing(SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture
def traced(serve):
    """A channel to a server with traces, and the spans that have ended: the RPC's, and its phases' by name."""
    started, channel = serve()
    exporter = kept(started)

    def spans(method: str = SELECT):
        def found():
            return [each for each in exporter.get_finished_spans() if each.name == method]

        assert until(found)
        (rpc,) = found()
        return rpc, {each.name: each for each in exporter.get_finished_spans() if each.parent and each is not rpc}

    spans.exporter = exporter
    return channel, spans


def select(channel, message, **options):
    return selection_pb2_grpc.SelectionServiceStub(channel).Select(message, **{"timeout": 20, **options})


def refused(channel, message, **options):
    with pytest.raises(grpc.RpcError):
        select(channel, message, **options)


def test_an_rpc_is_a_span_and_its_phases_are_spans_in_it(traced):
    channel, spans = traced
    before = time.time_ns()
    answer = select(channel, request(FAR, request_id="job-7"))
    rpc, phases = spans()
    after = time.time_ns()
    assert (rpc.kind, rpc.parent, rpc.status.status_code) == (SpanKind.SERVER, None, StatusCode.UNSET)
    attributes = dict(rpc.attributes)
    assert attributes.pop("queryselect.upload_bytes") > 0
    assert attributes == {
        "rpc.system": "grpc",
        "rpc.service": "queryselect.v1.SelectionService",
        "rpc.method": "Select",
        "rpc.grpc.status_code": 0,
        "queryselect.request_id": "job-7",
        "queryselect.strategy": "k_center_greedy",
        "queryselect.N": X.shape[0],
        "queryselect.D": X.shape[1],
        "queryselect.k": 2,
    }
    assert set(phases) == PHASES
    assert before - 1e6 <= rpc.start_time <= rpc.end_time <= after + 1e6
    for name, each in phases.items():
        assert each.parent.span_id == rpc.context.span_id
        assert each.context.trace_id == rpc.context.trace_id
        assert rpc.start_time <= each.start_time <= each.end_time <= rpc.end_time
        assert 0 < each.attributes["queryselect.busy_seconds"] <= (each.end_time - each.start_time) / 1e9 + 1e-6
        if name in ("receive", "decode", "transfer", "kernel"):
            assert each.attributes["queryselect.busy_seconds"] == pytest.approx(
                getattr(answer.info, name).ToNanoseconds() / 1e9, abs=1e-6
            )
    order = ("receive", "decode", "transfer", "kernel", "encode")
    begun = [phases[name].start_time for name in order]
    assert begun == sorted(begun)
    assert rpc.resource.attributes["service.name"] == "queryselect"


def test_a_stream_whose_rows_are_scored_as_they_come_has_one_span_per_phase(traced):
    channel, spans = traced
    ask(channel, whole(request(), 8))
    rpc, phases = spans(STREAM)
    assert set(phases) == PHASES
    assert len(spans.exporter.get_finished_spans()) == 1 + len(PHASES)
    assert rpc.attributes["queryselect.strategy"] == "margin"
    busy = sum(each.attributes["queryselect.busy_seconds"] for each in phases.values())
    assert busy <= (rpc.end_time - rpc.start_time) / 1e9 + 1e-6


def test_a_traceparent_is_followed(traced, caplog):
    channel, spans = traced
    with caplog.at_level(logging.INFO, "queryselect_service"):
        select(channel, request(), metadata=(("traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "a=b")))
        rpc, phases = spans()
    assert f"{rpc.context.trace_id:032x}" == TRACE
    assert f"{rpc.parent.span_id:016x}" == SPAN
    assert rpc.parent.is_remote
    assert {each.context.trace_id for each in phases.values()} == {rpc.context.trace_id}
    (line,) = (each.fields for each in caplog.records if "rpc" in getattr(each, "fields", {}))
    assert (line["trace_id"], line["span_id"]) == (TRACE, f"{rpc.context.span_id:016x}")


def test_a_caller_who_takes_no_trace_has_none(traced):
    channel, spans = traced
    select(channel, request(), metadata=(("traceparent", f"00-{TRACE}-{SPAN}-00"),))
    select(channel, request(), metadata=(("traceparent", f"00-{TRACE}-{SPAN[::-1]}-01"),))
    rpc, _ = spans()
    assert f"{rpc.parent.span_id:016x}" == SPAN[::-1], "the sampled one alone"


@pytest.mark.parametrize(
    "hostile",
    [
        "", "00", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE.upper()}-{SPAN}-01", "x" * 5000, "00-" + "-" * 100, f"00-{TRACE}-{SPAN}-01-evil", "%0a%0dx",
    ],
)  # fmt: skip
def test_what_is_no_traceparent_is_ignored(traced, hostile):
    channel, spans = traced
    select(channel, request(), metadata=(("traceparent", hostile), ("tracestate", "=" * 2000)))
    rpc, _ = spans()
    assert rpc.parent is None


def test_a_stranger_decides_on_no_trace(serve, tmp_path):
    path = tmp_path / "tokens.toml"
    path.write_text(stanza())
    started, channel = serve(token_file=str(path))
    exporter = kept(started)
    parent = (("traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "a=text-of-a-stranger"))
    for shown in ((), bearer(TOKEN[:-1]), bearer()):
        with suppress(grpc.RpcError):
            select(channel, request(), metadata=(*parent, *shown))
    assert until(lambda: sum(each.name == SELECT for each in exporter.get_finished_spans()) == 3)
    parents = [each.parent and each.parent.span_id for each in exporter.get_finished_spans() if each.name == SELECT]
    assert parents == [None, None, int(SPAN, 16)]


def test_failures_are_told_apart_from_callers_faults(traced):
    channel, spans = traced
    refused(channel, request(budget=100))
    rpc, phases = spans()
    assert (rpc.status.status_code, rpc.attributes["queryselect.reason"]) == (StatusCode.UNSET, "INVALID_INPUT")
    assert set(phases) == {"receive", "queue", "decode"}
    spans.exporter.clear()
    refused(channel, sleepy(fail="bug"))
    rpc, phases = spans()
    assert (rpc.status.status_code, rpc.status.description) == (StatusCode.ERROR, "INTERNAL")
    assert rpc.attributes["rpc.grpc.status_code"] == 13
    assert "kernel" in phases


def test_a_caller_who_leaves_ends_its_span(traced):
    channel, spans = traced
    first, _ = streamed(request())
    with Talk(channel, first) as talk:
        talk.until("admitted")
        talk.call.cancel()
    rpc, phases = spans(STREAM)
    assert rpc.attributes["rpc.grpc.status_code"] == 1
    assert "receive" in phases


def test_spans_hold_no_data(traced):
    channel, spans = traced
    secret = P.copy()
    secret[0] = 7.125
    refused(channel, request(probabilities=tensor(secret)), metadata=(("authorization", "Bearer very-secret"),))
    spans()
    text = "".join(each.to_json() for each in spans.exporter.get_finished_spans())
    assert json.loads(spans()[0].to_json())
    assert "7.125" not in text
    assert "secret" not in text
    assert not [each.events for each in spans.exporter.get_finished_spans() if each.events]


def test_descriptions_are_traced_and_health_is_not(traced):
    channel, spans = traced
    health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest())
    rpc, _ = spans("queryselect.v1.ServerService/GetServerInfo")
    assert spans.exporter.get_finished_spans() == (rpc,)


def test_traces_are_off_unless_set_up():
    assert Settings().otlp_endpoint == ""
    started = server.start(Settings(port=0, metrics_port=-1))
    assert started.frontend.tracing is None
    started.drain(0.1)


def test_without_the_extra_one_sentence_says_so(monkeypatch):
    monkeypatch.delitem(sys.modules, "queryselect_service.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(RuntimeError, match=r'otlp_endpoint needs .*: pip install "queryselect\[tracing\]"$'):
        server.start(Settings(port=0, metrics_port=-1, otlp_endpoint="http://127.0.0.1:4318/v1/traces"))


@pytest.mark.parametrize(
    "endpoint", ["collector:4317", "file:///etc/passwd", "http://", "http://user:secret@host/", "x://u:secret@h"]
)
def test_an_address_that_is_none_is_refused_and_secrets_are_not_repeated(endpoint):
    with pytest.raises(ValueError, match="otlp_endpoint must") as caught:
        Settings(otlp_endpoint=endpoint)
    assert "secret" not in str(caught.value)


def test_a_collector_that_is_not_there_holds_up_neither_answers_nor_the_end():
    started = server.start(Settings(port=0, metrics_port=-1, otlp_endpoint="http://127.0.0.1:9/v1/traces"))
    with grpc.insecure_channel(f"127.0.0.1:{started.port}") as channel:
        began = time.monotonic()
        select(channel, request())
        assert time.monotonic() - began < 5
    began = time.monotonic()
    started.drain(0.1)
    assert time.monotonic() - began < 15
