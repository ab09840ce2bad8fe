"""The benchmark harness: what it measures, what it keeps, and what it says of peers that are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import clock, machine, measure, memory, pools, report, scaling
from benchmarks.__main__ import main
from benchmarks.case import Benchmark, Case, Part, Peer, Scaling, load, names
from benchmarks.verdict import alike, judge
from queryselect_service import strategy as strategies
from queryselect_service.strategy import Sizes

strategies.load()
ROOT = Path(__file__).parent.parent.parent
SIZES = Sizes(N=200, D=4, L=3, k=6)


def benchmark(*peers: Peer) -> Benchmark:
    return Benchmark(
        strategy="k_center_greedy",
        make=pools.embeddings,
        peers=peers,
        floor=lambda sizes: {"read": sizes.item * sizes.N * sizes.D * sizes.k},
        quick=Case(Sizes(N=50, D=4, L=2, k=3)),
        cpu=(Case(SIZES),),
        scaling=Scaling(SIZES, {"N": (100, 400)}),
    )


@pytest.fixture
def unweighed(monkeypatch):
    """Memory takes a process each, which the other tests need not wait for."""
    monkeypatch.setattr(memory, "measure", lambda *_, **__: memory.Weighed(5.0, 10.0, Part(2.0, "")))


def rows(case, *peers, rounds=2):
    """What is kept of a case, the ceiling of reading being 1 GB/s."""
    bench = benchmark(*peers)
    return judge(bench, case, measure.compare(bench, case, "cpu", rounds), {"read": 1e9})


def test_a_run_keeps_what_it_found(unweighed, tmp_path, capsys):
    assert main(["random", "--quick", "--rounds", "2", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == f"random-quick-{os.uname().machine}-{os.cpu_count()}-cores.json"
    kept = json.loads(path.read_text())
    assert set(kept) == {"date", "machine", "device", "ceilings", "rows"}
    assert {"cpu", "cores", "torch", "threads"} <= set(kept["machine"])
    assert {"read", "gemv f32", "gemv f64", "gemm f32", "gemm f64", "exp", "log", "loopback"} == set(kept["ceilings"])
    assert min(kept["ceilings"].values()) > 0
    (row,) = kept["rows"]
    ours, numpy, *_ = row["ways"]
    assert (row["title"], row["sizes"]) == ("random", {"N": 1000, "k": 10, "item": 4})
    assert (ours["name"], numpy["name"]) == ("ours", "numpy")
    for way in (ours, numpy):
        assert not way["trouble"]
        assert len(way["rounds"]) == 2
        assert way["seconds"] > 0
        assert way["peak MB"] == 5
    assert ours["of the ceiling"] > 0
    assert numpy["of ours"] == numpy["seconds"] / ours["seconds"]
    assert numpy["picks"] is None, "what is drawn at random is no other's"
    assert "numpy, a permutation" in capsys.readouterr().out


def test_memory_is_that_of_the_call_alone():
    """20 bytes a row at least: its number, its key, its mask; interpreter, libraries and inputs do not count."""
    (bench,) = load("random")
    found = memory.measure(bench, Case(Sizes(N=2_000_000, k=10)), "ours", "cpu")
    assert 34 < found.peak <= found.estimate < 100
    assert found.ran.seconds > 0
    assert len(found.ran.picks) == 10


def test_memory_that_cannot_be_measured_is_told():
    with pytest.raises(RuntimeError, match="KeyError"):
        memory.measure(load("random")[0], Case(SIZES), "nobody's", "cpu")


def test_ways_alternate_and_a_slow_peer_may_have_fewer_rounds(unweighed):
    order = []

    def way(name):
        return lambda problem: order.append((name, problem.k)) or torch.arange(problem.k)

    found = rows(Case(SIZES), Peer("a", way("a")), Peer("b", way("b"), rounds=2), rounds=3)
    assert order == [("a", 3), ("b", 3), ("a", 6), ("b", 6), ("a", 6), ("b", 6), ("a", 6)]
    assert [len(each["rounds"]) for each in found["ways"]] == [3, 3, 2]
    found = rows(Case(SIZES, rounds=2), Peer("a", way("a")), rounds=3)
    assert [len(each["rounds"]) for each in found["ways"]] == [2, 2], "a case that takes long has fewer, too"


def test_the_only_round_is_the_one_in_which_memory_is_measured(unweighed):
    order = []
    peers = [
        Peer(name, lambda problem: order.append(problem.k) or torch.arange(problem.k), peak=peak)
        for name, peak in (("weighed", True), ("not", False))
    ]
    found = rows(Case(SIZES, rounds=1), *peers, rounds=3)
    assert order == [3, 3, 6], "both warm up, one runs"
    assert [(len(way["rounds"]), way["peak MB"]) for way in found["ways"]] == [(1, 5), (1, 5), (1, None)]
    assert [way["seconds"] for way in found["ways"][:2]] == [2, 2]


def test_a_peer_that_is_missing_or_fails_is_told_and_stops_nobody(unweighed):
    def missing(_):
        import no_such_library  # noqa: F401

    def failing(_):
        raise ValueError("no such luck")

    case = Case(SIZES, ratios={"missing": 20})
    found = rows(case, Peer("missing", missing, exact=True), Peer("failing", failing))
    ours, *others = found["ways"]
    assert ours["seconds"] > 0
    assert [each["trouble"] for each in others] == [
        "not installed: no_such_library",
        "failed: ValueError: no such luck",
    ]
    assert [goal["met"] for goal in found["goals"]] == [None, None]
    text = report.case(found)
    assert "missing: not installed: no_such_library" in text
    assert "goal: 20 times faster than missing: not measured" in text


def test_goals_are_judged(unweighed):
    strategy = benchmark()

    def slow(problem):
        return Part(1e3, "1 of 6 steps, scaled", strategy.ours(problem)[:1])

    case = Case(SIZES, ratios={"slow": 2}, ceiling=1e-9, peak=0.004)
    found = rows(case, Peer("slow", slow, exact=True), Peer("wrong", lambda _: torch.arange(6), exact=True))
    assert [goal["met"] for goal in found["goals"]] == [True, True, False, True, False]
    assert found["ways"][1]["label"] == "slow, 1 of 6 steps, scaled"
    assert found["ways"][1]["seconds"] == 1e3
    assert "NOT MET" in report.case(found)


def test_picks_are_compared_as_far_as_there_are_some():
    assert alike([3, 1, 2], [3, 1, 2]) == alike([3, 1, 2], [3, 1]) == "same"
    assert alike([3, 1, 2], [1, 3]) == "same set"
    assert alike([3, 1, 2], [3, 2]) == "1 of 2"


def test_slopes_are_those_of_powers():
    sizes = [100, 200, 400, 800]
    assert scaling.slope(sizes, [7e-3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert scaling.slope(sizes, [3.0] * 4) == pytest.approx(0, abs=1e-12)
    assert scaling.slope(sizes, [0.0, 1.0, 2.0, 3.0]) is None


def test_series_double_and_stand_beside_the_theory(unweighed):
    time, space = scaling.series(benchmark(), "cpu", {"read": 1e9}, quick=False)
    assert time["sizes"] == space["sizes"] == [100, 200, 400]
    assert time["theory"] == pytest.approx(1)
    assert (space["slope"], space["theory"]) == (pytest.approx(0), pytest.approx(0)), "what the fixture gives"
    assert len(time["values"]) == 3
    assert "by theory 1.00" in report.series(time)


def test_what_is_scaled_counts_its_start_once(monkeypatch):
    monkeypatch.setattr(clock, "timed", lambda call, _: (10 + 2 * call(), call()))
    assert clock.scaled(lambda steps: steps, 100, (1, 3), torch.device("cpu")) == (10, 200, 3)


@pytest.mark.parametrize("name", names())
def test_every_file_declares_cases_of_its_strategy(name):
    for bench in load(name):
        assert bench.strategy == name
        assert bench.cpu
        assert bench.cuda
        assert bench.quick
        for case in (*bench.cpu, *bench.cuda, bench.quick):
            assert set(case.ratios) <= set(bench.ways(case)), "goals name peers"
            assert bench.least(case, dict.fromkeys(("read", "gemv f32", "gemm f32", "gemm f64", "log"), 1e9)) > 0
        for letter in bench.scaling.series:
            assert len(bench.scaling.sizes(letter)) >= 4


def test_every_strategy_is_benchmarked():
    assert set(names()) == set(strategies.STRATEGIES)


@pytest.mark.parametrize("name", names())
def test_ours_picks_what_exact_peers_pick(name):
    for bench in load(name):
        problem = bench.problem(bench.quick, "cpu")
        for peer in (*bench.peers, *bench.quick.peers):
            if peer.exact and not peer.distribution:
                assert bench.ours(problem).tolist() == peer.select(problem).tolist()


def test_it_runs_where_there_are_torch_and_numpy_alone():
    """As on a GPU machine that is lent for a while."""
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("grpc", "google", "queryselect", "tqdm", "sklearn", "scipy", "skactiveml", "modAL",
                                  "baal", "batchbald_redux"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from benchmarks import memory
from benchmarks.__main__ import main
main(["--list"])
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'service'}:{ROOT}"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "margin: N=1000000 C=10 k=100 float32" in ran.stdout


def test_a_distribution_that_is_missing_is_told():
    assert machine.installed("no-such-distribution") == "not installed"


def test_an_unknown_name_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["no_such_strategy"])
    assert "k_center_greedy" in capsys.readouterr().err
