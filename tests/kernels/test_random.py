"""random: its keys are uniform and belong to seed, row and step."""

from __future__ import annotations

import numpy as np
import torch

from queryselect import Client
from queryselect_service.maths.noise import uniform
from tests.strategy_case import ROWS, StrategyCase

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """One output of the published generator, in Python's integers."""
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def key(seed: int, row: int, step: int = 0) -> float:
    start = splitmix64((splitmix64(seed) + 0x9E3779B97F4A7C15 * (step + 1)) & MASK)
    return ((splitmix64((start + 0x9E3779B97F4A7C15 * (row + 1)) & MASK) >> 12) + 0.5) / 2**52


class TestRandom(StrategyCase):
    name = "random"

    def make(self, rng):
        self.seed = int(rng.bit_generator.seed_seq.entropy)
        return {}

    def oracle(self, inputs, k, context, candidates):
        scores = np.array([key(self.seed, row) for row in range(ROWS)])
        order = sorted(np.flatnonzero(candidates), key=lambda row: -scores[row])[:k]
        return np.array(order), scores[order], scores


def test_the_published_generator_gives_its_published_numbers():
    """The first outputs of SplitMix64 from seed 1234567, as its authors' reference prints them."""
    state, found = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        found.append(splitmix64(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_keys_are_those_of_python_integers():
    rows = torch.tensor([0, 1, 2**31, 2**40 + 3, 2**62])
    for seed in (0, 1, 2**63, 2**64 - 1):
        for step in (0, 5):
            assert uniform(seed, rows, step).tolist() == [key(seed, row, step) for row in rows.tolist()]


def test_keys_are_never_0_or_1():
    """Whatever 64 bits the mix gives: noise may take logarithms of a key and of what is left of it."""
    for bits in (0, 2**64 - 1):
        assert 0 < ((bits >> 12) + 0.5) / 2**52 < 1
    assert float(torch.tensor((2**64 - 1) >> 12).double() + 0.5) * 2.0**-52 < 1


def test_keys_are_uniform_and_independent():
    n = 100_000
    draws = [uniform(seed, torch.arange(n), step).numpy() for seed, step in ((0, 0), (1, 0), (0, 1))]
    for x in draws:
        assert 0 < x.min() < x.max() < 1
        counts = np.histogram(x, 100, (0, 1))[0]
        assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 160  # chi^2 with 99 degrees: 160 has p < 1e-4
        assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.015
    for x, y in ((draws[0], draws[1]), (draws[0], draws[2])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.015


def test_every_row_is_as_likely_as_any_other(local: Client):
    counts = np.zeros(20)
    for seed in range(2000):
        counts[local.select("random", 5, num_rows=20, seed=seed).indices] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 50  # chi^2 with 19 degrees, times 1 - 5/20
