"""The labels that a batch may get, under K parameter samples: all of them or, where those are too many, draws.

A row's label is `V` variables of `c` values each: one of C classes, or L labels that are there or not. Given the
parameters they are independent, of each other and of other rows', so that

    p(y_1 … y_i | k) = prod_j p(y_j | k)

and a configuration m of the batch's labels has a posterior over the parameters, w_mk ∝ p(y^m | k).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from queryselect_service.maths.information import surprise
from queryselect_service.maths.noise import uniform

#: A posterior weight below this is none: it would count for nothing, and what is made of it may be a denormal number,
#: which processors take a hundred times as long for.
LEAST_WEIGHT = 1e-60
#: Posterior weights that are worked on between two checks.
STRETCH = 1 << 20


class Configurations:
    """The configurations of a growing batch's labels.

    posteriors: (M, K), w_m. left: (M,), their entropies, what a configuration leaves open of the parameters. weights:
    (M,), how likely each configuration is, or 1/M each where they are drawn. exact: whether they are all there are. In
    memory: a few times M K float64.
    """

    def __init__(
        self, members: int, most: int, seed: int, device: torch.device, check: Callable[[], None] = lambda: None
    ) -> None:
        """members: K. most: the configurations up to which all are kept; beyond, about so many are drawn.

        check: called between stretches of work; may raise.
        """
        self.exact = True
        self._members, self._most, self._seed, self._check = members, most, seed, check
        self._rows: list[Tensor] = []  # (K, V, c) each
        self._logs = torch.zeros(1, members, dtype=torch.float64, device=device)  # (M, K), ln p(y^m | k)
        self._settle()

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def information(self) -> Tensor:
        """I(y_1 … y_i; θ), (): the mean of KL(w_m | uniform). Of drawn configurations an estimate, never above ln K."""
        return math.log(self._members) - self.weights @ self.left

    def add(self, p: Tensor) -> None:
        """Takes a row into the batch. p: (K, V, c), its distributions."""
        self._rows.append(p)
        variables, values = p.shape[1:]
        if self.exact and len(self) * values**variables <= self._most:
            for variable in p.log().unbind(1):  # (K, c)
                self._check()
                self._logs = (self._logs[:, None] + variable.T).flatten(0, 1)
            self._logs = self._logs[(self._logs > -torch.inf).any(1)]  # the others can't be
        else:
            new = self._rows[-1:]
            if self.exact:
                self.exact, new = False, self._rows
                self._logs = self._logs.new_zeros(max(1, self._most // self._members) * self._members, self._members)
            for number, row in enumerate(new, len(self._rows) - len(new)):
                self._draw(row, number)
        self._settle()

    def _draw(self, p: Tensor, number: int) -> None:
        """Draws the labels of a row, its number in the batch, from the parameter sample that each configuration is of.

        Configuration m is of sample m mod K, so that any first few are of all samples alike.
        """
        variables, logs = p.shape[1], p.log()
        bounds = p.cumsum(-1)  # (K, V, c)
        for some in self._stretches(len(self._logs)):
            configurations = torch.arange(some.start, some.stop, device=p.device)
            numbers = configurations[:, None] * variables + torch.arange(variables, device=p.device)
            noise = uniform(self._seed, numbers, step=number)[..., None]  # (m, V, 1)
            mine = bounds[configurations % self._members]  # (m, V, c)
            drawn = (noise * mine[..., -1:] > mine).sum(-1)  # (m, V)
            for at in range(variables):
                self._logs[some] += logs[:, at].T[drawn[:, at]]

    def _settle(self) -> None:
        """Posteriors and weights from the logarithms."""
        count = len(self._logs)
        self.posteriors, self.left = torch.empty_like(self._logs), self._logs.new_empty(count)
        likelihood = torch.empty_like(self.left)
        for some in self._stretches(count):
            likelihood[some] = self._logs[some].logsumexp(1)  # ln sum_k p(y^m | k)
            posteriors = (self._logs[some] - likelihood[some, None]).exp_()
            self.posteriors[some] = posteriors.masked_fill_(posteriors < LEAST_WEIGHT, 0)
            self.left[some] = surprise(posteriors).sum(1)
        if self.exact:
            self.weights = likelihood.sub_(math.log(self._members)).exp_()
        else:
            self.weights = torch.full_like(likelihood, 1 / count)

    def _stretches(self, configurations: int) -> Iterator[slice]:
        """Slices that cover so many configurations, with a check before each."""
        step = max(1, STRETCH // self._members)
        for start in range(0, configurations, step):
            self._check()
            yield slice(start, min(start + step, configurations))
