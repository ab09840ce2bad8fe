"""Every strategy against its peers and against the machine's own limits, side by side in one run: `make bench`.

A strategy's cases stand in benchmarks/kernels/, in a file of its name. For each, one run measures ours and the peers on
the same input in alternation, the machine's ceilings just before, the picks, and the memory in processes of its own;
with --scaling, how ours grows with every size instead. What was found is printed and kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from benchmarks import ceilings, machine, report, scaling
from benchmarks.case import Benchmark, load, names
from benchmarks.measure import compare
from benchmarks.report import Row
from benchmarks.verdict import judge
from queryselect_service import allocator
from queryselect_service import strategy as strategies


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="strategies (default: all)")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--quick", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--scaling", action="store_true", help="time by N, D, C, L and k, and memory by N")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of every way (default %(default)s)")
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="a folder (default %(default)s)")
    chosen = parser.parse_args(arguments)
    for name in set(chosen.names) - set(names()):
        parser.error(f"there is no benchmark of {name}; there are: {', '.join(names())}")
    if chosen.device == "cuda" and not chosen.list and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    return chosen


def listing(wanted: list[str], device: str) -> str:
    """The cases and the peers, as text."""
    lines = []
    for benchmark in (each for name in wanted for each in load(name)):
        for case in benchmark.cases(device, quick=False):
            lines.append(f"{benchmark.title}: {case}")
            lines += [f"  {peer.label}" for peer in (*benchmark.peers, *case.peers)]
    return "\n".join(lines)


def run(benchmark: Benchmark, chosen: argparse.Namespace, limits: Mapping[str, float]) -> Iterator[Row]:
    """Measures, prints, and gives what is kept."""
    if chosen.scaling:
        for row in scaling.series(benchmark, chosen.device, limits, quick=chosen.quick):
            print(report.series(row), flush=True)
            yield row
    else:
        for case in benchmark.cases(chosen.device, quick=chosen.quick):
            row = judge(benchmark, case, compare(benchmark, case, chosen.device, chosen.rounds), limits)
            print(report.case(row), flush=True)
            yield row


def computer(device: str) -> tuple[str, dict[str, str]]:
    """What results are called by, and what they depend on."""
    told = {**machine.describe(), "threads": str(torch.get_num_threads())}
    if device == "cpu":
        return machine.name(), told
    gpu = torch.cuda.get_device_name()
    return re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-"), {**told, "gpu": gpu}


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for. Every row is kept as soon as it is there: a whole run takes hours."""
    chosen = parse(arguments)
    wanted = chosen.names or names()
    if chosen.list:
        print(listing(wanted, chosen.device))
        return 0
    strategies.load()
    allocator.prepare()  # as the server does
    called, told = computer(chosen.device)
    for name in wanted:
        limits = ceilings.measure(torch.device(chosen.device), quick=chosen.quick)
        print(report.ceilings(limits), flush=True)
        kind = "-".join([name, *(["scaling"] if chosen.scaling else []), *(["quick"] if chosen.quick else [])])
        rows: list[Row] = []
        for row in (row for benchmark in load(name) for row in run(benchmark, chosen, limits)):
            rows.append(row)
            result = {"machine": told, "device": chosen.device, "ceilings": limits, "rows": rows}
            print(f"kept in {machine.keep(kind, called, result, chosen.results)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
