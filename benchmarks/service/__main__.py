"""What the service can take, part by part: `make bench-service`.

transport: how fast a pool gets to the server, and what that costs. load: many small requests. seen: what metrics, the
log and traces cost one. health: how soon health checks are answered meanwhile, and what 64 clients are told by a server
with room for 17. cancel: how soon every strategy stops. fuzz: what broken requests are answered. tokens: what a bad
token costs, by what is bad of it. What was found is printed and kept in benchmarks/results/, with what other parts
found before.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import machine

PARTS = ("transport", "load", "seen", "health", "cancel", "fuzz", "tokens")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="a folder (default %(default)s)")
    chosen = parser.parse_args(arguments)
    for name in set(chosen.parts) - set(PARTS):
        parser.error(f"there is no part {name}; there are: {', '.join(PARTS)}")
    return chosen


def kept(kind: str, folder: Path) -> dict[str, Any]:
    """What earlier runs found on this machine, by part."""
    path = machine.kept_at(kind, machine.name(), folder)
    parts: dict[str, Any] = json.loads(path.read_text())["parts"] if path.exists() else {}
    return parts


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for. Every part is kept as soon as it is there."""
    chosen = parse(arguments)
    kind = "service-quick" if chosen.quick else "service"
    for name in chosen.parts or PARTS:
        part = import_module(f"{__package__}.{name}")
        found = part.measure(quick=chosen.quick)
        print(f"\n{name}\n\n{part.show(found)}\n", flush=True)
        now = {"date": datetime.now(UTC).date().isoformat(), **found}
        result = {"machine": machine.describe(), "parts": kept(kind, chosen.results) | {name: now}}
        print(f"kept in {machine.keep(kind, machine.name(), result, chosen.results)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
