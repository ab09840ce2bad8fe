"""What a bearer token is made of: `qs_NAME_SECRET`, where the name tells whose it is, and 256 random bits that it is.

A server keeps a salted hash. One fast hash is right for a secret that nobody can guess; a slow one, as passwords need,
would let anybody keep a server busy by wrong tokens.
"""

from __future__ import annotations

import hmac
import re
import secrets

#: Names of tokens: they stand in logs, so nothing else does.
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
TOKEN = re.compile(rf"qs_({NAME.pattern})_([0-9a-f]{{64}})")
SALT_BYTES, HASH_BYTES = 16, 32


def make(name: str) -> tuple[str, bytes, bytes]:
    """A new token of that name, and the salt and the hash by which a server knows it."""
    secret, salt = secrets.token_hex(32), secrets.token_bytes(SALT_BYTES)
    return f"qs_{name}_{secret}", salt, digest(secret, salt)


def digest(secret: str, salt: bytes) -> bytes:
    """The hash of a secret."""
    return hmac.digest(salt, secret.encode(), "sha256")
