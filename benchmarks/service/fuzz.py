"""What nobody should send, sent to a server of its own: it answers with a documented code, and lives.

    python -m benchmarks.service.fuzz --cases 1000 --seed 0

(seed, number) tells a case: `--only 1234` draws it again and sends it alone. Drawn by another program it may be
another: hypothesis looks for numbers to try in the modules that are loaded. So failures are told with every byte.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import grpc
import hypothesis
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import strategies as st
from tqdm import tqdm

from benchmarks.machine import Usage, in_flight
from benchmarks.service.answers import Wrong, check_answer, check_failure
from benchmarks.service.damage import Damage, StreamRequest
from benchmarks.service.loopback import QUIETLY, process
from benchmarks.service.requests import Descriptions, requests
from queryselect.v1 import selection_pb2, strategy_pb2, strategy_pb2_grpc

#: Limits that small messages can reach, and silence that is over soon.
LIMITS = "--max-rows 20000 --max-dims 4096 --max-classes 2000 --max-budget 1000 --max-host-bytes 500000000"
SERVER = ("-m", "benchmarks.service.fuzz_server", *QUIETLY, *LIMITS.split(), "--idle-stream", "1")

SELECTION = "queryselect.v1.SelectionService"
SELECT, STREAM = f"/{SELECTION}/Select", f"/{SELECTION}/SelectStream"
HEALTH = "/grpc.health.v1.Health/Check"
DESCRIPTIONS = ("/queryselect.v1.StrategyService/ListStrategies", "/queryselect.v1.ServerService/GetServerInfo", HEALTH)
#: Cases that hypothesis draws in one run: after the first few it would try variants of each, which are mostly the same.
GROUP = 10
#: Cases after which the server is looked at.
BATCH = 250
#: Cases under way at a time, so that one that waits holds nobody up.
AT_ONCE = 4
#: The longest that a case may take, in seconds, and what counts as long.
PATIENCE, LONG = 10.0, 1.0


@dataclass(frozen=True)
class Case:
    """What is sent. end: how a stream's messages end: "close", or "silence", or "cancel". files: that it refers to."""

    kind: str
    method: str
    messages: tuple[bytes, ...]
    end: str = "close"
    deadline: float = PATIENCE
    files: tuple[tuple[Path, bytes], ...] = ()

    def __str__(self) -> str:
        sizes = " ".join(str(len(each)) for each in self.messages)
        return f"{self.kind} {self.method.rpartition('/')[2]} ({sizes} bytes, {self.end}, {self.deadline:g} s)"


@st.composite
def cases(draw: st.DrawFn, descriptions: Descriptions, folder: Path) -> Case:
    """Cases of every kind. folder: where tensors may be read from."""
    number = draw(st.integers(0, 2**64 - 1))
    damage, good = Damage(draw, number), requests(descriptions, number)
    way, message = damage.integer(0, 23), draw(good)
    if way < 10:
        damage.message(message, damage.one_of((0, 0, 1, 1, 1, 2, 3, 6)))
        message.validate_only = damage.integer(0, 19) == 0
        return Case("structure", SELECT, (message.SerializeToString(),))
    if way < 13:
        data = message.SerializeToString()
        changed = damage.of_bytes(data, draw(good).SerializeToString(), damage.one_of((1, 1, 1, 2, 5)))
        if way == 12:
            return Case("bytes", damage.one_of(DESCRIPTIONS), (changed,))
        return Case("bytes", SELECT, (changed,))
    files = damage.refer(message, folder) if way > 19 else ()
    if damage.integer(0, 2) == 0:
        damage.message(message, damage.integer(1, 2))
    if way > 21:
        return Case("reference", SELECT, (message.SerializeToString(),), files=files)
    messages = damage.stream(message)
    if way == 13:
        messages = [damage.of_bytes(each, messages[0], 1) for each in messages]
    end = damage.one_of(("close",) * 14 + ("cancel",) * 3 + ("silence",))
    deadline = damage.one_of((PATIENCE,) * 14 + (0.0, 0.01, 0.1))
    kind = "bytes" if way == 13 else "reference" if files else "stream"
    return Case(kind, STREAM, tuple(messages), end, deadline, files)


