"""What holds the house together: the proto, the registry and the dataclasses say the same; the laws are kept."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

import queryselect
import queryselect_service
from queryselect.v1 import selection_pb2, server_pb2, strategy_pb2, tensor_pb2
from queryselect_service import strategy as strategies
from queryselect_service import wire
from queryselect_service.auth import LIMITS
from queryselect_service.call import Caller
from queryselect_service.items import ItemAggregation
from queryselect_service.references import REFERENCE_INPUTS
from queryselect_service.request import INPUTS, ROW_LISTS
from queryselect_service.settings import Settings

ROOT = Path(__file__).parent.parent.parent
SERVICE = ROOT / "service" / "queryselect_service"
strategies.load()
ONEOF = {each.name: each.message_type for each in strategy_pb2.Strategy.DESCRIPTOR.oneofs_by_name["kind"].fields}
NAMES = sorted(strategies.STRATEGIES)


def camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def test_the_oneof_and_the_registry_name_the_same_strategies():
    assert set(ONEOF) - {"custom"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestEveryStrategy:
    def test_its_file_has_its_name_and_its_message_the_same_in_camel_case(self, name):
        strategy = strategies.STRATEGIES[name]
        assert strategy.function.__module__ == f"queryselect_service.kernels.{name}"
        assert ONEOF[name].name == strategy.spec.__name__ == camel(name)
        assert hasattr(queryselect, camel(name))

    def test_its_message_has_the_fields_of_its_dataclass(self, name):
        spec = strategies.STRATEGIES[name].spec
        hints = get_type_hints(spec)
        fields = {each.name: each for each in dataclasses.fields(spec)}
        message = ONEOF[name]
        assert set(message.fields_by_name) == set(fields)
        kinds = {bool: "BOOL", int: "INT32", float: "DOUBLE", str: "STRING"}
        for field in message.fields:
            kind = next(
                each for each in (get_args(hints[field.name]) or (hints[field.name],)) if each is not type(None)
            )
            assert field.has_presence, "unset must be visible: defaults live in the dataclass"
            if field.enum_type:
                prefix = field.enum_type.values_by_number[0].name.removesuffix("UNSPECIFIED")
                assert {f"{prefix}{each}" for each in kind.__members__} <= set(field.enum_type.values_by_name)
                assert next(iter(kind.__members__)) == field.enum_type.values_by_number[1].name.removeprefix(prefix)
            else:
                assert field.type == getattr(field, f"TYPE_{kinds[kind]}")
            assert fields[field.name].metadata["doc"].strip(".")

    def test_it_reads_inputs_that_a_pool_or_a_reference_set_has(self, name):
        for each in strategies.STRATEGIES[name].inputs:
            scales = {"scales": "N L" if each.role is None else "M L"}
            inputs = {**(INPUTS if each.role is None else REFERENCE_INPUTS), **scales}
            assert inputs[each.field] == each.shape
            assert set(each.alternatives) <= set(inputs)

    def test_it_keeps_to_quotas_and_costs(self, name):
        strategy = strategies.STRATEGIES[name]
        assert strategy.limitable
        assert not {"k", "candidates"} & strategy.keywords

    def test_its_documentation_has_a_formula_shapes_an_example_and_a_paper(self, name):
        strategy = strategies.STRATEGIES[name]
        doc = inspect.getdoc(strategy.function) or ""
        assert strategy.summary.endswith(".")
        assert re.search(r"^ {4}\S.* = ", doc, re.MULTILINE), "a formula, indented"
        assert re.search(r"\(n[,)]", doc), "shapes"
        assert ">>> " in doc
        assert re.search(r"\b(19|20)\d\d\b", strategy.citation), "a year"
        assert "O(" in strategy.cost

    def test_list_strategies_describes_it_whole(self, name, remote):
        (found,) = (each for each in remote.strategies() if each.name == name)
        strategy = strategies.STRATEGIES[name]
        for field in ("summary", "cost", "citation"):
            assert getattr(found, field) == getattr(strategy, field) != ""
        assert [each.name for each in found.parameters] == [each.name for each in dataclasses.fields(strategy.spec)]
        assert all(each.doc and each.type for each in found.parameters)
        for told, field in zip(found.parameters, dataclasses.fields(strategy.spec), strict=True):
            is_enum = told.type == strategy_pb2.PARAMETER_TYPE_ENUM
            assert bool(told.values) == (is_enum or told.name == strategy.base_parameter)
            assert told.HasField("minimum") == (field.metadata["low"] is not None)
            assert told.HasField("default") == (field.default is not None)
            assert not told.values or told.range == ", ".join(told.values)
        assert (found.seeded, found.pool_scores, found.custom) == (strategy.seeded, strategy.pool_scores, False)
        assert found.items == strategy.serves_items
        assert strategy_pb2.ScoreKind.Name(found.score_kind) == f"SCORE_KIND_{strategy.score_kind}"
        assert len(found.tasks) == len(strategy.tasks) > 0


def test_a_pool_has_the_inputs_that_the_service_knows():
    tensors = {
        each.name for each in selection_pb2.Pool.DESCRIPTOR.fields if each.message_type is tensor_pb2.Tensor.DESCRIPTOR
    }
    assert tensors - set(INPUTS) - set(ROW_LISTS) == {"costs", "item_rows"}
    assert set(INPUTS) <= tensors


def test_a_reference_set_has_the_inputs_that_the_service_knows():
    fields = selection_pb2.ReferenceSet.DESCRIPTOR.fields
    assert {each.name for each in fields if each.message_type is tensor_pb2.Tensor.DESCRIPTOR} == set(REFERENCE_INPUTS)


@pytest.mark.parametrize(
    ("ours", "wire"),
    [
        (strategies.NoticeCode, selection_pb2.WarningCode),
        (strategies.StopReason, selection_pb2.StopReason),
        (strategies.ScoreKind, strategy_pb2.ScoreKind),
        (strategies.Task, strategy_pb2.Task),
        (strategies.ReferenceRole, selection_pb2.ReferenceRole),
        (ItemAggregation, selection_pb2.ItemAggregation),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_kernels_say_has_a_number_on_the_wire(ours, wire):
    names = {each.name for each in wire.DESCRIPTOR.values if each.number}
    prefix = wire.DESCRIPTOR.values_by_number[0].name.removesuffix("UNSPECIFIED")
    assert {f"{prefix}{each}" for each in ours} == names


def test_every_limit_is_a_setting_or_a_tokens():
    limits = wire.encode_limits(Settings(), Caller("", *(1 for _ in LIMITS)))
    assert len(limits.ListFields()) == len(server_pb2.Limits.DESCRIPTOR.fields)
    known = {*(each.name for each in dataclasses.fields(Settings)), *LIMITS}
    assert {each.name for each in server_pb2.Limits.DESCRIPTOR.fields} <= {each.removeprefix("max_") for each in known}


def test_types_of_the_wire_are_those_of_the_proto():
    known = {each.number for each in tensor_pb2.DataType.DESCRIPTOR.values if each.number}
    assert set(wire.DTYPES) == known


def test_kernels_import_without_grpc_and_protobuf():
    """In a process where importing either fails."""
    code = """
