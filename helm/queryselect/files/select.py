# ruff: noqa: INP001, T201  # no module: a container runs it as it stands
"""What `helm test` runs: one selection, the way that other pods go.

TARGET: host and port of the Service. TLS: the file of whom to trust, which may be missing, where the server speaks TLS.
IDENTITY: the folder of a certificate to show. TOKENS: set where the server asks for a token. TOKEN: one, where given.
"""

import os
from pathlib import Path

import grpc
import numpy as np

from queryselect import Client, Unauthenticated


def credentials() -> grpc.ChannelCredentials | None:
    """What TLS needs; None where there is none."""
    if "TLS" not in os.environ:
        return None
    authority, identity = Path(os.environ["TLS"]), os.environ.get("IDENTITY")
    roots = authority.read_bytes() if authority.exists() else None  # public CAs, of gRPC's own list
    if identity is None:
        return grpc.ssl_channel_credentials(roots)
    pair = [(Path(identity) / name).read_bytes() for name in ("tls.key", "tls.crt")]
    return grpc.ssl_channel_credentials(roots, *pair)


target, token = os.environ["TARGET"], os.environ.get("TOKEN")
with Client(target, tls=credentials(), token=token, timeout=60) as client:
    try:
        picks = client.select("k_center_greedy", budget=2, embeddings=np.eye(3), labeled=[0])
    except Unauthenticated:
        if token is not None or "TOKENS" not in os.environ:
            raise
        print(f"{target} asks for a token, as it should; with test.tokenSecret this test would make a selection")
    else:
        assert picks.indices.tolist() == [1, 2], picks
        print(f"{target} chose rows {picks.indices.tolist()}")
