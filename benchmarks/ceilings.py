"""What the machine can do at best, measured in the same run as what shall come near it.

Every ceiling is a rate: bytes a second that are read (by a sum, by a matrix-vector product), flop a second of matrix
products, exponentials and logarithms a second, and bytes a second through the loopback. The best of a few tries: what
disturbs makes slower, never faster.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.clock import timed
from benchmarks.progress import Progress
from benchmarks.service.loopback import receiver, tcp

TRIES = 7


def measure(device: torch.device, *, quick: bool) -> dict[str, float]:
    """Every ceiling of a device, by its name. quick: on arrays so small that the rates mean little."""
    size = (1 << 22 if quick else 1 << 28) * (8 if device.type == "cuda" else 1)  # bytes; beyond any cache
    side = 256 if quick else 8192 if device.type == "cuda" else 2048
    ways: dict[str, Callable[[], tuple[float, Callable[[], object]]]] = {
        "read": lambda: _read(size, device),
        "gemv f32": lambda: _gemv(size, torch.float32, device),
        "gemv f64": lambda: _gemv(size, torch.float64, device),
        "gemm f32": lambda: _gemm(side, torch.float32, device),
        "gemm f64": lambda: _gemm(side, torch.float64, device),
        "exp": lambda: _function(torch.exp, size // 8, device),
        "log": lambda: _function(torch.log, size // 8, device),
    }
    found = {}
    with Progress(len(ways) + 1, "ceilings") as progress:
        for name, way in ways.items():
            progress.now(name)
            amount, call = way()
            found[name] = amount / min(timed(call, device)[0] for _ in range(TRIES))
            progress.step()
        progress.now("loopback")
        found["loopback"] = _loopback(size)
    return found


def _read(size: int, device: torch.device) -> tuple[float, Callable[[], object]]:
    x = torch.ones(size // 4, device=device)
    return size, x.sum


def _gemv(size: int, dtype: torch.dtype, device: torch.device) -> tuple[float, Callable[[], object]]:
    """A matrix of rows as embeddings have them: 384 dimensions."""
    matrix = torch.ones(size // dtype.itemsize // 384, 384, dtype=dtype, device=device)
    vector, out = matrix[0].clone(), matrix[:, 0].clone()
    return matrix.nbytes, lambda: torch.mv(matrix, vector, out=out)


def _gemm(side: int, dtype: torch.dtype, device: torch.device) -> tuple[float, Callable[[], object]]:
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * side**3, lambda: torch.mm(a, b, out=out)


def _function(
    function: Callable[..., Tensor], numbers: int, device: torch.device
) -> tuple[float, Callable[[], object]]:
    """In float64, as predictions are computed."""
    x = torch.full((numbers,), 0.7, dtype=torch.float64, device=device)
    out = torch.empty_like(x)
    return numbers, lambda: function(x, out=out)


def _loopback(size: int) -> float:
    payload = np.ones(size, np.uint8)
    with receiver() as (_, port):
        return size / min(tcp(port, payload, keep=False) for _ in range(TRIES))
