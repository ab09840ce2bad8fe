"""What clients in other languages are shown: the proto files that they need, and docs/clients.md."""

from __future__ import annotations

from pathlib import Path

import google.rpc
import pytest

ROOT = Path(__file__).parent.parent.parent
COPIES = ROOT / "examples" / "proto" / "google" / "rpc"


@pytest.mark.parametrize("path", sorted(COPIES.iterdir()), ids=lambda path: path.name)
def test_copies_of_googles_proto_files_are_those_of_the_package(path):
    """googleapis-common-protos: where a newer one differs, copy its file."""
    (theirs,) = (Path(each) / path.name for each in google.rpc.__path__ if (Path(each) / path.name).exists())
    assert path.read_text() == theirs.read_text()
