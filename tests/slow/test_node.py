"""The client of examples/node against a server: the picks of the Python client, errors read, calls that end at once."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme

from queryselect import Client, _tokens
from queryselect.v1 import selection_pb2, selection_pb2_grpc
from tests.slow import pool
from tests.slow.servers import Served, served, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parent.parent.parent
#: A strategy that takes so long, as a message in JavaScript.
SLEEPY = """{
  pool: { num_rows: 10 }, stop: { max_items: 2 },
  strategy: { custom: { name: 'sleepy', parameters: { fields: { seconds: { numberValue: 60 } } } } },
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The example with what it needs, as far from the repository's own folder as a user's copy."""
    root = tmp_path_factory.mktemp("node")
    (root / "examples").mkdir()
    (root / "proto").symlink_to(ROOT / "proto")
    (root / "examples" / "proto").symlink_to(ROOT / "examples" / "proto")
    copy = root / "examples" / "node"
    shutil.copytree(ROOT / "examples" / "node", copy, ignore=shutil.ignore_patterns("node_modules"))
    done = subprocess.run(["npm", "ci", "--ignore-scripts"], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


@contextmanager
def begun(folder: Path, code: str, *arguments: str, **options) -> Iterator[subprocess.Popen[str]]:
    """A program of its own that has what queryselect.js exports, and `client` where its first argument is a target."""
    text = f"""
import * as queryselect from './queryselect.js';
const {{ Client, QuerySelectError, picks, retried, rows, tensor }} = queryselect;
const [target, ...more] = process.argv.slice(1);
const asked = async (call) => {{
  try {{ return {{ answer: await call() }}; }}
  catch (error) {{ return {{ name: error.name, message: error.message, ...error }}; }}
}};
const say = (value) => console.log(JSON.stringify(value));
{code}"""
    with subprocess.Popen(
        ["node", "--input-type=module", "--eval", text, *arguments],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def said(folder: Path, code: str, *arguments: str):
    """What such a program says, which must end well."""
    with begun(folder, code, *arguments) as running:
        out, _ = running.communicate(timeout=120)
        assert running.returncode == 0
        return json.loads(out)


def example(folder: Path, name: str, target: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["node", f"{name}.js", target], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_lock_names_no_registry():
    lock = json.loads((ROOT / "examples" / "node" / "package-lock.json").read_text())
    installed = {name: each for name, each in lock["packages"].items() if name}
    assert installed
    assert all("integrity" in each and "resolved" not in each for each in installed.values())


def test_unary_picks_are_those_of_the_python_client(folder, server):
    lines = dict(line.split(" ", 1) for line in example(folder, "select", server.target).stdout.splitlines())
    context = {"labeled": [0, 1, 2]}
    parameters = {"ridge": 0.5, "fisher_scale": "SUM", "top_classes": 2}
    both = {"embeddings": pool.embeddings(1000), "logits": pool.logits(1000)}
    with Client(server.target) as client:
        far = {"embeddings": both["embeddings"], "params": {"normalize": True}}
        assert {name: json.loads(line) for name, line in lines.items()} == {
            "margin": pool.picks(client, "margin", 5, logits=both["logits"], **context),
            "k_center_greedy": pool.picks(client, "k_center_greedy", 5, **far, **context),
            "bait": pool.picks(client, "bait", 5, **both, **context, params=parameters),
        }


def test_a_stream_there_and_back_is_that_of_the_python_client(folder, server):
    """7 MB in two tensors there, and scores of more than 1 MiB back, which come in chunks."""
    before = server.ended("SelectStream", "OK")
    done = example(folder, "stream", server.target)
    assert server.ended("SelectStream", "OK") == before + 1
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    inputs = {"embeddings": pool.embeddings(150_000), "logits": pool.logits(150_000)}
    with Client(server.target) as client:
        wanted = client.select("expected_gradient_length", 5, **inputs, return_pool_scores=True)
    assert json.loads(lines["picks"]) == [{"row": row, "score": score} for row, score in wanted]
    rows, highest = lines["scores"].split()
    assert (int(rows), float(highest)) == (150_000, wanted.pool_scores[:1000].max())
    assert "PHASE_RECEIVING" in done.stderr


def test_errors_tell_what_is_wrong_and_where(folder, server):
    told = [json.loads(line) for line in example(folder, "wrong", server.target).stdout.splitlines()]
    assert [(each["code"], each["reason"], each["field"]) for each in told] == [
        ("INVALID_ARGUMENT", "INVALID_INPUT", "pool.embeddings"),
        ("INVALID_ARGUMENT", "INVALID_INPUT", "pool.logits"),
        ("INVALID_ARGUMENT", "INVALID_INPUT", "stop.max_items"),
        ("UNIMPLEMENTED", "UNSUPPORTED", "pool.model"),
    ]
    assert "row 6" in told[1]["message"]


def test_the_stored_requests_are_answered_as_is_stored(folder, server):
    lines = example(folder, "replay", server.target).stdout.splitlines()
    cases = json.loads((ROOT / "proto" / "testdata" / "manifest.json").read_text())["cases"]
    assert lines == [f"as stored {each['name']} {each['code']}" for each in cases]


def test_numbers_of_64_bits_and_masks_and_descriptions(folder, server):
    """A seed beyond 2^53, a mask, ids of BigInt; the server described."""
    told = said(
        folder,
        """
const client = new Client(target);
const request = {
  pool: {
    num_rows: 3000, excluded: queryselect.mask(Array.from({ length: 3000 }, (_, row) => row % 3 === 0)),
    ids: { integers: tensor(BigInt64Array.from({ length: 3000 }, (_, row) => 2n ** 60n + BigInt(row))) },
  },
  strategy: { random: {} }, stop: { max_items: 4 }, seed: (2n ** 63n + 1n).toString(),
};
const answer = await client.select(request);
say({
  picks: picks(answer), seed: answer.info.seed, ids: queryselect.elements(answer.ids.integers).map(String).join(),
  strategies: (await client.strategies()).map((each) => each.name), version: (await client.serverInfo()).version,
});
client.close();""",
        server.target,
    )
    with Client(server.target) as client:
        options = {"num_rows": 3000, "excluded": np.arange(3000) % 3 == 0, "seed": 2**63 + 1}
        wanted = pool.picks(client, "random", 4, **options)
        assert told["strategies"] == [each.name for each in client.strategies()]
        assert told["version"] == client.server_info().version
    assert (told["picks"], told["seed"]) == (wanted, str(2**63 + 1))
    assert told["ids"] == ",".join(str(2**60 + each["row"]) for each in wanted)


def test_a_full_server_says_when_to_come_back_and_is_tried_again(folder):
    """One selection has the device and one waits, which is all that there is room for."""
    code = f"""
const client = new Client(target);
const controller = new AbortController();
const sleep = () => client.select({SLEEPY}, {{ signal: controller.signal }});
const busy = await asked(() => Promise.race([sleep(), sleep(), sleep()]));
let tries = 0;
const answer = await retried(() => {{
  tries += 1;
  if (tries === 2) controller.abort();
  return client.select({{ pool: {{ num_rows: 5 }}, strategy: {{ random: {{}} }}, stop: {{ max_items: 1 }} }});
}}, 1000);
say({{ busy, tries, picked: picks(answer).length }});
client.close();"""
    with served("--max-queue", "1") as running:
        told = said(folder, code, running.target)
    busy = told["busy"]
    assert (busy["name"], busy["code"], busy["reason"]) == ("QuerySelectError", "RESOURCE_EXHAUSTED", "BUSY")
    assert busy["retryable"]
    assert busy["retryAfter"] > 0
    assert told["picked"] == 1
    assert told["tries"] >= 2


def test_a_token_over_tls(folder, tmp_path):
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "tls.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    token, salt, digest = _tokens.make("studio")
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f'[[tokens]]\nname = "studio"\nsalt = "{salt.hex()}"\nhash = "{digest.hex()}"\n')
    code = """
const [token, ca] = [more[0], (await import('node:fs')).readFileSync(more[1])];
const request = { pool: { num_rows: 5 }, strategy: { random: {} }, stop: { max_items: 1 } };
const found = {};
const ways = { token: { tls: ca, token }, none: { tls: ca }, strange: { tls: true, token } };
for (const [name, options] of Object.entries(ways)) {
  const client = new Client(target, options);
  for (const way of ['select', 'stream']) {
    found[`${name} ${way}`] = await asked(async () => picks(await client[way](request, { timeout: 20_000 })).length);
  }
  client.close();
}
found.clear = await asked(async () => new Client(target, { token }));
say(found);"""
    pair = ("--tls-cert", str(tmp_path / "tls.pem"), "--tls-key", str(tmp_path / "tls.pem"))
    with served(*pair, "--token-file", str(tokens)) as running:
        told = said(folder, code, running.target, token, str(tmp_path / "ca.pem"))
    for way in ("select", "stream"):
        assert told[f"token {way}"] == {"answer": 1}
        none, strange = told[f"none {way}"], told[f"strange {way}"]
        assert (none["code"], none["reason"], none["retryable"]) == ("UNAUTHENTICATED", "UNAUTHENTICATED", False)
        assert (strange["code"], strange["retryable"]) == ("UNAVAILABLE", True)
    assert "clear text" in told["clear"]["message"]


@pytest.mark.parametrize("way", ["select", "stream"])
def test_a_cancelled_call_frees_the_server(folder, server, way):
    code = f"""
const client = new Client(target);
const controller = new AbortController();
process.stdin.once('data', () => controller.abort());
say(await asked(() => client.{way}({SLEEPY}, {{ signal: controller.signal }})));
say(await asked(() => client.{way}({SLEEPY}, {{ signal: controller.signal }})));
client.close();
process.stdin.destroy();"""
    with begun(folder, code, server.target) as program:
        wait_for(lambda: server.held == (1, 0))
        program.stdin.write("now\n")
        program.stdin.flush()
        first, second = (json.loads(program.stdout.readline()) for _ in range(2))
        assert program.wait(30) == 0
    assert first["code"] == second["code"] == "CANCELLED"  # the second before it began
    server.until_free()


@pytest.mark.parametrize("way", ["select", "stream"])
def test_a_deadline_frees_the_server(folder, server, way):
    code = f"""
const client = new Client(target);
say(await asked(() => client.{way}({SLEEPY}, {{ timeout: 1000 }})));
client.close();"""
    assert said(folder, code, server.target)["code"] == "DEADLINE_EXCEEDED"
    server.until_free()


def test_an_error_of_the_callers_own_ends_the_stream(folder, server):
    """It is the one that is raised, and nothing else ends the program."""
    code = """
const client = new Client(target);
const request = {
  pool: { embeddings: tensor(new Float32Array(8_000_000), [1_000_000, 8]) },
  strategy: { k_center_greedy: {} }, stop: { max_items: 2 },
};
say(await asked(() => client.stream(request, { onProgress: () => { throw new Error('mine'); } })));
say(await asked(async () => (await client.strategies()).length > 0));
client.close();"""
    with begun(folder, code, server.target) as program:
        first, second = map(json.loads, program.communicate(timeout=120)[0].splitlines())
        assert program.returncode == 0
    assert (first["message"], second) == ("mine", {"answer": True})
    server.until_free()


def test_bytes_that_change_on_their_way_are_data_loss(folder, server):
    code = """
import zlib from 'node:zlib';
zlib.crc32 = () => 1;
const client = new Client(target);
const request = {
  pool: { embeddings: tensor(new Float32Array(800_000), [100_000, 8]) },
  strategy: { k_center_greedy: {} }, stop: { max_items: 2 },
};
let tries = 0;
say([await asked(() => retried(() => { tries += 1; return client.stream(request); })), tries]);
client.close();"""
    told, tries = said(folder, code, server.target)
    assert (told["code"], told["reason"], tries) == ("DATA_LOSS", "DATA_LOSS", 2)  # tried again, once
    server.until_free()


#: Rows are scored as they come, and what the server needs for them comes in the wrong order in the request.
ORDERS = {
    "rows of two tensors": ("{ embeddings, logits }", "{ expected_gradient_length: {} }"),
    "a list of rows": ("{ logits, excluded }", "{ margin: {} }"),
    "a long list of rows": ("{ logits, excluded: many }", "{ margin: {} }"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_server_holds_little_of_a_pool_that_it_scores_as_it_comes(folder, order):
    """A pool of 58 MB or more, where there is room for 42."""
    inputs, strategy = ORDERS[order]
    code = f"""
const N = 600_000;
const tall = (columns) => tensor(Float32Array.from({{ length: N * columns }}, (_, at) => at % 97), [N, columns]);
const [embeddings, logits] = [tall(24), tall(24)];
const [excluded, many] = [20_000, 590_000].map((count) => rows(Array.from({{ length: count }}, (_, row) => row)));
const client = new Client(target);
const request = {{ pool: {inputs}, strategy: {strategy}, stop: {{ max_items: 1 }}, validate_only: true }};
say(await asked(() => client.stream(request)));
client.close();"""
    with served("--max-host-bytes", str(40 << 20)) as running:
        told = said(folder, code, running.target)
    assert "answer" in told, told


def test_names_that_the_proto_does_not_have_are_told(folder):
    """protobuf.js leaves them out, and rows that were to be left alone would be chosen."""
    code = """
const client = new Client('localhost:1');
const good = { pool: { num_rows: 5 }, strategy: { random: {} }, stop: { max_items: 1 } };
const wrong = [
  { exclude: 1 }, { pool: { exclude: rows([1]) } }, { task: 'MULTI' }, { returns: ['POOL_SCORES'] }, { seed: 'x' },
  { strategy: { bait: { rigde: 2 } } }, { pool: { quotas: [{ limits: [{ value: 1, most: 2 }] }] } },
  { pool: { labeled: { ...rows([1]), data: new Int32Array(2) } } },
  { strategy: { custom: { name: 'sleepy', parameters: { fields: { seconds: { number_value: 60 } } } } } },
];
const right = [
  { seed: 5n }, { seed: 0 }, { task: undefined }, { returns: [] }, { pool: { inputs: {}, labeled: rows([]) } },
  { request_id: 'a' }, { task: 'TASK_MULTILABEL', validate_only: false }, { task: 2 },
  { pool: { ids: { strings: { values: ['a', ''] } } } },
];
const told = [];
for (const each of [...wrong, ...right]) {
  for (const way of ['select', 'stream']) told.push((await asked(() => client[way]({ ...good, ...each }))));
}
say({ names: told.map((each) => each.name), messages: told.map((each) => each.message), wrong: wrong.length });
client.close();"""
    told = said(folder, code)
    wrong = 2 * told["wrong"]
    assert set(told["names"][:wrong]) == {"TypeError"}
    assert set(told["names"][wrong:]) == {"QuerySelectError"}  # there is no server
    assert [message.split(" ")[0] for message in told["messages"][:wrong:2]] == [
        *("exclude", "pool.exclude.dtype", "task", "returns[0]", "seed", "strategy.bait.rigde"),
        *("pool.quotas[0].limits[0].most", "pool.labeled.data"),
        "strategy.custom.parameters.fields.seconds.number_value",
    ]


def test_what_fails_while_chunks_are_made_is_raised(folder, server):
    code = """
import zlib from 'node:zlib';
zlib.crc32 = () => { throw new Error('mine'); };
const client = new Client(target);
const request = {
  pool: { embeddings: tensor(new Float32Array(800_000), [100_000, 8]) },
  strategy: { k_center_greedy: {} }, stop: { max_items: 2 },
};
say(await asked(() => client.stream(request)));
client.close();"""
    assert said(folder, code, server.target)["message"] == "mine"
    server.until_free()


def test_a_refusal_in_mid_upload_is_told(folder, server):
    """The first row is wrong, and 120 MB would follow."""
    code = """
const values = new Float32Array(30_000_000);
values[0] = NaN;
const client = new Client(target);
const request = { pool: { logits: tensor(values, [3_000_000, 10]) }, strategy: { margin: {} }, stop: { max_items: 1 } };
say(await asked(() => client.stream(request)));
client.close();"""
    told = said(folder, code, server.target)
    assert (told["code"], told["field"], told["retryable"]) == ("INVALID_ARGUMENT", "pool.logits", False)


def test_a_server_that_dies_in_mid_upload_is_unavailable(folder):
    code = """
const client = new Client(target);
const values = new Float32Array(75_000_000);
const request = { pool: { embeddings: tensor(values, [750_000, 100]) }, strategy: { k_center_greedy: {} },
                  stop: { max_items: 1 } };
let begun = false;
const onProgress = () => { if (!begun) say(begun = true); };
say(await asked(() => client.stream(request, { onProgress })));
client.close();"""
    with served() as running, begun(folder, code, running.target) as program:
        assert json.loads(program.stdout.readline()) is True
        running.process.kill()
        told = json.loads(program.stdout.readline())
        assert program.wait(60) == 0
    assert (told["name"], told["code"], told["retryable"]) == ("QuerySelectError", "UNAVAILABLE", True)


class Odd(selection_pb2_grpc.SelectionServiceServicer):
    """What a proxy in between may make of calls: details that are none, and a stream that ends before its answer."""

    def Select(self, request, context):
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff garbage"),))
        context.abort(grpc.StatusCode.UNAVAILABLE, "a proxy's words")

    def SelectStream(self, request_iterator, context):
        next(request_iterator)
        yield selection_pb2.SelectStreamResponse(admitted={})
        if not sum(len(each.chunk.data) for each in request_iterator):
            context.abort(grpc.StatusCode.ABORTED, "nothing came")


def test_what_no_server_of_ours_answers_ends_no_program(folder):
    code = """
const client = new Client(target);
const request = { pool: { embeddings: tensor(new Float32Array(80_000), [10_000, 8]) } };
say([await asked(() => client.select(request)), await asked(() => client.stream(request))]);
client.close();"""
    own = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    selection_pb2_grpc.add_SelectionServiceServicer_to_server(Odd(), own)
    port = own.add_insecure_port("127.0.0.1:0")
    own.start()
    try:
        select, stream = said(folder, code, f"127.0.0.1:{port}")
    finally:
        own.stop(0).wait()
    told = [(each["name"], each["code"], each["reason"], each["retryable"]) for each in (select, stream)]
    assert told == [("QuerySelectError", "UNAVAILABLE", "", True), ("QuerySelectError", "DATA_LOSS", "", True)]
    assert "proxy" in select["message"]
