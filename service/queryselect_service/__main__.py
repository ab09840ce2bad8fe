"""Flags, environment and TOML to Settings, and Settings to a running server."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# How often torch's helpers look for more work before they sleep; read once, when torch is imported. By default they
# look for a millisecond after each operation, which on two cores took twice the processor time of a small selection and
# made it slower; if they never look, a kernel waits for them to wake.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# gRPC's core writes a line of its own form for every handshake that fails, which whoever reaches the port may cause.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from queryselect_service import server, settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until told to stop. Returns the exit status."""
    try:
        chosen = settings.load(sys.argv[1:] if arguments is None else arguments, os.environ)
        server.run(chosen)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"queryselect serve: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
