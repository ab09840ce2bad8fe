"""Every strategy at a large size, cancelled in the midst of its work: the server lets go of it at once."""

from __future__ import annotations

import threading
import time

import pytest

from benchmarks.service.asked import largest, names
from queryselect_service import strategy as strategies
from tests.slow.servers import assert_goes_at_once, quiet_server

strategies.load()

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
GIGABYTE = 1e9
#: Seconds into the kernel at which one is cancelled, or else at once; a kernel that takes less than the latter need
#: not be.
LATE, SHORT = 1.0, 0.5
#: Seconds after which a kernel is at work that has not said how far it is.
SILENT = 10.0


@pytest.fixture(scope="module")
def server():
    with quiet_server() as (_, metrics, client):
        yield metrics, client


@pytest.mark.parametrize("name", names())
def test_a_cancelled_selection_is_gone_at_once(server, name):
    metrics, client = server
    for call in largest(name, GIGABYTE):
        for seconds in (LATE, 0.0):
            job = begun(client, call)
            try:
                picks = job.result(seconds)
            except TimeoutError:
                assert_goes_at_once(job, metrics)
                break
            assert len(picks) == call.budget
            if picks.info.kernel < SHORT:
                break


def begun(client, call):
    """The call as a job whose kernel is at work, or already over; rows that are scored one by one are half scored."""
    begins, pointwise = threading.Event(), strategies.STRATEGIES[call.strategy].pointwise

    def note(phase: str, done: int, total: int | None) -> None:
        if (phase == "receiving" and 2 * done >= (total or 0)) if pointwise else phase == "selecting":
            begins.set()

    job = client.submit(call.strategy, call.budget, progress=note, **call.options)
    until = time.monotonic() + SILENT
    while not begins.wait(0.01) and not job.done() and time.monotonic() < until:
        pass
    return job
