"""Tensors by reference: the same picks as by value, whatever the scheme and the format; versions; what goes wrong."""

from __future__ import annotations

import gc
import io
import json
import logging
import threading
import time
import weakref
from contextlib import ExitStack, suppress
from email.utils import formatdate

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from moto.server import ThreadedMotoServer

import queryselect
from queryselect import Client, RowRange, TensorRef
from queryselect_service import server
from queryselect_service.settings import Settings
from queryselect_service.sources import fetch, https, objects, s3
from tests.service.stores import Store, npy
from tests.waiting import until

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(500, 4)).astype(np.float32)
EMBEDDINGS = RNG.normal(size=(500, 8)).astype(np.float32)


@pytest.fixture
def serving():
    """Starts servers that allow what is said; clients to them."""
    with ExitStack() as stack:

        def begin(allow: str, **options) -> Client:
            started = server.start(Settings(port=0, metrics_port=-1, allow_uris=allow, **options))
            stack.callback(started.drain, 0.5)
            return stack.enter_context(Client(f"127.0.0.1:{started.port}", retries=0))

        yield begin


@pytest.fixture
def files(tmp_path, serving):
    """A client of a server that allows a directory, and what makes references to files in it."""
    client = serving(tmp_path.as_uri())

    def write(name: str, data: bytes, **choice) -> TensorRef:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return TensorRef(uri=path.as_uri(), **choice)

    return client, write


def aged(seconds: float) -> dict[str, str]:
    """What is told of an object that changed so long ago, beside the date of the answer."""
    return {"Last-Modified": formatdate(time.time() - seconds, usegmt=True)}


@pytest.fixture
def web(trusted):
    """A store over https."""
    store = Store()
    stop = store.start(trusted)
    yield store
    stop()


@pytest.fixture(scope="session")
def bucket_server():
    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    yield "http://{}:{}".format(*started.get_host_and_port())
    started.stop()


def s3_environment(monkeypatch, endpoint: str) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-server",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3._client.cache_clear()


@pytest.fixture
def bucket(bucket_server, monkeypatch):
    """A client of S3 with an empty bucket `pools`."""
    s3_environment(monkeypatch, bucket_server)
    client = s3._client()
    client.create_bucket(Bucket="pools")
    yield client
    for each in client.list_objects_v2(Bucket="pools").get("Contents", ()):
        client.delete_object(Bucket="pools", Key=each["Key"])
    client.delete_bucket(Bucket="pools")
    s3._client.cache_clear()


def same(by_reference, by_value) -> None:
    np.testing.assert_array_equal(by_reference.indices, by_value.indices)
    np.testing.assert_array_equal(by_reference.scores, by_value.scores)


def table(array) -> pa.Table:
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(array.reshape(len(array), 2, -1))
    return pa.table(
        {"fixed": fixed, "lists": list(array), "tensors": tensors, "first": array[:, 0], "name": ["x"] * len(array)}
    )


def parquet(content: pa.Table) -> bytes:
    out = io.BytesIO()
    pa.parquet.write_table(content, out, row_group_size=70)
    return out.getvalue()


def arrow(content: pa.Table, compression: str = "uncompressed") -> bytes:
    out = io.BytesIO()
    pa.feather.write_feather(content, out, chunksize=70, compression=compression)
    return out.getvalue()


def safetensors(**tensors: np.ndarray) -> bytes:
    names, header, data = {"<f4": "F32", "<f2": "F16", "<i8": "I64", "|b1": "BOOL"}, {"__metadata__": {"a": "b"}}, b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": names[array.dtype.str], "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


FORMATS = [
    ("a.npy", npy(LOGITS), {}),
    ("a.safetensors", safetensors(logits=LOGITS), {}),
    ("b.safetensors", safetensors(other=EMBEDDINGS, logits=LOGITS), {"column": "logits"}),
    *[("a.parquet", parquet(table(LOGITS)), {"column": each}) for each in ("fixed", "lists", "tensors")],
    *[("a.arrow", arrow(table(LOGITS)), {"column": each}) for each in ("fixed", "lists", "tensors")],
    ("a.feather", arrow(table(LOGITS), "zstd"), {"column": "fixed"}),
    ("b.parquet", parquet(pa.table({"only": list(LOGITS)})), {}),
    ("noname", npy(LOGITS), {"format": queryselect.TENSOR_FORMAT_NPY}),
]


