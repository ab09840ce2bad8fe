"""The benchmark of the service: what it measures and keeps, on sizes that only show that everything runs."""

from __future__ import annotations

import json
import os

import pytest

from benchmarks.service import cancel
from benchmarks.service.__main__ import main
from benchmarks.service.crew import Crew
from benchmarks.service.overload import GUESTS


def fails(_number: int, _start: object) -> None:
    raise ValueError("no such luck")


def numbers(number: int, start) -> int:
    start()
    return number


def kept(folder) -> dict:
    (path,) = folder.iterdir()
    assert path.name == f"service-quick-{os.uname().machine}-{os.cpu_count()}-cores.json"
    return json.loads(path.read_text())


def test_parts_are_measured_and_kept_beside_those_of_earlier_runs(tmp_path, capsys):
    for part in ("load", "seen", "health"):
        assert main([part, "--quick", "--results", str(tmp_path)]) == 0
    found = kept(tmp_path)
    assert {"cpu", "cores", "grpcio"} <= set(found["machine"])
    assert set(found["parts"]) == {"load", "seen", "health"}

    load = found["parts"]["load"]
    assert [(row["way"], row["clients"]) for row in load["rows"]] == [("client", 2), ("stub", 2)]
    for row in load["rows"]:
        assert set(row["answers"]) == {"result"}
        assert row["requests/s"] > 0
        assert row["p50 ms"] <= row["p99 ms"] <= row["max ms"]
        assert row["server CPU ms/request"] > 0

    seen = found["parts"]["seen"]
    assert len(seen["rows"]) == 5
    assert all(row["CPU ms"] > 0 for row in seen["rows"])
    assert seen["counted"] > 0

    health = found["parts"]["health"]
    assert health["bound ms"] > 100
    assert set(health["idle"]["answers"]) == {"SERVING"}
    assert health["idle"]["liveness"]["p50 ms"] > 0
    assert set(health["answers under overload"]) == set(GUESTS)
    assert health["not as documented"] == []
    assert health["after overload"]["in flight"] == 0
    printed = capsys.readouterr().out
    assert "server CPU ms/request" in printed
    assert "answers under overload" in printed


def test_every_kind_of_bad_token_is_timed(tmp_path, capsys):
    assert main(["tokens", "--quick", "--results", str(tmp_path)]) == 0
    times = kept(tmp_path)["parts"]["tokens"]["times"]
    assert len(times) == 3
    for rows in times.values():
        assert {"right", "wrong last digit", "unknown name", "missing", "malformed"} <= set(rows)
        assert all(0 < row["p10 us"] <= row["p50 us"] <= row["p90 us"] for row in rows.values())
    assert "wrong first digit" in capsys.readouterr().out


@pytest.mark.parametrize("call", list(cancel.beside(2000)), ids=lambda call: call.title)
def test_what_is_cancelled_beside_kernels_is_a_request(local, call):
    row = cancel.stretches(call, 60)
    assert row["covered"] == 1
    assert row["stretches"]
    assert len(local.select(call.strategy, call.budget, **call.options)) > 0


def test_a_crew_starts_together_and_tells_what_each_found():
    with Crew(3, numbers) as crew:
        crew.begin(0.1)
        assert crew.found() == [0, 1, 2]


def test_a_process_that_fails_is_told_and_the_others_end():
    with pytest.raises(RuntimeError, match=r"(?s)a process has failed:.*no such luck"), Crew(1, fails) as crew:
        crew.begin(0.1)


def test_an_unknown_part_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["no_such_part"])
    assert "transport, load, seen, health" in capsys.readouterr().err
