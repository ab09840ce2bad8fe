"""What an address says, and which addresses requests may name.

Requirements that the design meets:

- Nothing may be read unless the operator listed a prefix of it. A prefix ends where a part of the path ends:
  `s3://pools/a` allows `s3://pools/a` and `s3://pools/a/b.npy`, not `s3://pools/ab.npy`.
- An address is taken apart once, strictly, and what is opened is made of the parts: nothing is normalised, since two
  programs that normalise differently are how a path gets out. What could be read in two ways is refused.
- Addresses carry no credentials, no query and no fragment. Credentials are the server's own.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

SCHEMES = ("file", "gs", "https", "s3")
#: The longest address, in bytes.
MOST_BYTES = 2048
_ADDRESS = re.compile(r"([a-z0-9]+)://([^/]*)(/.*)?", re.DOTALL)
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[1-9][0-9]{0,4})?")
_BUCKET = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?")
#: Schemes whose paths are written with %XX; elsewhere a % is a %.
_ESCAPED = ("file", "https")


@dataclass(frozen=True)
class Address:
    """Where an object is. host: of https, the host with its port; of s3 and gs, the bucket. segments: of its path."""

    scheme: str
    host: str
    segments: tuple[str, ...]

    @property
    def store(self) -> str:
        """What answers: one machine, or one service."""
        return self.host if self.scheme == "https" else self.scheme

    @property
    def path(self) -> str:
        """The path without its first slash, as it is: of s3 and gs, the key."""
        return "/".join(self.segments)

    @property
    def url_path(self) -> str:
        """The path as it stands in a URL."""
        return "/" + "/".join(quote(segment, safe="") for segment in self.segments)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{self.url_path if self.segments else ''}"

    def within(self, prefix: Address) -> bool:
        """Whether the address is the prefix, or below it."""
        length = len(prefix.segments)
        return (self.scheme, self.host, self.segments[:length]) == (prefix.scheme, prefix.host, prefix.segments)


def parse(uri: str) -> Address:
    """The address that a text says. Raises ValueError with the rule that it breaks, and nothing of the text."""
    if len(uri.encode(errors="replace")) > MOST_BYTES:
        raise ValueError(f"an address has at most {MOST_BYTES} bytes")
    if any(unicodedata.category(each)[0] in "CZ" and each != " " for each in uri):
        raise ValueError("an address has printable characters only")
    if any(each in uri for each in "\\?#"):
        raise ValueError("an address has no backslash, no query and no fragment")
    found = _ADDRESS.fullmatch(uri)
    if found is None or found[1] not in SCHEMES:
        raise ValueError(f"an address begins with {', '.join(f'{each}://' for each in SCHEMES)}")
    scheme, host, path = found[1], found[2], found[3] or "/"
    if scheme == "file":
        if host:
            raise ValueError("a file's address has three slashes before its path, and no host")
    elif not (_HOST if scheme == "https" else _BUCKET).fullmatch(host):
        raise ValueError("an address has a host, or a bucket, of small letters, digits, dots and hyphens, and no user")
    segments = path[1:].split("/") if path != "/" else []
    return Address(scheme, host, tuple(_segment(each, escaped=scheme in _ESCAPED) for each in segments))


def _segment(text: str, *, escaped: bool) -> str:
    if escaped:
        if re.search(r"%(?![0-9A-Fa-f]{2})", text) or not text.isascii():
            raise ValueError("the path of file:// and https:// is ASCII, with %XX for every other byte")
        try:
            text = unquote_to_bytes(text).decode()
        except UnicodeDecodeError:
            raise ValueError("a path is UTF-8") from None
        if re.search(r"[\\/%?#]", text) or any(unicodedata.category(each)[0] == "C" for each in text):
            raise ValueError("a path has no %XX for /, \\, %, ?, # or a control character")
    if text in ("", ".", ".."):
        raise ValueError("a path has no empty part, and none of . or ..")
    return text


class Allowed:
    """The operator's allow-list."""

    def __init__(self, text: str) -> None:
        """text: prefixes, separated by commas. Raises ValueError where one is none."""
        self.prefixes: list[Address] = []
        for each in filter(None, map(str.strip, text.split(","))):
            try:
                prefix = parse(each.removesuffix("/") if not each.endswith("://") else each)
            except ValueError as error:
                raise ValueError(f"allow_uris: {each!r}: {error}") from None
            if prefix.scheme == "file" and not prefix.segments:
                raise ValueError("allow_uris: file:/// would allow every file of this machine; name a directory")
            self.prefixes.append(prefix)

    @property
    def stores(self) -> set[str]:
        """What is read from."""
        return {each.store for each in self.prefixes}

    @property
    def schemes(self) -> list[str]:
        """The schemes of which something is allowed."""
        return sorted({each.scheme for each in self.prefixes})

    def prefix_of(self, address: Address) -> Address | None:
        """The prefix that allows the address; the shortest, for what is below it is not the operator's own words."""
        found = [each for each in self.prefixes if address.within(each)]
        return min(found, key=lambda each: len(each.segments), default=None)
