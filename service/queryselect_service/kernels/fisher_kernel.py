"""The Fisher kernel: rows that are most like those of a held-out set that the model gets wrong."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.errors import InvalidInput
from queryselect_service.maths.descriptors import (
    Head,
    Scale,
    Term,
    Terms,
    alive,
    batches,
    coarse,
    error_bound,
    joined,
    paired,
    product,
    residuals,
    similarity,
    spans_bytes,
    standardized,
    taken,
    total,
)
from queryselect_service.maths.distances import power_of_two
from queryselect_service.maths.least_like import k_centers
from queryselect_service.maths.noise import uniform
from queryselect_service.maths.predictions import Predictions, Samples
from queryselect_service.maths.pseudo_labels import likest, mutual_information, nearest, trace
from queryselect_service.maths.rank_fill import BestRows, Ranked
from queryselect_service.shards import SPAN_BYTES, Shards, Whole
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Choice, Notice, NoticeCode, ScoreKind, Selection, Sizes, Task, strategy

#: Ranks that are looked for beyond those that would do if no row came twice, and how many times more next time.
MORE_RANKS, GROWTH = 3, 4
#: Entries of float64 rows that pairs are scored again with at a time.
PAIR_ENTRIES = 1 << 19
#: Rows that are compared with a block of references at a time.
COMPARED_ROWS = 1024
#: Pairs of a row and a reference that wait to be scored again in float64.
UNDECIDED_PAIRS = 1 << 15
#: Entries of the tables of centres' best rows.
TABLE_ENTRIES = 1 << 19


class Kernel(enum.StrEnum):
    """What makes two rows similar."""

    PRODUCT = "PRODUCT"
    SUM = "SUM"
    PCC = "PCC"
    LAST_LAYER = "LAST_LAYER"

    @property
    def compares_gradients(self) -> bool:
        """Whether scales have gradients."""
        return self in (Kernel.PRODUCT, Kernel.SUM)


class PseudoLabel(enum.StrEnum):
    """The label behind a pool row's gradient."""

    NEAREST = "NEAREST"
    PREDICTED = "PREDICTED"
    PROVIDED = "PROVIDED"
    MC_TRACE = "MC_TRACE"
    MC_MUTUAL_INFORMATION = "MC_MUTUAL_INFORMATION"


class ReferenceLabel(enum.StrEnum):
    """The label behind a reference row's gradient."""

    TRUE = "TRUE"
    PREDICTED = "PREDICTED"


class ReferenceSubset(enum.StrEnum):
    """The reference rows that count."""

    MISCLASSIFIED = "MISCLASSIFIED"
    ALL = "ALL"


