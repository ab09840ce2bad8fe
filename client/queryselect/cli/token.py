"""`queryselect token`: makes a bearer token, and what a server's token file has to say of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from queryselect import _tokens

LIMITS = {
    "max_rows": "rows of one request",
    "max_bytes": "bytes of host memory of one request",
    "max_in_flight": "selections at a time",
}


def main(arguments: Sequence[str]) -> int:
    """Prints the token to the terminal, once, and the lines for the file to standard output."""
    parser = argparse.ArgumentParser(
        prog="queryselect token",
        description="Makes a token: `queryselect token studio >> tokens.toml`. "
        "The token itself is shown once, on standard error; the file has only its salted hash.",
    )
    parser.add_argument("name", type=_name, help="whose it is: lower-case letters, digits and hyphens")
    for limit, doc in LIMITS.items():
        parser.add_argument("--" + limit.replace("_", "-"), type=_count, help=f"{doc} (default: the server's limit)")
    parser.add_argument("--days", type=_count, help="how long it is good for (default: until it is taken out)")
    chosen = parser.parse_args(arguments)
    token, salt, hashed = _tokens.make(chosen.name)
    lines = ["", "[[tokens]]", f'name = "{chosen.name}"', f'salt = "{salt.hex()}"', f'hash = "{hashed.hex()}"']
    lines += [f"{limit} = {value}" for limit in LIMITS if (value := getattr(chosen, limit)) is not None]
    if chosen.days is not None:
        lines.append(f"expires = {(datetime.now(UTC) + timedelta(days=chosen.days)).isoformat(timespec='seconds')}")
    print("\n".join(lines))  # a line of its own before it, for the file's last may have no end
    print(f"the token, shown only now: {token}", file=sys.stderr)
    return 0


def _name(text: str) -> str:
    if not _tokens.NAME.fullmatch(text):
        raise argparse.ArgumentTypeError("needs 1 to 63 lower-case letters, digits and hyphens, no hyphen first")
    return text


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; it is {number}")
    return number


_count.__name__ = "whole number"  # as argparse names it
