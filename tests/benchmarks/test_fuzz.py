"""The fuzz suite itself: its cases can be had again, and it sees what is wrong with an answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.service.answers import Wrong, check_answer
from benchmarks.service.fuzz import GROUP, drawn
from benchmarks.service.requests import Descriptions
from benchmarks.service.requests import tensor as of
from queryselect.v1 import selection_pb2
from queryselect_service.service import Service
from queryselect_service.settings import Settings
from tests.service.test_errors import P, request, tensor

FOLDER = Path("/pools")


@pytest.fixture(scope="module")
def descriptions():
    return Descriptions((each.name, each) for each in Service(Settings()).list_strategies().strategies)


def test_a_case_is_told_by_its_seed_and_its_number(descriptions):
    cases = drawn(descriptions, FOLDER, 3, 7)
    assert cases == drawn(descriptions, FOLDER, 3, 7)
    assert len(set(cases)) == len(cases) == GROUP
    assert not set(cases) & {*drawn(descriptions, FOLDER, 3, 8), *drawn(descriptions, FOLDER, 4, 7)}


def answer(rows, scores, **fields) -> selection_pb2.SelectResponse:
    return selection_pb2.SelectResponse(indices=tensor(rows), scores=tensor(np.array(scores)), **fields)


def test_a_good_answer_is_good():
    check_answer(request(budget=2, labeled=tensor([3])), answer([1, 2], [0.5, 0.25]))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (answer([1, 1], [0.5, 0.25]), "chosen twice"),
        (answer([1, 10], [0.5, 0.25]), "out of range"),
        (answer([1, -1], [0.5, 0.25]), "out of range"),
        (answer([1, 3], [0.5, 0.25]), "that is labeled"),
        (answer([1, 4], [0.5, 0.25]), "that is excluded"),
        (answer([1, 2, 5], [0.5, 0.25, 0.0]), "the budget is 2"),
        (answer([1, 2], [0.5]), r"\(1,\) scores"),
        (answer([1, 2], [0.5, np.nan]), "a score is NaN"),
        (answer([1, 2], [0.5, 0.25], pool_scores=tensor(np.full(9, 0.5))), "pool_scores are wrong"),
    ],
)
def test_what_an_answer_promises_is_looked_at(wrong, words):
    sent = request(budget=2, labeled=tensor([3]), excluded=tensor([4]))
    with pytest.raises(Wrong, match=words):
        check_answer(sent, wrong)


def test_a_tensor_of_bfloat16_has_two_bytes_an_element():
    assert len(of(P, 4).data) == 2 * P.size
