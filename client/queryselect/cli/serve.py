"""`queryselect serve`: starts a server."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Hands over to the service, or says how to install it. Returns the exit status."""
    try:
        from queryselect_service.__main__ import main as serve  # noqa: PLC0415  # the thin client has no service
    except ImportError as error:
        print(f'queryselect serve needs {error.name}: pip install "queryselect[service]"', file=sys.stderr)
        return 2
    return serve(arguments)