@dataclass(frozen=True)
class FisherKernel(Spec):
    """Its parameters."""

    kernel: Kernel = parameter(
        Kernel.PRODUCT,
        "What makes two rows similar: descriptors times gradients (the paper's eq. 12), plus gradients (the authors' "
        "code), descriptors alone, or embeddings times residuals (eq. 11), which needs neither gradients nor weights",
    )
    pseudo_label: PseudoLabel = parameter(
        PseudoLabel.NEAREST,
        "The label behind a pool row's gradient; the last two carry no information at the last layer",
    )
    reference_label: ReferenceLabel | None = parameter(
        None, "The label behind a reference row's gradient; unset: PREDICTED with pseudo_label PREDICTED, else TRUE"
    )
    reference_subset: ReferenceSubset = parameter(
        ReferenceSubset.MISCLASSIFIED, "Whether only reference rows count that the model gets wrong, or all"
    )
    first_center: int | None = parameter(
        None, "The reference row that k-centres begin with, where they are needed; unset: by the seed", low=0
    )
    author_compat: bool = parameter(
        False, "Whether centres may repeat and one entry of the ranking is passed over, as in the authors' code"
    )
    coarse_products: bool = parameter(
        False, "Whether pairs are looked for by bfloat16 products; those that may be best are scored again"
    )

    @property
    def labels_by_prediction(self) -> bool:
        """Whether reference rows are taken to be what the model says."""
        if self.reference_label is None:
            return self.pseudo_label is PseudoLabel.PREDICTED
        return self.reference_label is ReferenceLabel.PREDICTED

    def check_inputs(self, shapes: Mapping[str, tuple[int, ...]], returns: Collection[str]) -> None:
        """Raises InvalidInput where the parameters need an input that is not there, or of another shape."""
        given = {name.replace("logits", "probabilities") for name in shapes}
        ours, theirs = ({name for name in given if name.startswith("validation_") is side} for side in (False, True))
        theirs = {name.removeprefix("validation_") for name in theirs}
        scales = [name for name in ours if name.startswith("scales") and name.endswith("embeddings")]
        if {*scales} != {name for name in theirs if name.startswith("scales") and name.endswith("embeddings")}:
            raise _missing("the pool and the references to have the same scales; they have not", "references")
        derives = self.kernel is Kernel.LAST_LAYER
        if derives and ("embeddings" in ours) is not ("embeddings" in theirs):  # else the last scale is the last layer
            raise _missing("embeddings in both the pool and the references, or in neither", "references")
        if self.kernel.compares_gradients:
            of_scale = "scales[" if scales else "gradients"
            gradients, others = (
                {name for name in side if name.startswith(of_scale) and name.endswith("gradients")}
                for side in (ours, theirs)
            )
            if gradients != others:
                raise _missing("gradients of the same scales in pool and references; they have others", "references")
            last = f"scales[{len(scales) - 1}].gradients" if scales else "gradients"
            derives = "head_weights" in given and last not in gradients
            if not (gradients or derives):
                raise _missing(
                    f"gradients of a scale, or pool.head_weights of shape (C D) to derive them, with kernel "
                    f"{self.kernel}; the request has neither (kernel LAST_LAYER needs neither)",
                    "pool.head_weights",
                )
        needs = []
        if derives:
            needs += [("probabilities", "(N C)"), ("validation_probabilities", "(M C)")]
        if derives or "PSEUDO_LABELS" in returns:
            needs += LABELS_NEED.get(self.pseudo_label, [])
        for name, shape in needs:
            if name not in given:
                role, _, field = name.rpartition("validation_")
                path = f"references[0].{field}" if role or name.startswith("validation_") else f"pool.{name}"
                words = f"{path} of shape {shape} with kernel {self.kernel} and pseudo_label {self.pseudo_label}"
                raise _missing(f"{words}; the request has none", path)
        nearest_asked = "PSEUDO_LABELS" in returns and self.pseudo_label is PseudoLabel.NEAREST
        if nearest_asked and "probabilities" not in ours and "labels" not in theirs:
            raise _missing(NO_LABELS, "references[0].labels")
        if "head_weights" in given and scales and "embeddings" not in given:
            width, wanted = shapes["head_weights"][1], shapes[max(scales, key=_number)][1]
            if width != wanted:
                raise _missing(
                    f"pool.head_weights of shape (C {wanted}), as wide as the last scale; it has width {width}",
                    "pool.head_weights",
                )


#: What a label needs, by kernel input: its name and shape.
LABELS_NEED = {
    PseudoLabel.PREDICTED: [("probabilities", "(N C)")],
    PseudoLabel.PROVIDED: [("pseudo_labels", "(N)")],
    PseudoLabel.MC_TRACE: [("samples", "(N K C)")],
    PseudoLabel.MC_MUTUAL_INFORMATION: [("samples", "(N K C)"), ("head_weights", "(C D)")],
}


NO_LABELS = "references with labels, or pool.probabilities in their place, to tell labels; the request has neither"


def _missing(words: str, field: str) -> InvalidInput:
    return InvalidInput(f"fisher_kernel needs {words}", field=field)


def _number(name: str) -> int:
    """The scale that an input is of: 12 of scales[12].embeddings."""
    return int(name.partition("[")[2].partition("]")[0])


