"""Bearer tokens: who calls, by a file of salted hashes.

Requirements that the design meets:

- A bad token costs the same whatever is bad: one hash of an input of the same length and one comparison in constant
  time, whether its name is unknown, its secret wrong, or there is no token that could be one. The name is no secret; it
  says which salt to take, so that the cost does not grow with the number of tokens either.
- The hash is a fast one (see queryselect._tokens).
- What was sent stands in no answer and no log, nor do salts and hashes.
- The file may change at any time: a token that was taken out is refused within a second. A file that can't be read
  leaves those that were known, and so does one without tokens, which is more likely half-written than meant.
"""

from __future__ import annotations

import hmac
import math
import secrets
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from queryselect import _tokens
from queryselect_service.call import Caller
from queryselect_service.errors import TokenExpired, Unauthenticated
from queryselect_service.reload import Reloaded

#: The least time between two looks at the file, in seconds.
LOOK_EVERY = 1.0
#: The longest header that is looked at.
LONGEST = 256
LIMITS = ("max_rows", "max_bytes", "max_in_flight")
NEEDED = (
    "this server needs a token that it knows, as metadata `authorization: Bearer qs_…` "
    "(Client(target, token=…) in Python); its operator makes one by `queryselect token`"
)


@dataclass(frozen=True, repr=False)
class Token:
    """One token of the file."""

    caller: Caller
    salt: bytes
    hash: bytes
    expires: datetime | None = None


#: What is compared where no token of that name is known, and what is hashed where none came.
NOBODY = Token(Caller("nobody"), secrets.token_bytes(_tokens.SALT_BYTES), secrets.token_bytes(_tokens.HASH_BYTES))
NOTHING = ("", "0" * 64)


class Tokens:
    """The tokens of a file, as it is now."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a file that can't be used."""
        self.file = Reloaded("token_file", [path], lambda: read(path), LOOK_EVERY)

    def caller(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Whose token stands in an RPC's metadata. Raises Unauthenticated."""
        name, secret = _presented(metadata)
        token = self.file.get().get(name, NOBODY)
        if not hmac.compare_digest(_tokens.digest(secret, token.salt), token.hash):
            raise Unauthenticated(NEEDED)
        if token.expires is not None and datetime.now(UTC) >= token.expires:
            raise TokenExpired(token.caller.name)
        return token.caller

    def next_end(self) -> float:
        """When the next of the tokens ends, in seconds since 1970; not a number where none does."""
        now = datetime.now(UTC)
        ends = (each.expires for each in self.file.get().values() if each.expires is not None and each.expires > now)
        return min((each.timestamp() for each in ends), default=math.nan)


def _presented(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[str, str]:
    """The name and the secret that came. Several headers are none: who put them together saw another than we."""
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) == 1 and isinstance(values[0], str) and len(values[0]) <= LONGEST:
        scheme, _, token = values[0].partition(" ")
        match = _tokens.TOKEN.fullmatch(token)
        if match is not None and scheme.lower() == "bearer":  # a scheme's case means nothing (RFC 9110)
            return match[1], match[2]
    return NOTHING


def read(path: Path) -> Mapping[str, Token]:
    """The tokens of a file, by name. Raises ValueError, whose words hold nothing secret."""
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"token_file {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"token_file {path}: {error}") from None
    entries = found.pop("tokens", None)
    if found or not isinstance(entries, list) or not entries or not all(isinstance(each, dict) for each in entries):
        raise ValueError(f"token_file {path} needs one or more [[tokens]], and nothing else")
    tokens: dict[str, Token] = {}
    for number, entry in enumerate(entries, 1):
        try:
            token = _token(entry)
        except ValueError as error:
            raise ValueError(f"token_file {path}: token {number}: {error}") from None
        if token.caller.name in tokens:
            raise ValueError(f"token_file {path}: there are two tokens {token.caller.name}")
        tokens[token.caller.name] = token
    return tokens


def _token(entry: Mapping[str, Any]) -> Token:
    """What a stanza of the file says. Raises ValueError."""
    unknown = sorted(set(entry) - {"name", "salt", "hash", "expires", *LIMITS})
    if unknown:
        raise ValueError(f"there is no key {', '.join(unknown)}")
    name, expires = entry.get("name"), entry.get("expires")
    if not isinstance(name, str) or not _tokens.NAME.fullmatch(name):
        raise ValueError("name needs 1 to 63 lower-case letters, digits and hyphens")
    if expires is not None and (not isinstance(expires, datetime) or expires.tzinfo is None):
        raise ValueError("expires needs a date and time with an offset, such as 2030-01-01T00:00:00Z")
    for limit in LIMITS:
        if limit in entry and (type(entry[limit]) is not int or entry[limit] < 1):
            raise ValueError(f"{limit} needs a whole number of at least 1")
    caller = Caller(name, *(entry.get(limit) for limit in LIMITS))
    return Token(caller, _hex(entry, "salt", _tokens.SALT_BYTES), _hex(entry, "hash", _tokens.HASH_BYTES), expires)


def _hex(entry: Mapping[str, Any], key: str, size: int) -> bytes:
    try:
        found = bytes.fromhex(entry[key])
    except (KeyError, TypeError, ValueError):
        found = b""
    if len(found) != size:
        raise ValueError(f"{key} needs {2 * size} hexadecimal digits, as `queryselect token` prints them")
    return found