import sys, pkgutil, importlib
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("grpc", "google", "queryselect", "prometheus_client"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
from queryselect_service import kernels, maths, strategy
for package in (kernels, maths):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
print(len(strategy.STRATEGIES))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(NAMES)


def test_kernels_know_no_clock_no_log_and_no_device_policy():
    for path in (*(SERVICE / "kernels").glob("*.py"), *(SERVICE / "maths").glob("*.py")):
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (logging|time|tqdm|os)\b", text, re.MULTILINE), path.name
        assert not re.search(r"cuda|is_available|print\(", text), path.name


def test_the_transport_names_no_strategy():
    """Neither here nor in the client: what is specific to a strategy stands in its own file."""
    names = [*NAMES, *(camel(name) for name in NAMES)]
    client = ROOT / "client" / "queryselect"
    for path in (*SERVICE.glob("*.py"), *(path for path in client.glob("_*.py"))):
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
        code = code.replace("import random", "").replace("random.uniform", "")  # Python's own, for the client's jitter
        for name in names:
            assert not re.search(rf"\b{name}\b", code), f"{path.name} names {name}"


def test_only_wire_knows_both_protobuf_and_torch():
    for path in SERVICE.rglob("*.py"):
        text = path.read_text()
        both = re.search(r"^(import|from) torch\b", text, re.MULTILINE) and re.search(
            r"^from (google\.protobuf|queryselect\.v1)\b", text, re.MULTILINE
        )
        assert not both or path.name == "wire.py", path.name


def test_generated_code_is_that_of_the_proto_files(tmp_path):
    """The checked-in descriptors against a fresh compilation; make check compares the texts as well."""
    files = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto"))
    include = Path(protoc.__file__).parent / "_proto"
    out = tmp_path / "set.binpb"
    assert protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"-I{include}", f"-o{out}", *files]) == 0
    for file in FileDescriptorSet.FromString(out.read_bytes()).file:
        module = importlib.import_module(file.name.removesuffix(".proto").replace("/", ".") + "_pb2")
        checked_in = type(file)()
        module.DESCRIPTOR.CopyToProto(checked_in)
        file.ClearField("source_code_info")
        for each in (file, checked_in):
            for message in each.message_type:
                for field in (*message.field, *(nested for inner in message.nested_type for nested in inner.field)):
                    field.ClearField("json_name")
        assert file == checked_in, file.name


def test_scalars_of_the_proto_tell_unset_from_zero():
    for module in (selection_pb2, strategy_pb2, tensor_pb2, server_pb2):
        for message in module.DESCRIPTOR.message_types_by_name.values():
            for field in message.fields:
                plain = field.message_type is None and not field.is_repeated
                assert not plain or field.has_presence, f"{message.name}.{field.name}"


def test_the_changelog_tells_of_this_version():
    assert f"## [{queryselect.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("package", [queryselect, queryselect_service], ids=lambda each: each.__name__)
def test_examples_in_the_documentation_run(package):
    ran = 0
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if "_pb2" in info.name or info.name.endswith("__main__"):
            continue
        result = doctest.testmod(importlib.import_module(info.name))
        assert not result.failed, info.name
        ran += result.attempted
    assert ran
