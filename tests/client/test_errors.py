"""Every case of the contract's table of errors becomes its class, with what the status says."""

from __future__ import annotations

from typing import Any

import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

import queryselect
from queryselect import Client, QuerySelectError, _errors
from queryselect._errors import from_status
from tests.client.fake import Fake, failure, retry_info, status

FIELD = error_details_pb2.BadRequest(
    field_violations=[
        error_details_pb2.BadRequest.FieldViolation(field="pool.embeddings", description="wrong"),
        error_details_pb2.BadRequest.FieldViolation(field="pool.logits", description="wrong too"),
    ]
)
BUG = error_details_pb2.ErrorInfo(reason="BUG", domain="queryselect", metadata={"error_id": "b0b"})
LIMIT = error_details_pb2.ErrorInfo(reason="OVER_LIMIT", domain="queryselect", metadata={"limit": "max_rows"})
HELP = error_details_pb2.Help()

#: code, details, class, attributes, other base
TABLE: list[tuple[str, list[Any], str, dict[str, Any]]] = [
    ("INVALID_ARGUMENT", [LIMIT, FIELD], "InvalidInput", {"field": "pool.embeddings"}),
    ("INVALID_ARGUMENT", [], "InvalidInput", {"field": ""}),
    ("OUT_OF_RANGE", [LIMIT, FIELD], "TooLarge", {}),
    ("FAILED_PRECONDITION", [LIMIT], "TooLarge", {}),
    ("RESOURCE_EXHAUSTED", [], "TooLarge", {}),
    ("RESOURCE_EXHAUSTED", [HELP, retry_info(1.5)], "Busy", {"retry_after": 1.5, "retryable": True}),
    ("RESOURCE_EXHAUSTED", [retry_info(0)], "Busy", {"retry_after": 0.0, "retryable": True}),
    ("ABORTED", [], "Aborted", {}),
    ("NOT_FOUND", [FIELD], "NotFound", {}),
    ("PERMISSION_DENIED", [], "PermissionDenied", {}),
    ("UNAUTHENTICATED", [], "Unauthenticated", {}),
    ("DATA_LOSS", [], "DataLoss", {"retryable": True}),
    ("UNIMPLEMENTED", [], "Unsupported", {}),
    ("UNAVAILABLE", [], "Unavailable", {"retryable": True, "retry_after": 0.0}),
    ("UNAVAILABLE", [retry_info(2)], "Unavailable", {"retryable": True, "retry_after": 2.0}),
    ("DEADLINE_EXCEEDED", [], "DeadlineExceeded", {}),
    ("CANCELLED", [], "Cancelled", {}),
    ("INTERNAL", [BUG], "ServerBug", {"error_id": "b0b"}),
    ("INTERNAL", [], "ServerBug", {"error_id": ""}),
    ("UNKNOWN", [], "QuerySelectError", {}),
    ("ALREADY_EXISTS", [], "QuerySelectError", {}),
]
CLASSES = [value for value in vars(_errors).values() if isinstance(value, type) and issubclass(value, QuerySelectError)]


def check(error: QuerySelectError, code: str, name: str, attributes: dict[str, Any]) -> None:
    assert type(error) is getattr(queryselect, name)
    assert (error.code, str(error)) == (code, "no")
    for key, value in ({"retryable": False} | attributes).items():
        assert getattr(error, key) == value


@pytest.mark.parametrize(("code", "details", "name", "attributes"), TABLE)
def test_a_status_becomes_its_class(code: str, details: list[Any], name: str, attributes: dict[str, Any]) -> None:
    error = from_status(status(code, *details), "the-id")
    check(error, code, name, attributes)
    assert error.request_id == "the-id"


@pytest.mark.parametrize(("code", "details", "name", "attributes"), TABLE)
def test_over_the_wire_it_is_the_same(code: str, details: list[Any], name: str, attributes: dict[str, Any]) -> None:
    plain: Any = rpc_status.to_status(status(code, *details))
    trailers = (*plain.trailing_metadata, ("x-request-id", "theirs"))
    with Fake(plain._replace(trailing_metadata=trailers)) as fake, Client(fake.target, retries=0) as client:
        with pytest.raises(QuerySelectError) as caught:
            client.select("random", 1, num_rows=5, request_id="mine")
        check(caught.value, code, name, attributes)
        assert caught.value.request_id == "theirs"


def test_every_class_is_in_the_table_and_derives_from_one() -> None:
    assert {each.__name__ for each in CLASSES} == {name for _, _, name, _ in TABLE}
    assert {each.__name__ for each in CLASSES} <= set(queryselect.__all__)
    for each in CLASSES:
        error = each("words")
        assert (str(error), error.request_id) == ("words", "")
        assert each is QuerySelectError or error.code == each.default_code
        assert error.code in code_pb2.Code.DESCRIPTOR.values_by_name
        assert isinstance(error, ValueError) == (each is queryselect.InvalidInput)
        assert isinstance(error, TimeoutError) == (each is queryselect.DeadlineExceeded)


@pytest.mark.parametrize(
    "trailers",
    [
        (),
        (("grpc-status-details-bin", b"\xff\xff not a message"),),
        (("grpc-status-details-bin", status("NOT_FOUND").SerializeToString()),),
        (("grpc-status-details-bin", status("UNAVAILABLE", message="other words").SerializeToString()),),
    ],
    ids=["none", "unreadable", "another code", "another message"],
)
def test_without_trustworthy_details_the_code_counts(trailers: tuple[Any, ...]) -> None:
    plain: Any = failure("UNAVAILABLE")
    with Fake(plain._replace(trailing_metadata=trailers)) as fake, Client(fake.target, retries=0) as client:
        with pytest.raises(queryselect.Unavailable) as caught:
            client.select("random", 1, num_rows=5, request_id="mine")
        check(caught.value, "UNAVAILABLE", "Unavailable", {"retryable": True})
        assert caught.value.request_id == "mine"


def test_a_code_that_nobody_knows_is_the_base_class() -> None:
    error = from_status(status_pb2.Status(code=99, message="no"))
    check(error, "UNKNOWN", "QuerySelectError", {})


def test_an_exception_in_the_service_is_a_bug_with_an_id(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from queryselect_service import strategy as strategies

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret words of torch")

    monkeypatch.setattr(strategies, "select", broken)
    with pytest.raises(queryselect.ServerBug) as caught:
        client.select("random", 1, num_rows=5)
    assert len(caught.value.error_id) == 32
    assert caught.value.error_id in str(caught.value)
    assert caught.value.error_id in caplog.text
    assert "secret" not in str(caught.value)
    monkeypatch.undo()
    assert len(client.select("random", 1, num_rows=5)) == 1
