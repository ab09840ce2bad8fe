"""What a model predicts, as float64 distributions over the last axis."""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

#: Exponents are cut off here, and likelihoods no larger than this are none.
LEAST_EXPONENT, LEAST_LIKELIHOOD = -700.0, 1e-304


def distributions(values: Tensor, *, logits: bool, multilabel: bool) -> Tensor:
    """Distributions from probabilities or logits of shape (n, C).

    Multi-class: (n, C), renormalised. Multi-label: (n, C, 2), label absent and present; from logits both halves keep
    their digits however saturated the label is, which 1 - q would not.
    """
    values = values.double()
    if multilabel:
        if logits:
            # Not sigmoid: torch computes the last few of a tensor in another way than the others, a digit apart, and
            # rows that are the same must score the same.
            return torch.softmax(torch.stack([torch.zeros_like(values), values], dim=-1), dim=-1)
        present = values.clamp(0, 1)
        return torch.stack([1 - present, present], dim=-1)
    return torch.softmax(values, dim=-1) if logits else values / values.sum(-1, keepdim=True)


class Predictions:
    """The distributions of all rows, made of what the caller sent where they are read.

    Indexed by rows (a slice, a mask, row numbers) it gives their probabilities, float64: (r, C) that sum to 1 or, in a
    multi-label task, (r, L) of labels present. As a whole they may take eight times the memory of what was sent.

    values: (n, C) as sent, probabilities or logits.
    """

    def __init__(self, values: Tensor, *, logits: bool = False, multilabel: bool = False) -> None:
        """values: (n, C) probabilities or logits."""
        self.values, self._logits, self.multilabel = values, logits, multilabel
        self.shape, self.device = values.shape, values.device

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        found = distributions(self.values[rows], logits=self._logits, multilabel=self.multilabel)
        return found[..., 1] if self.multilabel else found

    def at(self, rows: slice | Tensor) -> Predictions:
        """Those of some rows."""
        return self.of(self.values[rows])

    def of(self, values: Tensor) -> Predictions:
        """Those of other values (m, C), sent as these were."""
        return Predictions(values, logits=self._logits, multilabel=self.multilabel)

    def tempered(self, rows: slice | Tensor, temperature: float) -> Tensor:
        """The distributions softmax(z / temperature) (r, C) of logits z, or of logarithms where probabilities came."""
        values = self.values[rows].double()
        return torch.softmax((values if self._logits else values.log()) / temperature, dim=-1)

    def variances(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """The variance q (1 - q) of every label (r, L) or class (r, C), with all digits however saturated q is."""
        found = distributions(self.values[rows], logits=self._logits, multilabel=self.multilabel)
        if self.multilabel:
            return found.prod(-1)
        mode, rest = split_mode(found)
        at = found.argmax(-1, keepdim=True)
        return (found * (1 - found)).scatter(-1, at, (mode * rest.sum(-1))[:, None])


class SamplesKind(enum.StrEnum):
    """What predictions under parameter samples are."""

    PROBABILITIES = "PROBABILITIES"
    LOG_PROBABILITIES = "LOG_PROBABILITIES"
    LOGITS = "LOGITS"


class Samples:
    """Predictions of all rows under K parameter samples, made of what the caller sent where they are read.

    Indexed by rows they are float64 distributions over the last axis: (r, K, C) or, in a multi-label task,
    (r, K, L, 2), label absent and present.

    values: (n, K, C) as sent.
    """

    def __init__(
        self, values: Tensor, kind: SamplesKind = SamplesKind.PROBABILITIES, *, multilabel: bool = False
    ) -> None:
        self.values, self.kind, self.multilabel = values, kind, multilabel
        self.shape, self.device = values.shape, values.device

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self.of(self.values[rows])

    def of(self, values: Tensor) -> Tensor:
        """The distributions of other values (..., C), sent as these were."""
        own = values.dtype is not torch.float64  # a copy then, to be written to
        values = values.double()
        if self.multilabel:
            return _label_distributions(values, self.kind)
        if self.kind is SamplesKind.PROBABILITIES:
            return torch.mul(values, values.sum(-1, keepdim=True).reciprocal_(), out=values if own else None)
        # By hand: over a last axis of a few classes torch's softmax takes several times as long.
        likelihoods = _exponentials(values.sub(values.amax(-1, keepdim=True)))
        return likelihoods.mul_(likelihoods.sum(-1, keepdim=True).reciprocal_())  # a division takes twice as long

    @property
    def votes(self) -> Tensor:
        """How many samples find each class likeliest, the first of equal ones: (n, C) or, per label, (n, L, 2).

        Told by what was sent: a class is the likeliest by its probability, logarithm or logit alike.
        """
        if self.multilabel:
            even = {
                SamplesKind.PROBABILITIES: 0.5,
                SamplesKind.LOG_PROBABILITIES: -math.log(2),
                SamplesKind.LOGITS: 0.0,
            }
            present = (self.values > even[self.kind]).sum(1).double()  # (n, L)
            return torch.stack([self.shape[1] - present, present], dim=-1)
        likeliest = self.values.argmax(-1)  # (n, K)
        counts = torch.zeros(len(self), self.shape[2], dtype=torch.float64, device=self.device)
        return counts.scatter_add_(1, likeliest, counts.new_ones(()).expand_as(likeliest))

    def logarithms(self, rows: slice | Tensor) -> Tensor:
        """Natural logarithms of the same, with all digits where logits or logarithms were sent."""
        if self.kind is SamplesKind.PROBABILITIES:
            return self[rows].log()
        return torch.log_softmax(self.values[rows].double(), dim=-1)


def _exponentials(x: Tensor) -> Tensor:
    """exp(x) in x's place, 0 where it is no more than 1e-304.

    What is below that would soon be a denormal number, for which a processor takes ten times as long; to the library
    that computes the exponential, so does everything that is below e^-708, 0 included.
    """
    return torch.threshold_(x.clamp_min_(LEAST_EXPONENT).exp_(), LEAST_LIKELIHOOD, 0.0)


def _label_distributions(values: Tensor, kind: SamplesKind) -> Tensor:
    """Absent and present (..., L, 2) from what was sent of labels (..., L), float64; both keep their digits."""
    if kind is SamplesKind.LOGITS:
        rare = _exponentials(values.abs().neg_())  # the odds of the less likely half
        halves = torch.stack([torch.where(values > 0, rare, 1.0), torch.where(values > 0, 1.0, rare)], dim=-1)
        return halves.div_(1 + rare[..., None])
    if kind is SamplesKind.LOG_PROBABILITIES:
        values = values.clamp(max=0)
        return torch.stack([-values.expm1(), values.exp()], dim=-1)
    present = values.clamp(0, 1)
    return torch.stack([1 - present, present], dim=-1)


def split_mode(p: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability (...,) of each distribution (..., C), and the distribution with that entry set to 0.

    Scores of uncertainty sum the remainder instead of taking 1 - max: the remainder keeps its digits when the model is
    nearly certain, the difference does not.
    """
    mode, at = p.max(-1, keepdim=True)
    return mode.squeeze(-1), p.scatter(-1, at, 0.0)