@dataclass(frozen=True)
class _Side:
    """The rows of the pool, or those of the references, and what their terms are made of.

    last: (n, D) features of the last layer. factor: what they are multiplied with, so that products stay finite.
    """

    kernel: Kernel
    scales: tuple[Scale, ...]
    last: Tensor
    probabilities: Predictions | None
    head: Head | None
    labels: Tensor | None = None  # (n,) behind gradients that are derived
    factor: float = 1.0

    def __len__(self) -> int:
        return len(self.last)

    @property
    def widths(self) -> int:
        """The entries of a row of all factors."""
        return sum(x.shape[1] for each in self.scales for x in (each.embeddings, each.gradients) if x is not None)

    @property
    def _widths(self) -> list[int]:
        """The features of every scale."""
        return [each.embeddings.shape[1] for each in self.scales]

    @property
    def derives(self) -> bool:
        """Whether gradients of the last layer are made here."""
        if self.kernel is Kernel.LAST_LAYER:
            return True
        return self.kernel.compares_gradients and self.head is not None and self.scales[-1].gradients is None

    def embeddings(self, rows: slice | Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The standardised features of every scale, (r, L) each."""
        return [standardized(each.embeddings[rows], dtype) for each in self.scales]

    def terms(self, rows: slice | Tensor, dtype: torch.dtype) -> Terms:
        """The terms of some rows: what the kernel compares."""
        if self.kernel is Kernel.PCC:
            return total(self.embeddings(rows, dtype), self._widths)
        if self.kernel is Kernel.LAST_LAYER:
            factors = self.last[rows].to(dtype) * self.factor, self._residuals(rows).to(dtype)
            lengths = [torch.linalg.vector_norm(factor.double(), dim=1) for factor in factors]
            return [Term(factors, lengths[0] * lengths[1])]
        gradients = {
            at: (standardized(each.gradients[rows], dtype), each.gradients.shape[1])
            for at, each in enumerate(self.scales)
            if each.gradients is not None
        }
        if self.derives and self.head is not None:
            derived = self.head.standardized(self._residuals(rows), dtype)
            gradients[len(self.scales) - 1] = derived, self.head.width
        z = self.embeddings(rows, dtype)
        if self.kernel is Kernel.SUM:
            g, widths = zip(*gradients.values(), strict=True)
            return total([*z, *g], [*self._widths, *widths])
        return [product(z[at], g, widths=(self._widths[at], width)) for at, (g, width) in gradients.items()]

    def whole(self, rows: Tensor, dtype: torch.dtype, pool: Shards) -> Terms:
        """The same of many rows, a span at a time."""
        parts = [self.terms(rows[span], dtype) for span in pool.spans(len(rows), 64 * self.widths)]
        return joined(parts)

    def predicted(self, pool: Shards) -> tuple[Tensor, Tensor]:
        """The likeliest class (n,) of every row, and its probability."""
        assert self.probabilities is not None  # asked only then
        parts = [self.probabilities[span].max(1) for span in pool.spans(len(self), 24 * self.probabilities.shape[1])]
        empty = torch.empty(0, dtype=torch.float64, device=self.last.device)
        return torch.cat([empty.long(), *(at for _, at in parts)]), torch.cat([empty, *(top for top, _ in parts)])

    def _residuals(self, rows: slice | Tensor) -> Tensor:
        assert self.probabilities is not None  # checked with the inputs
        assert self.labels is not None
        return residuals(self.probabilities[rows], self.labels[rows])


def _memory(sizes: Sizes, spec: FisherKernel) -> int:
    """Terms of the reference rows, spans of the pool's rows, pairs of rows, and the best rows of every centre."""
    width = sizes.S or sizes.D + sizes.P
    width += min(sizes.C, sizes.D or width)
    item, centres = max(4, sizes.item), min(sizes.k, sizes.M)
    references = sizes.M * (width * (2 * item + (2 if spec.coarse_products else 0)) + 64) + 16 * centres * width
    spans = min(SPAN_BYTES, sizes.N * spans_bytes(width, max(centres, sizes.M), item))
    tables = min(TABLE_ENTRIES, centres * sizes.N)
    return references + spans + 96 * tables + 40 * sizes.N + 48 * PAIR_ENTRIES


@strategy(
    FisherKernel,
    kind=ScoreKind.KERNEL,
    cost="O(N S (k + M)) time, S the entries of all scales, without NEAREST labels O(N S k); O(M S + N) memory",
    memory=_memory,
    work=lambda sizes: float((sizes.N + sizes.M) * (sizes.S or sizes.D + sizes.P) * (sizes.M + sizes.k)),
    citation="Gudovskiy, Hodgkinson, Yamaguchi and Tsukizawa, Deep active learning for biased datasets via Fisher "
    "kernel self-supervision (CVPR 2020), equations 10 to 12",
    tasks=(Task.MULTICLASS,),
    pool_scores=False,
    pseudo_labels=True,
    seeded=True,
)
def fisher_kernel(  # noqa: PLR0917  # its inputs, all passed by name
    scales: Annotated[tuple[Scale, ...], "N L"],
    validation_scales: Annotated[tuple[Scale, ...], "M L"],
    embeddings: Annotated[Tensor, "N D"] | None = None,
    gradients: Annotated[Tensor, "N P"] | None = None,  # noqa: ARG001  # those of the only scale, where there is one
    probabilities: Annotated[Predictions, "N C"] | None = None,
    samples: Annotated[Samples, "N K C"] | None = None,
    head_weights: Annotated[Tensor, "C D"] | None = None,
    pseudo_labels: Annotated[Tensor, "N"] | None = None,
    validation_embeddings: Annotated[Tensor, "M D"] | None = None,
    validation_gradients: Annotated[Tensor, "M P"] | None = None,  # noqa: ARG001
    validation_probabilities: Annotated[Predictions, "M C"] | None = None,
    validation_labels: Annotated[Tensor, "M"] | None = None,
    validation_misclassified: Annotated[Tensor, "M"] | None = None,
    *,
    choice: Choice,
    spec: FisherKernel = FisherKernel(),
    seed: int = 0,
    pool: Shards,
) -> Selection:
    """Prefers rows that are most like reference rows that the model gets wrong, in features and in gradients.

        R(m, n) = Σ_j (z_m·z_n)(g_m·g_n)    PRODUCT, over scales j;   SUM: z_m·z_n + g_m·g_n;   PCC: z_m·z_n
        R(m, n) = (x_m·x_n)(e_m·e_n)        LAST_LAYER, of embeddings x and residuals e = p - y as they are

    z and g are descriptors and gradients of a scale, each row less its mean and over its standard deviation. Centres
    are the misclassified references or, where there are more than k, k of them that are least like each other. Picks
    are the centres' most similar rows, highest first, then their second most similar rows, and so on, each once.

    scales: features (n, L) and gradients (n, P) of each, or embeddings (n, D) and gradients alone. Gradients of the
    last scale may be derived, from probabilities (n, C), head_weights (C, D) and a label, which `pseudo_label` tells
    how to guess: by the likest reference row, the likeliest class, the caller's own, or from samples (n, K, C).
    validation_*: the same of M held-out rows; labels (M,), -1 where unknown, or only whether they are misclassified.
    Scores are R of the pairs. pseudo_labels: the labels (n,).

    The references are labelled, and the method never trains on them: it is for sets that must stay held out. Training
    on them, where that is allowed, may be worth more than all picks: in the paper's MNIST experiment 98.5 % of the test
    set are then right, and 91 % after ten rounds of picks (benchmarks/reproductions).

    >>> from queryselect_service.shards import Whole
    >>> pool = torch.tensor([[0.0, 1, 2], [2, 1, 0], [0, 3, 1]])
    >>> wrong = (Scale(torch.tensor([[5.0, 3, 1]])),)
    >>> choice = Choice(1, torch.ones(3, dtype=torch.bool), Whole(3))
    >>> spec = FisherKernel(kernel=Kernel.PCC, reference_subset=ReferenceSubset.ALL)
    >>> fisher_kernel((Scale(pool),), wrong, choice=choice, spec=spec, pool=Whole(3)).indices
    tensor([1])
    """
    head = None if head_weights is None else Head(head_weights)
    last = scales[-1].embeddings if embeddings is None else embeddings
    their_last = validation_scales[-1].embeddings if validation_embeddings is None else validation_embeddings
    wide = any(x.dtype is torch.float64 for each in (*scales, *validation_scales) for x in (each.embeddings, last))
    work = torch.float64 if wide else torch.float32
    rows = _Side(spec.kernel, scales, last, probabilities, head)
    references = _Side(spec.kernel, validation_scales, their_last, validation_probabilities, head)
    if spec.kernel is Kernel.LAST_LAYER:
        rows = replace(rows, factor=power_of_two(last, pool, work))
        references = replace(references, factor=power_of_two(their_last, Whole(len(references), pool.check), work))

    known = None if validation_labels is None else validation_labels.long()
    _check_classes(known, validation_probabilities, "references", least=-1)
    subset, notices = _subset(references, known, validation_misclassified, spec, choice.k, pool)
    guess = _Guess(spec, rows, references, known, samples, pseudo_labels, work, pool)
    if rows.derives:
        rows = replace(rows, labels=guess())
        references = replace(references, labels=guess.of_references())
        notices += guess.told()

    wrong = references.whole(subset, work, pool)
    if not spec.author_compat:  # the authors' code takes a row that is like nothing, again and again
        some = alive(wrong).nonzero().squeeze(1)
        if len(some) < len(subset):
            words = f"{len(subset) - len(some)} of {len(subset)} reference rows that count are without variance"
            notices.append(Notice(NoticeCode.INERT_ROWS, f"{words}: nothing is like them"))
        if 0 < len(some) < len(subset):
            subset, wrong = subset[some], taken(wrong, some)
    if len(subset) > choice.k:
        first = _first(subset, spec, seed)
        at = k_centers(wrong, first, choice.k, pool, repeat=spec.author_compat)
        subset, wrong = subset[at], taken(wrong, at)
    if len(subset) < choice.k:
        words = f"reference rows that count: {len(subset)}, fewer than the {choice.k} picks"
        notices.append(
            Notice(NoticeCode.COVERED, f"{words}: each gives its likest row, then its second likest, and so on")
        )
    centres = _Centres(wrong, references.whole(subset, torch.float64, pool), coarse=spec.coarse_products)
    indices, scores, inert = _fill(rows, centres, choice, pool, work, author_compat=spec.author_compat)
    if len(inert):
        words = f"{len(inert)} rows have descriptors without variance, which are like nothing"
        notices.append(Notice(NoticeCode.INERT_ROWS, words, inert))
    most = torch.finfo(torch.float64).max
    scores = (scores / rows.factor / references.factor).clamp(-most, most)
    return Selection(indices, scores, notices=tuple(notices), pseudo_labels=lambda: (guess(), guess.told()))


def _check_classes(labels: Tensor | None, probabilities: Predictions | None, where: str, least: int) -> None:
    """Raises InvalidInput for a label that is no class."""
    if labels is None:
        return
    most = None if probabilities is None else probabilities.shape[1] - 1
    bad = (labels < least) if most is None else (labels < least) | (labels > most)
    if bad.any():
        row, name = int(bad.nonzero()[0]), "labels" if where == "references" else "pseudo_labels"
        words = f"{where}: {name} must be {least} to {'C - 1' if most is None else most}; row {row} has {labels[row]}"
        raise InvalidInput(words, field=f"{where}.{name}")


def _subset(
    references: _Side, labels: Tensor | None, misclassified: Tensor | None, spec: FisherKernel, k: int, pool: Shards
) -> tuple[Tensor, list[Notice]]:
    """The reference rows (m,) that count, and what is to be said of them."""
    every = torch.arange(len(references), device=references.last.device)
    if spec.reference_subset is ReferenceSubset.ALL:
        return every, []
    words = "no reference row is misclassified"
    if misclassified is not None:
        wrong = every[misclassified]
    elif labels is not None and references.probabilities is not None:
        wrong = every[(references.predicted(pool)[0] != labels) & (labels >= 0)]
    else:
        words = "neither labels with probabilities nor misclassified tell which reference rows the model gets wrong"
        wrong = every[:0]
    if len(wrong):
        return wrong, []
    if references.probabilities is None:
        return every, [Notice(NoticeCode.NO_MISCLASSIFIED, f"{words}: all {len(every)} serve")]
    least = references.predicted(pool)[1].argsort(stable=True)[:k].sort().values
    return least, [Notice(NoticeCode.NO_MISCLASSIFIED, f"{words}: the {len(least)} least confident serve")]


def _first(subset: Tensor, spec: FisherKernel, seed: int) -> Tensor:
    """The position () among the reference rows that count of the one that k-centres begin with."""
    if spec.first_center is not None:
        at = (subset == spec.first_center).nonzero()
        if not len(at):
            words = (
                f"first_center must be one of the {len(subset)} reference rows that count; {spec.first_center} is not"
            )
            raise InvalidInput(words, field="first_center")
        return at[0, 0]
    return uniform(seed, subset).argmax()


class _Centres:
    """The reference rows that picks shall be like: as they are multiplied, and in float64."""

    def __init__(self, terms: Terms, exact: Terms, *, coarse: bool) -> None:
        self.coarse, self.exact = coarse, exact
        self.terms = self.coarsened(terms)

    def __len__(self) -> int:
        return len(self.terms[0].lengths)

    def __getitem__(self, some: slice) -> _Centres:
        found = copy(self)
        found.exact, found.terms = taken(self.exact, some), taken(self.terms, some)
        return found

    def coarsened(self, terms: Terms) -> Terms:
        """Terms as they are multiplied."""
        return coarse(terms) if self.coarse else terms


def _fill(
    rows: _Side, centres: _Centres, choice: Choice, pool: Shards, work: torch.dtype, *, author_compat: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The picks (k,), their scores, and the rows here that are like nothing, all as global rows."""
    keep = min(pool.size, -(-choice.k // len(centres)) + MORE_RANKS)
    indices, scores = [], []
    made, inert = 0, None
    while True:
        listed, found = _listed(rows, centres, keep, choice, pool, work, author_compat=author_compat)
        inert = found if inert is None else inert
        here = ((pool.offset <= listed.rows) & (listed.rows < pool.offset + len(rows))).nonzero().squeeze(1)
        order = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=here.device)
        order[listed.rows[here] - pool.offset] = -here.double()
        chosen, places = choice.walk(order, choice.k - made, among=order > -torch.inf)
        indices.append(chosen)
        scores.append(listed.values[(-places).long()])
        made += len(chosen)
        left = pool.sum(choice.free.count_nonzero())
        if made == choice.k or keep == pool.size or not left:
            return torch.cat(indices), torch.cat(scores), inert
        keep = min(pool.size, GROWTH * keep)


def _listed(
    rows: _Side, centres: _Centres, keep: int, choice: Choice, pool: Shards, work: torch.dtype, *, author_compat: bool
) -> tuple[Ranked, Tensor]:
    """The rows among the `keep` best of a centre in the order of the fill, and the rows that are like nothing.

    So many centres at a time that their tables stay small.
    """
    listed, inert = None, None
    for some in batches(len(centres), len(centres) if author_compat else max(1, TABLE_ENTRIES // keep)):
        best, found = _best_rows(rows, centres[some], keep, choice, pool, work)
        each = Ranked.of(best)
        each = (each.without(choice.k) if author_compat else each).distinct()
        listed, inert = (each, found) if listed is None else (listed.joined(each).distinct(), inert)
    assert listed is not None  # there is a centre
    assert inert is not None
    return listed, inert


def _best_rows(
    rows: _Side, centres: _Centres, keep: int, choice: Choice, pool: Shards, work: torch.dtype
) -> tuple[BestRows, Tensor]:
    """Of all slices the `keep` rows most like each centre, and the rows that are like nothing.

    Products tell which rows may be among them; those are compared in float64.
    """
    count, n, device = len(centres), len(rows), rows.last.device
    mine, some = BestRows(count, keep, device), torch.ones(n, dtype=torch.bool, device=device)
    for number, span in enumerate(pool.spans(n, spans_bytes(rows.widths, count, work.itemsize))):
        pool.progress(choice.k + span.start * choice.k // max(1, n), 2 * choice.k)
        terms = rows.terms(span, work)
        some[span] = alive(terms)
        terms = centres.coarsened(terms)
        error = error_bound(centres.terms, terms)  # (c,)
        found = similarity(centres.terms, terms)  # (c, s)
        found.masked_fill_(~choice.allowed[span], -torch.inf)
        bar = mine.bar - error
        if number == 0 and keep <= found.shape[1]:
            bar = found.topk(keep, dim=1).values[:, -1].double() - 2 * error
        bar = bar.clamp_min(torch.finfo(torch.float32).min)
        near = found >= (bar if found.dtype is torch.float64 else bar.float())[:, None]
        centre, row = near.nonzero().unbind(1)  # (p,)

        def theirs(pairs: slice, centre: Tensor = centre) -> Terms:
            return taken(centres.exact, centre[pairs])

        score = _exactly(rows, row + span.start, theirs, pool)
        mine.add(centre, row + span.start + pool.offset, score)
    every = BestRows(count, keep, device)
    for values, numbers in pool.blocks(mine.values.T.contiguous(), mine.rows.T.contiguous()):
        centre, rank = (numbers >= 0).T.nonzero().unbind(1)
        every.add(centre, numbers[rank, centre], values[rank, centre])
    dead = pool.offset + (~some).nonzero().squeeze(1)
    return every, torch.cat([dead[:0], *(block for (block,) in pool.blocks(dead))])


def _exactly(rows: _Side, row: Tensor, others: Callable[[slice], Terms], pool: Shards) -> Tensor:
    """The similarity (p,) of pairs in float64: of a row, and of what `others` gives for a slice of the pairs."""
    parts = [torch.empty(0, dtype=torch.float64, device=row.device)]
    for pairs in pool.spans(len(row), SPAN_BYTES // max(1, PAIR_ENTRIES // rows.widths)):
        distinct, which = torch.unique(row[pairs], return_inverse=True)
        parts.append(paired(taken(rows.terms(distinct, torch.float64), which), others(pairs)))
    return torch.cat(parts)


class _Guess:
    """The labels (n,) of the pool's rows here, made when they are asked for."""

    def __init__(
        self,
        spec: FisherKernel,
        rows: _Side,
        references: _Side,
        known: Tensor | None,
        samples: Samples | None,
        provided: Tensor | None,
        work: torch.dtype,
        pool: Shards,
    ) -> None:
        self._spec, self._rows, self._references, self._known = spec, rows, references, known
        self._samples, self._provided, self._work, self._pool = samples, provided, work, pool
        self._made: Tensor | None = None
        self._notices: list[Notice] = []
        self._labeled = None if known is None else (known >= 0).nonzero().squeeze(1)

    def __call__(self) -> Tensor:
        if self._made is None:
            self._made = self._make()
        return self._made

    def told(self) -> tuple[Notice, ...]:
        """What is to be said of labels and was not told yet."""
        notices = tuple(self._notices)
        self._notices.clear()
        return notices

    def of_references(self) -> Tensor:
        """The labels (M,) of the reference rows."""
        known = self._known
        if self._spec.labels_by_prediction:
            return self._references.predicted(self._pool)[0]
        missing = 0 if known is None else int((known < 0).count_nonzero())
        if known is not None and not missing:
            return known
        words = "references have no labels: their gradients are those of the likeliest classes"
        if known is not None:
            words = f"{missing} of {len(known)} reference rows have no label: theirs is the likeliest class"
        self._notices.append(Notice(NoticeCode.FALLBACK, words))
        predicted, _ = self._references.predicted(self._pool)
        return predicted if known is None else torch.where(known >= 0, known, predicted)

    def _make(self) -> Tensor:
        rows, pool, how = self._rows, self._pool, self._spec.pseudo_label
        if how is PseudoLabel.PROVIDED and self._provided is not None:
            _check_classes(self._provided, rows.probabilities, "pool", least=0)
            return self._provided.long()
        if how is PseudoLabel.NEAREST and self._labeled is not None and len(self._labeled):
            return self._nearest(self._labeled)
        if how in (PseudoLabel.NEAREST, PseudoLabel.PREDICTED):
            if how is PseudoLabel.NEAREST:
                if rows.probabilities is None:
                    raise _missing(NO_LABELS, "references.labels")
                words = "references have no labels: those of the pool are the likeliest classes"
                self._notices.append(Notice(NoticeCode.FALLBACK, words))
            return rows.predicted(pool)[0]
        assert self._samples is not None  # checked with the inputs
        _, count, classes = self._samples.shape
        parts = []
        for span in pool.spans(len(rows), 32 * count * classes + 16 * classes * min(classes, rows.last.shape[1])):
            if how is PseudoLabel.MC_TRACE:
                parts.append(trace(self._samples, span, rows.last, rows.head))
            else:
                assert rows.head is not None  # checked too
                parts.append(mutual_information(self._samples, span, rows.last, rows.head))
        return torch.cat([torch.empty(0, dtype=torch.int64, device=rows.last.device), *parts])

    def _nearest(self, labeled: Tensor) -> Tensor:
        """p(y, z): the label of the reference row of the highest R_z, over all that have one."""
        rows, references = (replace(side, kernel=Kernel.PCC) for side in (self._rows, self._references))
        known, pool, work = self._known, self._pool, self._work
        assert known is not None  # where there are labelled ones

        def compared(terms: Terms) -> list[Terms]:
            return [coarse(terms), terms] if self._spec.coarse_products else [terms]

        theirs = compared(references.whole(labeled, work, pool))
        best = torch.empty(len(rows), dtype=torch.int64, device=labeled.device)
        undecided: list[Tensor] = []  # pairs (2, p)

        def decide() -> None:
            row, reference = torch.cat(undecided, 1)

            def exact(pairs: slice) -> Terms:
                return references.terms(labeled[reference[pairs]], torch.float64)

            at, nearest_of_them = likest(row, reference, _exactly(rows, row, exact, pool))
            best[at] = nearest_of_them
            undecided.clear()

        for span in pool.spans(len(rows), max(SPAN_BYTES // COMPARED_ROWS, 64 * rows.widths)):
            best[span], row, reference = nearest(compared(rows.terms(span, work)), theirs, pool)
            undecided.append(torch.stack([row + span.start, reference]))
            if sum(pairs.shape[1] for pairs in undecided) > UNDECIDED_PAIRS:
                decide()
        if undecided:
            decide()
        return known[labeled[best]]

    def _exactly(self, rows: _Side, references: _Side, row: Tensor, reference: Tensor) -> Tensor:
        """The similarity (p,) of pairs of a row and a reference in float64."""
        found = [torch.empty(0, dtype=torch.float64, device=row.device)]
        for part in self._pool.spans(len(row), SPAN_BYTES // max(1, PAIR_ENTRIES // rows.widths)):
            ours, theirs = rows.terms(row[part], torch.float64), references.terms(reference[part], torch.float64)
            found.append(paired(ours, theirs))
        return torch.cat(found)
