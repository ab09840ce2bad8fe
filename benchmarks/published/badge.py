"""BADGE as its authors' factorised code has it: one look at all rows per pick, in the types given, and a draw by scipy.

Ash, Zhang, Krishnamurthy, Langford and Agarwal, Deep batch active learning by diverse, uncertain gradient lower bounds
(ICLR 2020), arXiv:1906.03671, algorithm 1; the factorised distance of Zhang et al. (2023), arXiv:2306.09910, appendix
D. Written from the papers' text alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import Part, Peer, Problem
from benchmarks.clock import timed

NAME = "the published algorithm"
#: Picks that are made; those of more are scaled.
PICKS = 40


def select(problem: Problem, k: int) -> Tensor:
    """The picks (k,)."""
    from scipy.stats import rv_discrete

    h, p = problem.inputs["embeddings"], problem.inputs["probabilities"].to(problem.inputs["embeddings"].dtype)
    a = p - torch.nn.functional.one_hot(p.argmax(1), p.shape[1])
    lengths = a.square().sum(1) * h.square().sum(1)
    rng, nearest, numbers = np.random.default_rng(problem.seed), torch.full_like(lengths, torch.inf), np.arange(len(h))
    picks = [int(lengths.argmax())]
    while len(picks) < k:
        last = picks[-1]
        squared = lengths + lengths[last] - 2 * (a @ a[last]) * (h @ h[last])
        nearest = torch.minimum(nearest, squared.clamp_min(0))
        nearest[last] = 0
        odds = nearest.double().cpu().numpy()
        picks.append(int(rv_discrete(values=(numbers, odds / odds.sum())).rvs(random_state=rng)))
    return torch.tensor(picks)


def run(problem: Problem) -> Part:
    """Some of the picks, scaled: each takes as long as any other."""
    few = min(PICKS, problem.k)
    seconds, _ = timed(lambda: select(problem, few), problem.device)
    said = "" if few == problem.k else f"{few} of {problem.k} picks, scaled"
    return Part(seconds * problem.k / few, said)


PEER = Peer(NAME, run, "by factors, one look at all rows per pick, drawn by scipy")