class TestFormats:
    @pytest.mark.parametrize(("name", "data", "choice"), FORMATS, ids=[f"{a}-{c}" for a, _, c in FORMATS])
    @pytest.mark.parametrize("pieces", [4 << 20, 100])
    def test_same_picks(self, files, local, monkeypatch, name, data, choice, pieces):
        for module in (objects, __import__("queryselect_service.sources.columns", fromlist=["_"])):
            monkeypatch.setattr(module, "PIECE_BYTES", pieces)
        monkeypatch.setattr(fetch, "PART_BYTES", min(pieces, 1 << 20))
        client, write = files
        if choice.get("column") == "tensors":
            choice = {**choice}
            samples = LOGITS.reshape(500, 2, 2)
            by_value = local.select("entropy", budget=5, samples=samples, samples_kind="LOGITS")
            ref = write(name, data, **choice)
            same(client.select("entropy", budget=5, samples=ref, samples_kind="LOGITS"), by_value)
            return
        ref = write(name, data, **choice)
        picks = client.select("margin", budget=5, logits=ref, return_pool_scores=True)
        by_value = local.select("margin", budget=5, logits=LOGITS, return_pool_scores=True)
        same(picks, by_value)
        np.testing.assert_array_equal(picks.pool_scores, by_value.pool_scores)
        ((path, uri, version),) = picks.info.sources
        assert (path, uri) == ("pool.logits", ref.uri)
        assert version
        ref.rows.extend([RowRange(start=130, stop=290), RowRange(start=3, stop=4), RowRange(start=60, stop=71)])
        some = np.concatenate([LOGITS[130:290], LOGITS[3:4], LOGITS[60:71]])
        same(client.select("margin", budget=5, logits=ref), local.select("margin", budget=5, logits=some))

    @pytest.mark.parametrize(
        "dtype", [np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_], ids=lambda x: x.__name__
    )
    @pytest.mark.parametrize("form", ["npy", "parquet", "arrow"])
    def test_types(self, files, dtype, form):
        client, write = files
        values = (RNG.random(100) * 2).astype(dtype)
        column = pa.table({"x": values})
        data = {"npy": lambda: npy(values), "parquet": lambda: parquet(column), "arrow": lambda: arrow(column)}[form]()
        ref = write(f"x.{form}", data)
        if dtype in (np.int64, np.int32):  # the groups of rows
            quota = {"name": "g", "values": ref, "default_max": 1}
            assert len(client.select("random", budget=2, num_rows=100, quotas=[quota])) == 2
        elif dtype is np.bool_:
            found = client.select("random", budget=3, num_rows=100, candidates=ref).indices
            assert values[found].all()
        elif dtype is np.uint8:
            with pytest.raises(queryselect.InvalidInput, match=r"needs type .*; it has uint8"):
                client.select("random", budget=3, num_rows=100, candidates=ref)
        else:
            by_value = client.select("random", budget=3, costs=values, cost_budget=2.0)
            same(client.select("random", budget=3, costs=ref, cost_budget=2.0), by_value)

    def test_bfloat16(self, files, local):
        client, write = files
        values = torch.from_numpy(LOGITS).bfloat16()
        header = json.dumps({"x": {"dtype": "BF16", "shape": [500, 4], "data_offsets": [0, 4000]}}).encode()
        data = len(header).to_bytes(8, "little") + header + values.view(torch.int16).numpy().tobytes()
        ref = write("x.safetensors", data)
        same(client.select("margin", budget=5, logits=ref), local.select("margin", budget=5, logits=values))

    def test_shape_as_declared(self, files, remote, local):
        """The request may say type and shape, and then must be right; entries of a row may be laid out otherwise."""
        from queryselect.v1 import selection_pb2, tensor_pb2

        client, write = files
        ref = write("x.npy", npy(LOGITS))

        def ask(**said):
            message = selection_pb2.SelectRequest()
            message.pool.samples.CopyFrom(tensor_pb2.Tensor(ref=ref, **said))
            message.pool.samples_kind = selection_pb2.SAMPLES_KIND_LOGITS
            message.strategy.entropy.SetInParent()
            message.stop.max_items = 3
            return client._transport._ready.selection.Select(message)

        found = ask(dtype=tensor_pb2.DATA_TYPE_F32, shape=[500, 2, 2])
        by_value = local.select("entropy", budget=3, samples=LOGITS.reshape(500, 2, 2), samples_kind="LOGITS")
        np.testing.assert_array_equal(np.frombuffer(found.indices.data, np.int64), by_value.indices)
        for said in ({"dtype": tensor_pb2.DATA_TYPE_F64}, {"shape": [250, 4, 2]}, {"shape": [500, 2, 3]}):
            with pytest.raises(Exception, match=r"there is float32 \(500 4\)"):
                ask(**said)

    BROKEN = [
        ("empty.npy", b"", {}),
        ("x.npy", b"not numpy at all, and long enough to be a header of something", {}),
        ("objects.npy", npy(np.array([{"a": 1}], dtype=object)), {}),
        ("structured.npy", npy(np.zeros(3, dtype=[("a", "f4")])), {}),
        ("big_endian.npy", npy(LOGITS.astype(">f4")), {}),
        ("fortran.npy", npy(np.asfortranarray(LOGITS)), {}),
        ("short.npy", npy(LOGITS)[:-1], {}),
        ("complex.npy", npy(LOGITS.astype(np.complex64)), {}),
        ("huge.npy", npy(LOGITS).replace(b"(500, 4)", b"(5" + b"0" * 30 + b", 4)"), {}),
        ("negative.npy", npy(LOGITS).replace(b"(500, 4)", b"(-50, 4)"), {}),
        ("nested.npy", b"\x93NUMPY\x01\x00\x40\x1f" + b"(" * 8000, {}),
        ("call.npy", b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os').system('true')".ljust(64), {}),
        ("version.npy", b"\x93NUMPY\x09\x00\x40\x00" + b" " * 64, {}),
        ("column.npy", npy(LOGITS), {"column": "a"}),
        ("rows.npy", npy(LOGITS), {"rows": [RowRange(start=400, stop=501)]}),
        ("scalar.npy", npy(np.float32(1)), {"rows": [RowRange(start=0, stop=1)]}),
        ("x.safetensors", b"\xff" * 100, {}),
        ("long.safetensors", (1 << 62).to_bytes(8, "little") + b"{}", {}),
        ("nested.safetensors", (4000).to_bytes(8, "little") + b"[" * 4000, {}),
        ("list.safetensors", (2).to_bytes(8, "little") + b"[]", {}),
        ("two.safetensors", safetensors(a=LOGITS, b=LOGITS), {}),
        ("other.safetensors", safetensors(a=LOGITS, b=LOGITS), {"column": "c"}),
        ("beyond.safetensors", safetensors(a=LOGITS)[:-1], {}),
        ("lies.safetensors", safetensors(a=LOGITS).replace(b"[500, 4]", b"[5000, 4]"), {}),
        ("minus.safetensors", safetensors(a=LOGITS).replace(b"[500, 4]", b"[-500, -4]"), {}),
        ("floats.safetensors", safetensors(a=LOGITS).replace(b"[500, 4]", b"[5e2, 4.0]"), {}),
        ("type.safetensors", safetensors(a=LOGITS).replace(b"F32", b"F8x"), {}),
        ("x.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", {}),
        ("long.parquet", b"PAR1" + b"\xff" * 40 + b"PAR1", {}),
        ("cut.parquet", parquet(table(LOGITS))[:-200], {"column": "fixed"}),
        ("column.parquet", parquet(table(LOGITS)), {"column": "there is none"}),
        ("none.parquet", parquet(table(LOGITS)), {}),
        ("text.parquet", parquet(table(LOGITS)), {"column": "name"}),
        ("ragged.parquet", parquet(pa.table({"x": [[1.0, 2.0], [1.0]]})), {}),
        ("null.parquet", parquet(pa.table({"x": [[1.0, 2.0], None]})), {}),
        ("nulls.parquet", parquet(pa.table({"x": [[1.0, 2.0], [None, 1.0]]})), {}),
        ("rows.parquet", parquet(table(LOGITS)), {"column": "fixed", "rows": [RowRange(start=0, stop=501)]}),
        ("x.arrow", b"ARROW1" + b"\0" * 60 + b"ARROW1", {}),
        ("long.arrow", b"ARROW1" + b"\xff" * 60 + b"ARROW1", {}),
        ("null.arrow", arrow(pa.table({"x": [1.0, None]})), {}),
        ("ragged.arrow", arrow(pa.table({"x": [[1.0, 2.0], [1.0]]})), {}),
        ("text.arrow", arrow(table(LOGITS)), {"column": "name"}),
        ("what.bin", npy(LOGITS), {}),
    ]

    @pytest.mark.parametrize(("name", "data", "choice"), BROKEN, ids=[each[0] for each in BROKEN])
    def test_broken(self, files, no_bugs, name, data, choice):
        client, write = files
        with pytest.raises(queryselect.InvalidInput) as caught:
            client.select("margin", budget=2, logits=write(name, data, **choice))
        assert caught.value.field.startswith("pool.logits")
        assert "pool.logits" in str(caught.value)

    def test_flipped_bits(self, files, no_bugs):
        """A damaged file is refused, or its numbers are others: never INTERNAL, never the end."""
        client, write = files
        originals = [("x.parquet", parquet(table(LOGITS))), ("x.arrow", arrow(table(LOGITS), "lz4"))]
        rng = np.random.default_rng(1)
        for name, data in originals:
            for _ in range(60):
                damaged = bytearray(data)
                for at in rng.integers(len(data), size=rng.integers(1, 6)):
                    damaged[at] ^= 1 << int(rng.integers(8))
                with suppress(queryselect.InvalidInput, queryselect.TooLarge, queryselect.Busy):
                    client.select("margin", budget=2, logits=write(name, bytes(damaged), column="lists"), timeout=20)


class TestRequests:
    def test_every_input_by_reference(self, files, local):
        """Lists of rows, labels, weights, reference rows, ids: whatever is a tensor."""
        client, write = files
        labeled, excluded = np.arange(20, 30), np.zeros(500, bool)
        excluded[100:200] = True
        inputs = {"embeddings": EMBEDDINGS, "logits": LOGITS, "weights": np.linspace(0, 1, 500), "labeled": labeled}
        inputs |= {"excluded": excluded, "candidates": np.arange(300, 500)}
        refs = {name: write(f"{name}.npy", npy(x)) for name, x in inputs.items()}
        ids = np.arange(500) * 3
        by_value = local.select("uncertainty_herding", budget=9, ids=ids, **inputs)
        picks = client.select("uncertainty_herding", budget=9, ids=ids, **refs)
        same(picks, by_value)
        np.testing.assert_array_equal(picks.ids, by_value.ids)
        assert {path for path, *_ in picks.info.sources} == {f"pool.{name}" for name in inputs}
        reference = {"role": "LABELED", "embeddings": EMBEDDINGS[:50]}
        by_value = local.select("k_center_greedy", budget=9, embeddings=EMBEDDINGS, reference=reference)
        reference = {"role": "LABELED", "embeddings": write("labeled.npy", npy(EMBEDDINGS[:50]))}
        same(client.select("k_center_greedy", budget=9, embeddings=refs["embeddings"], reference=reference), by_value)

    def test_beside_a_stream(self, files, local):
        """Some tensors come in chunks and others by reference, rows of both side by side."""
        client, write = files
        rng = np.random.default_rng(2)
        embeddings, logits = rng.normal(size=(40_000, 32)), rng.normal(size=(40_000, 5))
        by_value = local.select("expected_gradient_length", budget=9, embeddings=embeddings, logits=logits)
        ref = write("x.npy", npy(logits))
        same(client.select("expected_gradient_length", budget=9, embeddings=embeddings, logits=ref), by_value)
        ref = write("x.npy", npy(embeddings))
        picks = client.select("expected_gradient_length", budget=9, embeddings=ref, logits=logits)
        same(picks, by_value)

    def test_item_rows(self, files, local):
        client, write = files
        item_rows = np.repeat(np.arange(100), 5)
        by_value = local.select("margin", budget=9, logits=LOGITS, item_rows=item_rows)
        refs = {"logits": write("l.npy", npy(LOGITS)), "item_rows": write("i.npy", npy(item_rows))}
        same(client.select("margin", budget=9, **refs), by_value)

    def test_unread_inputs_are_not_read(self, files):
        """What no strategy reads is opened, for its shape, and no more."""
        from queryselect.v1 import selection_pb2

        client, write = files
        message = selection_pb2.SelectRequest()
        message.pool.embeddings.ref.CopyFrom(write("e.npy", npy(np.full((500, 8), np.nan, np.float32))))
        message.pool.logits.ref.CopyFrom(write("l.npy", npy(LOGITS)))
        message.strategy.margin.SetInParent()
        message.stop.max_items = 3
        answer = client._transport._ready.selection.Select(message)
        assert [each.message for each in answer.warnings] == ["margin does not read pool.embeddings"]

    def test_bad_values_are_named(self, files):
        client, write = files
        bad = LOGITS.copy()
        bad[321, 2] = np.nan
        with pytest.raises(queryselect.InvalidInput, match="row 321 has nan") as caught:
            client.select("margin", budget=2, logits=write("x.npy", npy(bad)))
        assert caught.value.field == "pool.logits"

    def test_validate_only(self, files):
        client, write = files
        picks = client.select("margin", budget=2, logits=write("x.npy", npy(LOGITS)), validate_only=True)
        assert len(picks) == 0
        assert len(picks.info.sources) == 1

    def test_too_large_is_known_before_it_is_read(self, tmp_path, serving):
        path = tmp_path / "x.npy"
        path.write_bytes(npy(LOGITS))
        client = serving(tmp_path.as_uri(), max_rows=400)
        with pytest.raises(queryselect.TooLarge, match="rows: 500 is over this server's limit of 400"):
            client.select("margin", budget=2, logits=TensorRef(uri=path.as_uri()))

    def test_bounds_of_references(self, tmp_path, serving):
        path = tmp_path / "x.npy"
        path.write_bytes(npy(LOGITS))
        client = serving(tmp_path.as_uri(), max_sources=2)
        ref = TensorRef(uri=path.as_uri())
        with pytest.raises(queryselect.TooLarge, match="max_sources"):
            client.select("fisher_kernel", budget=2, scales=[{"embeddings": ref, "gradients": ref}] * 2)
        many = TensorRef(uri=path.as_uri(), rows=[RowRange(start=0, stop=1)] * 1025)
        with pytest.raises(queryselect.InvalidInput, match="at most 1024 ranges"):
            client.select("margin", budget=2, logits=many)
        for start, stop in ((-1, 4), (3, 3), (4, 3)):
            with pytest.raises(queryselect.InvalidInput, match="0 <= start < stop"):
                client.select(
                    "margin", budget=2, logits=TensorRef(uri=path.as_uri(), rows=[RowRange(start=start, stop=stop)])
                )

    def test_off_by_default(self, remote, tmp_path):
        path = tmp_path / "x.npy"
        path.write_bytes(npy(LOGITS))
        with pytest.raises(queryselect.PermissionDenied, match="the operator has allowed none"):
            remote.select("margin", budget=2, logits=TensorRef(uri=path.as_uri()))
        assert list(remote.server_info().uri_schemes) == []

    def test_schemes_are_told(self, serving):
        assert list(serving("s3://b/x, file:///srv/pools,https://h").server_info().uri_schemes) == [
            "file",
            "https",
            "s3",
        ]


def test_nothing_is_held_on_to(files, monkeypatch):
    """A request's tensors go with it, and not when the garbage collector comes by."""
    client, write = files
    ref, seen = write("x.npy", npy(LOGITS)), []
    read = fetch.Sources.fetch

    def watched(sources, request, call):
        seen.append(weakref.ref(request))
        return read(sources, request, call)

    monkeypatch.setattr(fetch.Sources, "fetch", watched)
    bad = TensorRef(uri=ref.uri, rows=[RowRange(start=0, stop=501)])
    gc.disable()
    try:
        client.select("margin", budget=2, logits=ref)
        client.select("k_center_greedy", budget=2, embeddings=ref)
        with pytest.raises(queryselect.InvalidInput):
            client.select("margin", budget=2, logits=bad)
        assert until(lambda: [each() for each in seen] == [None] * 3)
    finally:
        gc.enable()


class TestVersions:
    def test_files(self, files):
        client, write = files
        ref = write("x.npy", npy(LOGITS))
        version = client.select("margin", budget=2, logits=ref).info.sources[0][2]
        ref.version = version
        client.select("margin", budget=2, logits=ref)
        time.sleep(0.02)
        write("x.npy", npy(LOGITS[::-1]))
        with pytest.raises(queryselect.Aborted, match="it has version"):
            client.select("margin", budget=2, logits=ref)

    def test_a_file_that_changes_while_it_is_read(self, files, monkeypatch):
        client, write = files
        ref, read = write("x.npy", npy(LOGITS)), objects._Read.__call__

        def late(piece):
            write("x.npy", npy(LOGITS + 1))
            return read(piece)

        monkeypatch.setattr(objects._Read, "__call__", late)
        with pytest.raises(queryselect.Aborted, match="it changed while it was read"):
            client.select("margin", budget=2, logits=ref)

    def test_a_file_that_is_replaced_while_it_is_read(self, files, monkeypatch, tmp_path, local):
        """What was opened is read to its end: one version."""
        client, write = files
        ref, read = write("x.npy", npy(LOGITS)), objects._Read.__call__

        def late(piece):
            write("y.npy", npy(LOGITS[::-1]))
            (tmp_path / "y.npy").rename(tmp_path / "x.npy")
            return read(piece)

        monkeypatch.setattr(objects._Read, "__call__", late)
        by_value = local.select("margin", budget=2, logits=LOGITS)
        same(client.select("margin", budget=2, logits=ref), by_value)

    def test_s3(self, bucket, serving):
        data = npy(np.tile(LOGITS, (100, 1)))
        bucket.put_object(Bucket="pools", Key="x.npy", Body=data)
        etag = bucket.head_object(Bucket="pools", Key="x.npy")["ETag"]
        client, ref = serving("s3://pools"), TensorRef(uri="s3://pools/x.npy")
        assert client.select("margin", budget=2, logits=ref).info.sources[0][2] == etag.strip('"')
        for version in (etag, etag.strip('"')):
            client.select("margin", budget=2, logits=TensorRef(uri=ref.uri, version=version))
        with pytest.raises(queryselect.Aborted, match="it has version"):
            client.select("margin", budget=2, logits=TensorRef(uri=ref.uri, version="another"))

    def test_s3_that_changes_while_it_is_read(self, bucket, serving, monkeypatch):
        data = npy(np.tile(LOGITS, (100, 1)))
        bucket.put_object(Bucket="pools", Key="x.npy", Body=data)
        read, changed = objects._Read.__call__, threading.Event()

        def late(piece):
            if not changed.is_set():
                bucket.put_object(Bucket="pools", Key="x.npy", Body=data[:-4] + b"\0\0\0\0")
                changed.set()
            return read(piece)

        monkeypatch.setattr(objects._Read, "__call__", late)
        with pytest.raises(queryselect.Aborted, match="it changed while it was read"):
            serving("s3://pools").select("margin", budget=2, logits=TensorRef(uri="s3://pools/x.npy"))

    #: What a server tells of an object, before and after it has changed; it has the same size.
    TOLD = {
        "an etag": ({"ETag": '"one"'}, {"ETag": '"two"'}),
        "an etag, and the date of before": ({"ETag": '"one"', **aged(99)}, {"ETag": '"two"', **aged(99)}),
        "a date": (aged(9000), aged(8000)),
        "a date, and a weak etag that stays": ({"ETag": 'W/"one"', **aged(9000)}, {"ETag": 'W/"one"', **aged(8000)}),
    }

    @pytest.mark.parametrize("told", TOLD.values(), ids=TOLD)
    def test_https_that_changes_while_it_is_read(self, web, serving, told):
        data = npy(np.tile(LOGITS, (100, 1)))
        web.objects["/x.npy"], web.etags["/x.npy"] = data, ""

        def change(answer, asked):
            web.objects["/x.npy"] = npy(np.tile(-LOGITS, (100, 1)))
            answer.headers.update(told[asked > 1])
            return answer

        web.bend["/x.npy"] = change
        with pytest.raises(queryselect.Aborted, match="it changed while it was read"):
            serving(f"https://localhost:{web.port}").select("margin", budget=2, logits=ref_of(web, "x.npy"))

    @pytest.mark.parametrize("told", [{}, {"ETag": 'W/"one"'}, aged(-9000), {"Last-Modified": "yesterday"}])
    def test_https_that_tells_no_version_to_go_by(self, web, serving, told):
        """What can't be told from another version is not put together of several answers."""
        client = serving(f"https://localhost:{web.port}")
        web.objects |= {"/x.npy": npy(np.tile(LOGITS, (100, 1))), "/small.npy": npy(LOGITS)}
        for path in web.objects:
            web.etags[path] = ""
            web.bend[path] = lambda answer, _: answer.headers.update(told) or answer
        with pytest.raises(queryselect.InvalidInput, match="its server tells no version to go by"):
            client.select("margin", budget=2, logits=ref_of(web, "x.npy"))
        assert len(client.select("margin", budget=2, logits=ref_of(web, "small.npy"))) == 2, "in one answer"


def ref_of(web: Store, path: str, **choice) -> TensorRef:
    return TensorRef(uri=f"https://localhost:{web.port}/{path}", **choice)


class TestStores:
    @pytest.mark.parametrize(("name", "data", "choice"), FORMATS[:8:3], ids=[each[0] for each in FORMATS[:8:3]])
    def test_s3(self, bucket, serving, local, name, data, choice):
        key = f"deep/er/with space & % signs/{name}"
        bucket.put_object(Bucket="pools", Key=key, Body=data)
        picks = serving("s3://pools/deep").select(
            "margin", budget=5, logits=TensorRef(uri=f"s3://pools/{key}", **choice)
        )
        same(picks, local.select("margin", budget=5, logits=LOGITS))

    @pytest.mark.parametrize(("name", "data", "choice"), FORMATS[:8:3], ids=[each[0] for each in FORMATS[:8:3]])
    def test_https(self, web, serving, local, name, data, choice):
        web.objects[f"/a%20b/{name}"] = data
        picks = serving(f"https://localhost:{web.port}").select(
            "margin", budget=5, logits=ref_of(web, f"a%20b/{name}", **choice)
        )
        same(picks, local.select("margin", budget=5, logits=LOGITS))

    def test_gs(self, serving, local, monkeypatch):
        """By Cloud Storage's XML API, of an emulator."""
        store = Store({"/pools/a/x.npy": npy(LOGITS)})
        stop = store.start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{store.port}")
        try:
            picks = serving("gs://pools/a").select("margin", budget=5, logits=TensorRef(uri="gs://pools/a/x.npy"))
        finally:
            stop()
        same(picks, local.select("margin", budget=5, logits=LOGITS))

    def test_gs_credentials(self, monkeypatch):
        """They come from the environment, and go to Cloud Storage alone."""
        from queryselect_service.sources import gs

        class Credentials:
            def before_request(self, _, method, url, headers):
                headers["authorization"] = f"Bearer for {method} {url}"

        monkeypatch.setattr(gs, "_credentials", Credentials)
        assert gs._authorization() == {"authorization": "Bearer for GET https://storage.googleapis.com"}

    def test_only_what_is_needed_is_read(self, web, serving):
        """Rows and columns are ranges: of a large object little travels."""
        rows = np.tile(LOGITS, (2000, 1))  # 16 MB
        web.objects["/x.npy"] = npy(rows)
        web.objects["/x.parquet"] = parquet(pa.table({"a": list(rows[:50_000]), "b": np.abs(rows[:50_000, 0])}))
        client = serving(f"https://localhost:{web.port}")
        client.select("margin", budget=5, logits=ref_of(web, "x.npy", rows=[RowRange(start=900_000, stop=901_000)]))
        read = sum(each[2] - each[1] for each in map(_asked_range, web.asked))
        assert read <= objects.HEAD_BYTES + 1000 * 16
        web.asked.clear()
        client.select(
            "random",
            budget=5,
            costs=ref_of(web, "x.parquet", column="b", rows=[RowRange(start=7, stop=70)]),
            cost_budget=0,
        )
        read = sum(each[2] - each[1] for each in map(_asked_range, web.asked))
        assert read < len(web.objects["/x.parquet"]) / 4

    def test_one_object_is_opened_once(self, web, serving):
        web.objects["/x.safetensors"] = safetensors(e=EMBEDDINGS, z=LOGITS)
        client = serving(f"https://localhost:{web.port}")
        refs = {
            "embeddings": ref_of(web, "x.safetensors", column="e"),
            "logits": ref_of(web, "x.safetensors", column="z"),
        }
        client.select("expected_gradient_length", budget=5, **refs)
        assert len(web.asked) == 1  # it is small

    def test_nothing_of_ours_is_sent(self, web, serving):
        """No cookies back, no credentials, no names."""
        web.objects["/x.npy"] = npy(np.tile(LOGITS, (1000, 1)))
        web.bend["/x.npy"] = lambda answer, _: answer.headers.update({"Set-Cookie": "a=b"}) or answer
        serving(f"https://localhost:{web.port}").select("margin", budget=5, logits=ref_of(web, "x.npy"))
        assert len(web.asked) > 1
        known = {"host", "range", "if-match", "accept-encoding", "user-agent"}
        assert {name for *_, headers in web.asked for name in headers} <= known

    def test_a_server_that_stumbles_is_asked_again(self, web, serving):
        web.objects["/x.npy"] = npy(LOGITS)

        def stumble(answer, asked):
            answer.status = 503 if asked < 3 else answer.status
            return answer

        web.bend["/x.npy"] = stumble
        serving(f"https://localhost:{web.port}").select("margin", budget=5, logits=ref_of(web, "x.npy"))

    def test_who_has_gone_stops_the_reading(self, web, serving, monkeypatch):
        """A store that sends a byte now and then keeps neither the request nor a thread."""
        web.objects["/x.npy"] = npy(LOGITS)
        web.bend["/x.npy"] = lambda answer, _: setattr(answer, "pause", 0.05) or answer
        client = serving(f"https://localhost:{web.port}")
        began = time.monotonic()
        with pytest.raises(queryselect.DeadlineExceeded):
            client.select("margin", budget=5, logits=ref_of(web, "x.npy"), timeout=0.5)
        assert time.monotonic() - began < 5

    def test_a_store_that_is_too_slow(self, web, serving, monkeypatch):
        monkeypatch.setattr(https, "WHOLE", 0.3)
        monkeypatch.setattr(https, "TRIES", 1)
        web.objects["/x.npy"] = npy(LOGITS)
        web.bend["/x.npy"] = lambda answer, _: setattr(answer, "pause", 0.02) or answer
        with pytest.raises(queryselect.Unavailable, match=r"within 0\.3 s"):
            serving(f"https://localhost:{web.port}").select("margin", budget=5, logits=ref_of(web, "x.npy"))

    def test_a_store_that_refuses_this_server_is_told_to_its_operator(self, web, serving, caplog):
        caplog.set_level(logging.INFO, "queryselect_service")
        web.bend["/pools/of-somebody.npy"] = lambda answer, _: setattr(answer, "status", 403) or answer
        client = serving(f"https://localhost:{web.port}/pools")
        with pytest.raises(queryselect.PermissionDenied, match="does not let this server read it"):
            client.select("margin", budget=5, logits=ref_of(web, "pools/of-somebody.npy"))
        (warned,) = (each for each in caplog.records if each.name.endswith("fetch"))
        told = caplog.records[-1]
        assert (warned.levelname, told.fields["reason"]) == ("WARNING", "SOURCE_REFUSED")
        assert warned.message == (
            f"reading from https://localhost:{web.port}/pools fails: its server does not let this server read it"
        )

    def test_credentials_that_this_server_has_not_are_its_operators_to_mend(self, bucket, serving, monkeypatch, caplog):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        s3._client.cache_clear()
        with pytest.raises(queryselect.PermissionDenied, match="NoCredentialsError"):
            serving("s3://pools").select("margin", budget=5, logits=TensorRef(uri="s3://pools/x.npy"))
        assert "reading from s3://pools fails: this server's settings for s3:// do not work" in caplog.text
        s3._client.cache_clear()

    def test_a_store_that_is_not_there(self, web, serving, monkeypatch):
        monkeypatch.setattr(https, "TRIES", 1)
        with pytest.raises(queryselect.Unavailable, match="does not answer"):
            serving("https://localhost:1").select("margin", budget=5, logits=TensorRef(uri="https://localhost:1/x.npy"))

    def test_a_store_that_is_not_trusted(self, web, serving, monkeypatch):
        """Another authority's certificate."""
        web.objects["/x.npy"] = npy(LOGITS)
        monkeypatch.delenv("SSL_CERT_FILE")
        monkeypatch.setattr(https, "TRIES", 1)
        https._direct.cache_clear()
        with pytest.raises(queryselect.Unavailable, match="SSLError"):
            serving(f"https://localhost:{web.port}").select("margin", budget=5, logits=ref_of(web, "x.npy"))
        assert web.asked == []

    def test_unknown_objects(self, bucket, web, serving):
        client = serving(f"https://localhost:{web.port},s3://pools,s3://nosuch")
        uris = (ref_of(web, "x.npy").uri, "s3://pools/x.npy", "s3://nosuch/x.npy")
        for uri in uris:
            with pytest.raises(queryselect.NotFound, match="there is no such object"):
                client.select("margin", budget=5, logits=TensorRef(uri=uri))


def _asked_range(request) -> tuple[str, int, int]:
    _, path, headers = request
    first, last = headers["range"].removeprefix("bytes=").split("-")
    return path, int(first), int(last) + 1
