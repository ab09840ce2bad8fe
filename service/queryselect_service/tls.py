"""TLS whose certificates are replaced while the server serves.

Requirements that the design meets:

- A new certificate is that of the next connection: files are looked at whenever one begins. Connections that are there
  keep theirs, and no request is dropped.
- What is read at different times does not mix: a key that is not the certificate's is never used, and the pair that was
  there goes on.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from queryselect_service.reload import Reloaded
from queryselect_service.settings import Settings

#: OpenSSL's flag for whoever does not mind that a certificate has ended, for which `ssl` has no name.
NO_CHECK_TIME = 0x200000


class Pair(NamedTuple):
    """Certificate, key and whom to trust, as gRPC takes them. ends: of the certificate, in seconds since 1970."""

    taken: grpc.ServerCertificateConfiguration
    ends: float


def pair(settings: Settings) -> Reloaded[Pair]:
    """Certificate, key and whom to trust, as the files say now. Raises ValueError for files that can't be used."""
    cert, key = Path(settings.tls_cert), Path(settings.tls_key)
    authorities = Path(settings.tls_client_ca) if settings.tls_client_ca else None
    files = [cert, key] if authorities is None else [cert, key, authorities]
    return Reloaded("certificate", files, lambda: _read(cert, key, authorities))


def credentials(pair: Reloaded[Pair], *, ask: bool) -> grpc.ServerCredentials:
    """What a port needs to speak TLS. ask: whether clients need a certificate too."""
    given = pair.get()
    news: Any = _news(pair, given)  # its stubs do not know of None
    return grpc.dynamic_ssl_server_credentials(given.taken, news, ask)


def _news(pair: Reloaded[Pair], given: Pair) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    """What gRPC asks at every new connection: the pair where it is another than before, else None."""

    def news() -> grpc.ServerCertificateConfiguration | None:
        nonlocal given
        now = pair.get()
        if now is given:
            return None  # gRPC would make everything anew
        given = now
        return now.taken

    return news


def _read(cert: Path, key: Path, authorities: Path | None) -> Pair:
    """The pair, and whom to trust. Raises ValueError where they are no PEM or don't belong together."""
    paths = {"tls_cert": cert, "tls_key": key} | ({} if authorities is None else {"tls_client_ca": authorities})
    before = {name: _bytes(name, path) for name, path in paths.items()}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:
        raise ValueError(f"tls_cert {cert} and tls_key {key}: {_words(error)}") from None
    if authorities is not None:
        try:
            context.load_verify_locations(authorities)
        except (OSError, ValueError) as error:
            raise ValueError(f"tls_client_ca {authorities}: {_words(error)}") from None
    if before != {name: _bytes(name, path) for name, path in paths.items()}:  # OpenSSL has read by itself
        raise ValueError("the files of tls_cert, tls_key and tls_client_ca are being written just now")
    pair = (before["tls_key"], before["tls_cert"])
    taken = grpc.ssl_server_certificate_configuration([pair], before.get("tls_client_ca"))
    return Pair(taken, _ends(context, before["tls_cert"].decode("ascii", "ignore")))


def _ends(server: ssl.SSLContext, chain: str) -> float:
    """When the certificate ends, as a client sees it who is shown it: `ssl` reads it for nobody else.

    Not a number where no client would take the certificate whenever it ends, such as one that is for clients.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags = ssl.VerifyFlags(ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context.load_verify_locations(cadata=chain)
        client = context.wrap_bio(to_client, to_server)
        sides = (client, server.wrap_bio(to_server, to_client, server_side=True))
        for _ in range(4):  # more than a handshake has turns
            for side in sides:
                with suppress(ssl.SSLWantReadError):
                    side.do_handshake()
        shown = client.getpeercert()
        return math.nan if not shown else ssl.cert_time_to_seconds(str(shown["notAfter"]))
    except (ssl.SSLError, ValueError):
        return math.nan


def _bytes(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{name} {path}: {error.strerror}") from None


def _no_password() -> str:
    raise ValueError("the key is encrypted; it must not be")  # or OpenSSL would ask whoever started the server


def _words(error: Exception) -> str:
    """What OpenSSL has to say, in words."""
    if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
        return "the key is not the certificate's"
    return "no PEM that can be used" if isinstance(error, ssl.SSLError) else str(error)
