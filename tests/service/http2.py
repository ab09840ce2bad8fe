"""Requests as no gRPC library would send them: a raw HTTP/2 connection, headers as given."""

from __future__ import annotations

import socket
import struct

DATA, HEADERS, RESET, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS, ACK = 1, 4, 1
Header = tuple[bytes, bytes]


def send(port: int, path: str, *headers: Header, message: bytes = b"") -> int:
    """Calls a method with one message. The kind of the frame that ended the call; GOAWAY too where the line was cut."""
    data = b"\x00" + struct.pack(">I", len(message)) + message
    with begin(port, path, *headers) as line:
        line.sendall(_frame(DATA, END_STREAM, 1, data))
        come = line.makefile("rb")
        while len(head := come.read(9)) == 9:
            size, kind, flags, stream = int.from_bytes(head[:3]), head[3], head[4], int.from_bytes(head[5:])
            come.read(size)
            if kind == SETTINGS and not flags & ACK:
                line.sendall(_frame(SETTINGS, ACK, 0, b""))
            if kind in {RESET, GOAWAY} or (stream == 1 and kind in {DATA, HEADERS} and flags & END_STREAM):
                return kind
    return GOAWAY


def begin(port: int, path: str, *headers: Header) -> socket.socket:
    """A connection in which a method is called, and nothing follows."""
    mine = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"localhost")]
    mine += [(b"content-type", b"application/grpc"), (b"te", b"trailers"), *headers]
    block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in mine)
    line = socket.create_connection(("127.0.0.1", port), 10)
    line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0, b""))
    line.sendall(_frame(HEADERS, END_HEADERS, 1, block))
    return line


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def _text(text: bytes) -> bytes:
    """A string literal of HPACK, without Huffman's code."""
    size, rest = len(text), b""
    if size >= 127:
        left, size = size - 127, 127
        while left >= 128:
            rest += bytes([left % 128 + 128])
            left //= 128
        rest += bytes([left])
    return bytes([size]) + rest + text
