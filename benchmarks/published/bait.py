"""BAIT as its papers state it: what computing it their way costs, and a judge of our picks.

Ash, Goel, Krishnamurthy and Kakade, Gone fishing: neural active learning with Fisher embeddings (NeurIPS 2021),
arXiv:2106.09675, algorithm 1; Huseljic, Hahn, Herde, Rauch and Sick, Fast fishing: approximating BAIT for efficient and
scalable deep active image classification (2024), arXiv:2404.08981, for the approximations. Written from the text alone.

With V_x (P, c) the factor of a row's Fisher information I_x = V_x V_x^T, F the mean of I_x over the pool and A = M^-1,

    forward, 2 k times:    argmax over x of tr[(I + G_x)^-1 H_x];    A <- A - A V (I + G)^-1 V^T A
    backward, down to k:   argmin over x of tr[(I - G_x)^-1 H_x];    A <- A + A V (I - G)^-1 V^T A
    where                  G_x = V_x^T A V_x    and    H_x = V_x^T A F A V_x

are computed anew for every candidate at every step, many candidates at once: 8 N c P^2 flop a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Part, Peer, Problem
from benchmarks.clock import scaled
from benchmarks.machine import free_memory

TEXT = "published algorithm (Ash et al. 2021), its text"
TEXT_F64 = "published algorithm (Ash et al. 2021), its text in float64"
SHARED = "published algorithm, V^T A computed once"
JUDGE = "published algorithm in float64, in whole"

#: Entries of the candidates' factors that are computed at once.
BATCH_ENTRIES = 1 << 24
#: Flop up to which a selection is run in whole, and up to which one step is run on all rows; by device.
WHOLE_FLOP = {"cpu": 2e11, "cuda": 1e14}
STEP_FLOP = {"cpu": 1e12, "cuda": 1e15}
#: The steps of the two runs by which a part is scaled, and the fewest rows: the update of A must not count among them.
FEW, FEWEST_ROWS = (1, 4), 8


@dataclass(frozen=True)
class Form:
    """One of the papers' forms, and how it is computed.

    top_classes: Exp(c), the expectation over the c likeliest classes, renormalised; None: over all. binary: the Fisher
    information of the likeliest class against the others; C disappears. diagonal: F and A are their diagonals.
    shared: V^T A is computed once for G and H, which halves the products of the text.
    """

    dtype: torch.dtype = torch.float32
    top_classes: int | None = None
    binary: bool = False
    diagonal: bool = False
    shared: bool = False

    def heads(self, p: Tensor) -> Tensor:
        """L_x^T (n, c, C') of probabilities p (n, C), by which V_x = L_x (x) x.

        The rows are sqrt(p_j) (e_j - p); in the binary form, where C' = 1, the number sqrt(p_max (1 - p_max)).
        """
        if self.binary:
            most = p.amax(1)
            return (most * (1 - most)).sqrt()[:, None, None]
        if self.top_classes is None:
            weights, classes = p, torch.arange(p.shape[1], device=p.device).expand_as(p)
        else:
            weights, classes = p.topk(self.top_classes, dim=1)  # (n, c)
            weights = weights / weights.sum(1, keepdim=True)
        units = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)[classes]  # (n, c, C)
        return weights.sqrt()[..., None] * (units - p[:, None])

    def shape(self, problem: Problem) -> tuple[int, int]:
        """P and c, the shape of a row's factor."""
        dims, classes = problem.inputs["embeddings"].shape[1], problem.inputs["probabilities"].shape[1]
        return (dims, 1) if self.binary else (classes * dims, self.top_classes or classes)

    def flop(self, problem: Problem) -> float:
        """What G_x and H_x of one row cost."""
        size, columns = self.shape(problem)
        if self.diagonal:
            return 4.0 * columns * (1 + columns) * size
        return (4.0 if self.shared else 8.0) * columns * size**2


class Factors:
    """The factors of all rows, made where they are asked for, transposed: V_x^T (c, P).

    Those of candidates are scaled by sqrt(k / (n_L + k)), the part that picks have in M.
    """

    def __init__(self, problem: Problem, form: Form) -> None:
        p = problem.inputs["probabilities"].to(form.dtype)
        self.x = problem.inputs["embeddings"].to(form.dtype)  # (N, D)
        self.heads = form.heads(p / p.sum(1, keepdim=True))  # (N, c, C')
        self.scale = (problem.k / (len(problem.context) + problem.k)) ** 0.5
        size, columns = form.shape(problem)
        self._step = max(1, BATCH_ENTRIES // (size * columns))

    def of(self, rows: Tensor | slice, *, scaled: bool) -> Tensor:
        """The factors (m, c, P) of m rows."""
        heads = self.heads[rows] * self.scale if scaled else self.heads[rows]
        return torch.einsum("nck,nd->nckd", heads, self.x[rows]).flatten(2)

    def batches(self, rows: Tensor | None = None, *, scaled: bool = True) -> Iterator[Tensor]:
        """The same of some rows (m,), or of all, a batch at a time."""
        for start in range(0, len(self.x if rows is None else rows), self._step):
            batch = slice(start, start + self._step)
            yield self.of(batch if rows is None else rows[batch], scaled=scaled)

    def information(self, rows: Tensor | None = None, *, diagonal: bool) -> Tensor:
        """The sum of I_x over some rows, or over all: (P, P), or its diagonal (P,)."""
        size = self.x.shape[1] * self.heads.shape[2]
        total = self.x.new_zeros(size) if diagonal else self.x.new_zeros(size, size)
        for batch in self.batches(rows, scaled=False):
            flat = batch.flatten(0, 1)  # (m c, P)
            if diagonal:
                total += flat.square().sum(0)
            else:
                total.addmm_(flat.T, flat)
        return total

    def ridge(self, problem: Problem) -> float:
        """Lambda: as it is, or times the mean of |x|^2 / D, by which it does not hang on the features' scale."""
        ridge = float(problem.params.get("ridge", 1.0))
        if problem.params.get("ridge_scale", "RELATIVE") == "ABSOLUTE":
            return ridge
        return ridge * float(self.x.square().mean())


class Design:
    """F, and A = M^-1 of what is labelled and chosen: (P, P), or their diagonals (P,)."""

    def __init__(self, problem: Problem, form: Form, factors: Factors) -> None:
        """M_0 = lambda I + n_L / (n_L + k) F_L, F_L the mean (or the sum) of I_x over the n_L labelled rows."""
        self._form, labeled, n = form, len(problem.context), len(problem.candidates)
        self.fisher = factors.information(diagonal=form.diagonal).div_(n)
        self.inverse = torch.zeros_like(self.fisher)
        if labeled:
            averaged = labeled if problem.params.get("fisher_scale", "MEAN") == "MEAN" else 1
            known = factors.information(problem.context, diagonal=form.diagonal)
            self.inverse += known.mul_(labeled / (labeled + problem.k) / averaged)
        diagonal = self.inverse if form.diagonal else self.inverse.diagonal()
        diagonal += factors.ridge(problem)
        if form.diagonal or not labeled:
            diagonal.reciprocal_()
        else:
            self.inverse = torch.linalg.inv(self.inverse)

    def products(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """G and H (m, c, c) of factors v (m, c, P)."""
        if self._form.shared:
            u = self._times(v, self.inverse)
            return u @ v.mT, self._times(u, self.fisher) @ u.mT
        g = self._times(v, self.inverse) @ v.mT
        return g, self._times(self._times(self._times(v, self.inverse), self.fisher), self.inverse) @ v.mT

    def change(self, v: Tensor, sign: int) -> Tensor:
        """By how much tr(A F) falls (sign 1) when each of the factors v (m, c, P) joins M, rises (-1) when it leaves.

        tr[(I + sign G)^-1 H], (m,).
        """
        g, h = self.products(v)
        if g.shape[1] == 1:
            return (h / (1 + sign * g)).flatten()
        unit = torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
        solved: Tensor = torch.linalg.solve(unit + sign * g, h)
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def move(self, v: Tensor, sign: int) -> None:
        """Adds the row with factor v (c, P) to M, or takes it out: Woodbury's formula."""
        u = self._times(v, self.inverse)  # (c, P)
        inner = torch.eye(len(v), dtype=v.dtype, device=v.device) + sign * (u @ v.T)
        w = torch.linalg.solve(inner, u)  # (c, P)
        if self._form.diagonal:
            self.inverse.sub_((u * w).sum(0), alpha=sign)
        else:
            self.inverse.addmm_(u.T, w, alpha=-sign)

    def _times(self, rows: Tensor, matrix: Tensor) -> Tensor:
        return rows * matrix if self._form.diagonal else rows @ matrix


def select(problem: Problem, form: Form, steps: int | None = None) -> Tensor:
    """The picks (k,) in the order of choice; with `steps`, the rows that so many forward steps choose.

    problem: embeddings (N, D) and probabilities (N, C); of a strategy's parameters ridge, ridge_scale, fisher_scale and
    oversampling count. Ties go to the lowest row, backward to the row that was chosen first.
    """
    factors = Factors(problem, form)
    design = Design(problem, form, factors)
    free, chosen = problem.candidates.clone(), problem.context[:0]
    for _ in range(forward_steps(problem) if steps is None else steps):
        gains = torch.cat([design.change(v, 1) for v in factors.batches()])
        best = gains.masked_fill_(~free, -torch.inf).argmax()[None]
        design.move(factors.of(best, scaled=True)[0], 1)
        free[best], chosen = False, torch.cat([chosen, best])
    return chosen if steps else backward(problem, factors, design, chosen)


def forward_steps(problem: Problem) -> int:
    """How many rows are chosen before some are dropped again."""
    oversampling: int = problem.params.get("oversampling", 2)
    return min(oversampling * problem.k, int(problem.candidates.sum()))


def backward(problem: Problem, factors: Factors, design: Design, chosen: Tensor) -> Tensor:
    """Those k of the chosen rows that are left when the others have been dropped one by one, in the same order."""
    while len(chosen) > problem.k:
        worst = torch.cat([design.change(v, -1) for v in factors.batches(chosen)]).argmin()
        design.move(factors.of(chosen[worst, None], scaled=True)[0], -1)
        chosen = torch.cat([chosen[:worst], chosen[worst + 1 :]])
    return chosen


def affordable(problem: Problem, form: Form) -> Tensor | Part:
    """The selection in whole where that is a matter of seconds, otherwise a few steps, on some of the rows, scaled.

    The part leaves out the backward steps, and what is labelled where it leaves out rows: it makes the whole cheaper
    than it is. Raises MemoryError where A and F have no room.
    """
    n, steps, kind = len(problem.candidates), forward_steps(problem), problem.device.type
    flop = form.flop(problem)
    if flop * n * steps <= WHOLE_FLOP[kind]:
        return select(problem, form)
    size, _ = form.shape(problem)
    needed = 0 if form.diagonal else 3 * form.dtype.itemsize * size**2  # one more while they are made
    free = torch.cuda.mem_get_info(problem.device)[0] if kind == "cuda" else free_memory()
    if needed > free:
        raise MemoryError(f"A and F, and what makes them, need {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
    rows = max(FEWEST_ROWS, min(n, int(STEP_FLOP[kind] / flop)))
    some = problem if rows == n else problem.first(rows)
    start, scan, _ = scaled(lambda few: select(some, form, few), steps, FEW, problem.device)
    said = f"{FEW[1]} of {steps} steps" + (f" on {rows} of {n} rows" if rows < n else "") + ", scaled"
    return Part(start + scan * n / rows, said)


def peers(form: Form) -> tuple[Peer, ...]:
    """The published algorithm in float32 as its text states it, and with half the products of the text.

    In float64, too: what its picks cost where they are to be right, as float32 does not tell close gains apart.
    """
    forms = {TEXT: form, TEXT_F64: replace(form, dtype=torch.float64), SHARED: replace(form, shared=True)}
    return tuple(Peer(name, partial(affordable, form=one), rounds=3) for name, one in forms.items())


def judge(form: Form) -> Peer:
    """The published algorithm in float64, in whole: its picks must be ours."""
    exact = replace(form, dtype=torch.float64, shared=True)
    return Peer(JUDGE, partial(select, form=exact), exact=True, rounds=1, peak=False)
