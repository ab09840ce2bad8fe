"""The thin client needs neither torch nor the service, and exports what it says."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import queryselect
from queryselect.v1 import strategy_pb2

KINDS = list(strategy_pb2.Strategy.DESCRIPTOR.oneofs_by_name["kind"].fields)

BLOCK = """
import sys

class Blocked:
    names = {"torch", "sklearn", "pandas", "queryselect_service"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
import queryselect
"""


def thin(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code where only the thin client is installed."""
    return subprocess.run([sys.executable, "-c", BLOCK + code], capture_output=True, text=True, check=False, timeout=60)


def test_thin_install_has_every_name_and_a_client() -> None:
    done = thin("""
for name in queryselect.__all__:
    getattr(queryselect, name)
with queryselect.Client("localhost:1"):
    pass
queryselect.Session(None, "margin", labeled=[1]).state()
assert not Blocked.names & set(sys.modules), sys.modules
try:
    queryselect.Client("local:")
except ImportError as error:
    print(error)
""")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == 'Client("local:") needs queryselect_service: pip install "queryselect[service]"\n'


def test_thin_install_serve_says_how_to_get_it() -> None:
    done = thin("from queryselect.cli import main; sys.exit(main(['serve', '--port', '0']))")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'queryselect serve needs queryselect_service: pip install "queryselect[service]"\n'


def test_all_is_what_is_visible() -> None:
    visible = {
        name
        for name, value in vars(queryselect).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert len(set(queryselect.__all__)) == len(queryselect.__all__)
    assert set(queryselect.__all__) == visible | {"__version__"}


@pytest.mark.parametrize("field", KINDS, ids=lambda field: field.name)
def test_every_strategy_is_exported_with_its_enum_values(field) -> None:
    camel = "".join(part.capitalize() for part in field.name.split("_"))
    assert getattr(queryselect, camel).DESCRIPTOR is field.message_type
    for parameter in field.message_type.fields:
        for value in parameter.enum_type.values if parameter.enum_type else ():
            assert value.number == 0 or getattr(queryselect, value.name) == value.number
