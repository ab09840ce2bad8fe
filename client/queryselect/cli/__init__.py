"""The command `queryselect`: one module per subcommand, with a `main(arguments) -> exit status` each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "serve": "start a server (needs the [service] extra)",
    "health": "ask whether a server is ready",
    "token": "make a bearer token for a server's token file",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand. Returns its exit status."""
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if name in COMMANDS:
        status: int = import_module(f"queryselect.cli.{name}").main(rest[:-1])
        return status
    lines = [f"  {command:8} {doc}" for command, doc in COMMANDS.items()]
    usage = "\n".join(("usage: queryselect COMMAND …", *lines, "queryselect COMMAND --help says more."))
    asked = name in ("-h", "--help", "help")
    print(
        usage if asked or not name else f"queryselect: there is no command {name!r}\n{usage}",
        file=None if asked else sys.stderr,
    )
    return 0 if asked else 2