def drawn(descriptions: Descriptions, folder: Path, seed: int, group: int) -> list[Case]:
    """One group of cases, the same for the same folder, seed and number of the group."""
    found: list[Case] = []

    @hypothesis.seed(seed * 1_000_003 + group)
    @hypothesis.settings(
        max_examples=1 + GROUP,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(cases(descriptions, folder))
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found[1:]  # the first is the simplest there is, in every group


@dataclass(frozen=True)
class Failure:
    """A case that was not answered as it should be; or, without a case, a batch before it that left a trace."""

    seed: int
    number: int
    case: Case | None
    wrong: str

    def __str__(self) -> str:
        if self.case is None:
            return f"seed {self.seed}, after case {self.number - 1}: {self.wrong}"
        data = " ".join(each.hex() for each in self.case.messages)
        files = "".join(f"\n  {path.name} {data.hex()}" for path, data in self.case.files)
        return f"seed {self.seed}, case {self.number}: {self.case}: {self.wrong}\n  {data}{files}"


@dataclass
class Outcome:
    """How a run went. codes: by kind of case. picked: strategies that gave picks. long: cases that took long."""

    codes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    picked: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    long: list[tuple[float, int, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        """How many were sent."""
        return sum(self.total.values())

    @property
    def total(self) -> Counter[str]:
        """The codes of all kinds together."""
        return sum(self.codes.values(), Counter[str]())

    def __str__(self) -> str:
        lines = [f"{self.cases} cases in {self.seconds:.0f} s, {len(self.failures)} not answered as they should be"]
        for kind, codes in [*sorted(self.codes.items()), ("all", self.total)]:
            lines.append(f"  {kind}: " + ", ".join(f"{code} {count}" for code, count in codes.most_common()))
        lines += [f"  {seconds:.1f} s: case {number}, {what}" for seconds, number, what in sorted(self.long)[:-11:-1]]
        return "\n".join([*lines, *map(str, self.failures)])


def fuzz(
    target: str,
    folder: Path,
    cases: int,
    seed: int,
    settled: Callable[[], None] = lambda: None,
    progress: Callable[[int], object] = lambda _: None,
) -> Outcome:
    """Sends so many cases. folder: which the server may read.

    settled: called after each batch; raises where the server is not as it was.
    progress: told how many cases were sent since it was told last.
    """
    outcome, started = Outcome(), time.monotonic()
    with grpc.insecure_channel(target) as channel, ThreadPoolExecutor(AT_ONCE) as threads:
        descriptions = described(channel)
        for first in range(0, cases, BATCH):
            groups = range(first // GROUP, (first + BATCH) // GROUP)
            batch = [case for group in groups for case in drawn(descriptions, folder, seed, group)][: cases - first]
            answers = threads.map(lambda case: send(channel, case), batch)
            for number, (case, answer) in enumerate(zip(batch, answers, strict=True), first):
                _note(outcome, seed, number, case, answer)
            progress(len(batch))
            try:
                settled()
            except Wrong as wrong:
                outcome.failures.append(Failure(seed, first + len(batch), None, str(wrong)))
    outcome.seconds = time.monotonic() - started
    return outcome


def _note(outcome: Outcome, seed: int, number: int, case: Case, answer: Answer) -> None:
    outcome.codes[case.kind][answer.code] += 1
    if answer.picked:
        outcome.picked[answer.picked] += 1
    if answer.wrong:
        outcome.failures.append(Failure(seed, number, case, answer.wrong))
    if answer.seconds > LONG and case.end != "silence":
        outcome.long.append((answer.seconds, number, f"{case} {answer.code} {answer.picked}"))


def described(channel: grpc.Channel) -> Descriptions:
    """What the server says of its strategies, by name."""
    answer = strategy_pb2_grpc.StrategyServiceStub(channel).ListStrategies(strategy_pb2.ListStrategiesRequest())
    return Descriptions((each.name, each) for each in answer.strategies)


# One case


@dataclass(frozen=True)
class Answer:
    """How one case was answered. picked: the strategy, where there were picks; wrong: what should not be so."""

    code: str
    seconds: float
    picked: str = ""
    wrong: str = ""


def send(channel: grpc.Channel, case: Case) -> Answer:
    """Sends a case and looks at what comes back."""
    for path, data in case.files:
        path.write_bytes(data)
    started, picked, wrong, code = time.monotonic(), "", "", grpc.StatusCode.OK
    try:
        picked = _stream(channel, case) if case.method == STREAM else _unary(channel, case)
    except grpc.RpcError as error:
        code = error.code()
        try:
            check_failure(error, ours=case.method != HEALTH)
        except Wrong as found:
            wrong = str(found)
    except Wrong as found:
        wrong = str(found)
    return Answer(code.name, time.monotonic() - started, picked, wrong)


def _unary(channel: grpc.Channel, case: Case) -> str:
    (data,) = case.messages
    call: Any = channel.unary_unary(case.method)  # without serializers bytes go as they are, which its stubs don't know
    answer = call(data, timeout=case.deadline)
    if case.method != SELECT:
        return ""
    message = selection_pb2.SelectResponse.FromString(answer)
    check_answer(selection_pb2.SelectRequest.FromString(data), message)
    return _strategy(message)


def _strategy(answer: selection_pb2.SelectResponse) -> str:
    """The strategy behind the picks, if there are picks."""
    kind = answer.strategy.WhichOneof("kind") or ""
    name = answer.strategy.custom.name if kind == "custom" else kind
    return name if answer.HasField("indices") else ""


def _stream(channel: grpc.Channel, case: Case) -> str:
    ended = threading.Event()

    def messages() -> Iterator[bytes]:
        yield from case.messages
        if case.end == "silence":
            ended.wait(PATIENCE)

    method: Any = channel.stream_stream(case.method)
    call, picked, answered = method(messages(), timeout=case.deadline), "", False
    call.add_callback(ended.set)
    try:
        for data in call:
            message = selection_pb2.SelectStreamResponse.FromString(data)
            if message.HasField("result"):
                check_answer(_start(case), message.result)
                picked, answered = _strategy(message.result), True
            if case.end == "cancel":
                call.cancel()
    finally:
        ended.set()
        call.cancel()
    if not answered:
        raise Wrong("the stream ended well, without a result")
    return picked


def _start(case: Case) -> selection_pb2.SelectRequest:
    """The request that a stream's first message makes."""
    try:
        return StreamRequest.FromString(case.messages[0]).start
    except DecodeError as error:
        raise Wrong("a start that can't be read was answered with a result") from error


# A server of its own


@contextmanager
def fuzzed_server() -> Iterator[tuple[str, Path, int, Callable[[], None]]]:
    """A server with small limits.

    Its address, a folder that it may read, its process, and what raises Wrong where it is not as it was.
    """
    with (
        tempfile.NamedTemporaryFile("w") as errors,
        tempfile.TemporaryDirectory() as folder,
        process(*SERVER, "--allow-uris", Path(folder).as_uri(), errors=errors) as (pid, (port, metrics)),
        Path(errors.name).open() as log,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield f"127.0.0.1:{port}", Path(folder), pid, lambda: check_settled(channel, metrics, log)


def check_settled(channel: grpc.Channel, metrics: int, log: IO[str]) -> None:
    """Raises Wrong where a server does not serve, holds something for nobody, or said something new in its log."""
    health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs lack the methods
    answer = health.Check(health_pb2.HealthCheckRequest(service=SELECTION), timeout=PATIENCE)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Wrong(f"the server is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")
    until = time.monotonic() + PATIENCE
    while held := in_flight(metrics):
        if time.monotonic() > until:
            raise Wrong(f"{held} requests are still in flight")
        time.sleep(0.01)
    if said := log.read():
        raise Wrong(f"the server said:\n{said}")


def measure(*, quick: bool = False) -> dict[str, Any]:
    """The part of `make bench-service`."""
    outcome, grown = _run(200 if quick else 5000, 0)
    return {
        "cases": outcome.cases,
        "seconds": outcome.seconds,
        "codes": {kind: dict(codes) for kind, codes in outcome.codes.items()},
        "failures": [str(each) for each in outcome.failures],
        "long": [f"{seconds:.1f} s: {what}" for seconds, _, what in sorted(outcome.long)[:-11:-1]],
        "grown MB": grown,
        "said": str(outcome),
    }


def show(found: dict[str, Any]) -> str:
    """For people."""
    return f"{found['said']}\n  the server's memory grew by {found['grown MB']:.0f} MB"


def _run(cases: int, seed: int) -> tuple[Outcome, float]:
    """The outcome of so many cases, and by how many MB the memory of the server grew."""
    with fuzzed_server() as (target, folder, pid, settled), tqdm(total=cases, unit=" cases") as bar:
        usage = Usage(pid)
        return fuzz(target, folder, cases, seed, settled, bar.update), usage.now


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for; 1 where something was not answered as it should be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service.fuzz", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--cases", type=int, default=1000, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default %(default)s)")
    parser.add_argument("--only", type=int, help="the number of a case to send alone, and to keep as files")
    chosen = parser.parse_args(arguments)
    if chosen.only is not None:
        with fuzzed_server() as (target, folder, _, settled):
            return _again(target, folder, chosen.seed, chosen.only, settled)
    outcome, grown = _run(chosen.cases, chosen.seed)
    print(outcome)
    print(f"  the server's memory grew by {grown:.0f} MB")
    return bool(outcome.failures)


def _again(target: str, folder: Path, seed: int, number: int, settled: Callable[[], None]) -> int:
    """Sends one case once more."""
    with grpc.insecure_channel(target) as channel:
        case = drawn(described(channel), folder, seed, number // GROUP)[number % GROUP]
        for at, data in enumerate((*case.messages, *(data for _, data in case.files))):
            Path(f"case-{seed}-{number}-{at}.bin").write_bytes(data)
        answer = send(channel, case)
    print(case, answer, sep="\n")
    settled()
    return bool(answer.wrong)


if __name__ == "__main__":
    sys.exit(main())
