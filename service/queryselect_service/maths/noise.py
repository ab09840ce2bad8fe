"""Noise that depends on the seed, the global row and the step alone.

Counter-based, so that neither the layout of the rows nor the order of the draws changes a number: the SplitMix64 stream
of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014, doi:10.1145/2660193.2660195),
indexed by row, its start derived from the seed and the step by the same mix.
"""

from __future__ import annotations

from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
MASK = (1 << 64) - 1
#: Bytes that the noise of a row touches while it is made.
NOISE_BYTES = 64


def uniform(seed: int, rows: Tensor, step: int = 0) -> Tensor:
    """Uniform numbers of the open interval (0, 1), one per global row (n,) int64; float64, odd multiples of 2^-53.

    seed: 0 to 2^64 - 1.
    """
    start = _mix_int((_mix_int(seed) + GAMMA * (step + 1)) & MASK)
    z = (rows + 1) * _signed(GAMMA) + _signed(start)  # wraps around modulo 2^64, as it should
    for shift, factor in MIX:
        z = (z ^ _shift_right(z, shift)) * _signed(factor)
    return (_shift_right(z, 12).double() + 0.5) * 2.0**-52  # with one bit more the largest would round to 1


def _mix_int(z: int) -> int:
    for shift, factor in MIX:
        z = ((z ^ (z >> shift)) * factor) & MASK
    return z


def _signed(z: int) -> int:
    """The int64 of the same 64 bits: torch has no arithmetic on unsigned ones."""
    z &= MASK
    return z - (1 << 64) if z >> 63 else z


def _shift_right(z: Tensor, by: int) -> Tensor:
    """The logical shift; torch's own drags the sign along."""
    return (z >> by) & ((1 << (64 - by)) - 1)
