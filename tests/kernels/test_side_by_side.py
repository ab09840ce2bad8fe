"""Scores of rows in blocks, several at a time: the same bits whatever the number of threads, and cancelled at once."""

from __future__ import annotations

import pytest
import torch

from queryselect_service import strategy as strategies
from queryselect_service.errors import Cancelled
from queryselect_service.shards import Whole
from queryselect_service.strategy import STRATEGIES, Task

strategies.load()


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def scores(name, inputs, pool=None):
    strategy = STRATEGIES[name]
    size = len(next(iter(inputs.values())))
    return strategies.score(strategy, inputs, strategy.spec(), Task.MULTICLASS, pool or Whole(size))


@pytest.fixture(scope="module")
def samples():
    return torch.softmax(torch.randn(20_000, 20, 7, generator=torch.Generator().manual_seed(0)), -1)


@pytest.fixture(scope="module")
def alone(samples):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = scores("bald", {"samples": samples})
    torch.set_num_threads(before)
    return found


@pytest.mark.usefixtures("threads")
def test_scores_do_not_depend_on_the_number_of_threads(samples, alone):
    assert torch.equal(scores("bald", {"samples": samples}), alone)


@pytest.mark.usefixtures("threads")
def test_nor_on_how_many_blocks_there_are(samples, alone):
    assert torch.equal(scores("bald", {"samples": samples[:3]}), alone[:3])


@pytest.mark.usefixtures("threads")
def test_a_caller_who_goes_stops_all_blocks(samples):
    checks = []

    def check():
        checks.append(1)
        if len(checks) > 3:
            raise Cancelled("the caller has gone")

    with pytest.raises(Cancelled):
        scores("bald", {"samples": samples}, Whole(len(samples), check))
    assert len(checks) < 20


@pytest.mark.usefixtures("threads")
def test_progress_ends_with_all_rows(samples):
    told = []
    scores("bald", {"samples": samples}, Whole(len(samples), report=lambda done, total: told.append((done, total))))
    assert told[0] == (0, 20_000)
    assert told[-1] == (20_000, 20_000)
    assert told == sorted(told)
