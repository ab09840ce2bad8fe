"""The Fisher kernel against a plain numpy version of its paper and of its authors' order of choice."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from queryselect import Client, InvalidInput
from queryselect_service import strategy as strategies
from queryselect_service.kernels.fisher_kernel import Kernel, PseudoLabel, ReferenceLabel, ReferenceSubset
from queryselect_service.maths.noise import uniform
from queryselect_service.shards import Slices
from queryselect_service.spec import build
from tests.strategy_case import ROWS, StrategyCase

C, M = 4, 24


def standardized(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-10)


def onehot(y: np.ndarray, classes: int = C) -> np.ndarray:
    return np.eye(classes)[y]


def kernel(form: str, theirs: dict, ours: dict) -> np.ndarray:
    """R (m, n) of every reference row and every row of the pool. z, g: lists by scale; x, e: embeddings, residuals."""
    if form == "LAST_LAYER":
        return (theirs["x"] @ ours["x"].T) * (theirs["e"] @ ours["e"].T)
    z = [standardized(a) @ standardized(b).T for a, b in zip(theirs["z"], ours["z"], strict=True)]
    if form == "PCC":
        return sum(z)
    g = [standardized(a) @ standardized(b).T for a, b in zip(theirs["g"], ours["g"], strict=True)]
    return sum(z) + sum(g) if form == "SUM" else sum(a * b for a, b in zip(z, g, strict=True))


def centres(similar: np.ndarray, k: int, first: int) -> list[int]:
    """Greedy k-centres on a similarity (m, m)."""
    chosen = [first]
    while len(chosen) < min(k, len(similar)):
        closest = similar[chosen].max(0)
        closest[chosen] = np.inf
        chosen.append(int(closest.argmin()))
    return chosen


def choose(r: np.ndarray, k: int, candidates: np.ndarray) -> tuple[list[int], list[float]]:
    """All first ranks in descending order of R (c, n), then all second ranks …, each row once."""
    ranking = [sorted(np.flatnonzero(candidates), key=lambda n, row=row: (-row[n], n)) for row in r]
    picks: dict[int, float] = {}
    for rank in range(int(candidates.sum())):
        column = sorted(
            ((r[c, ranking[c][rank]], ranking[c][rank]) for c in range(len(r))), key=lambda x: (-x[0], x[1])
        )
        for value, row in column:
            picks.setdefault(int(row), float(value))
    rows = list(picks)[:k]
    return rows, [picks[row] for row in rows]


class FisherKernelCase(StrategyCase):
    name = "fisher_kernel"
    slice_tolerance = 1e-5

    def sides(self, inputs: dict[str, np.ndarray]) -> tuple[dict, dict]:
        """What `kernel` wants, of the references and of the pool."""
        raise NotImplementedError

    @property
    def wrong(self) -> np.ndarray:
        """The reference rows that count."""
        if "misclassified" in self.reference:
            return np.flatnonzero(self.reference["misclassified"])
        return np.flatnonzero(self.reference["probabilities"].argmax(1) != self.reference["labels"])

    def oracle(self, inputs, k, context, candidates, seed=0):
        theirs, ours = self.sides(inputs)
        wrong = self.wrong
        some = {
            name: [x[wrong] for x in each] if isinstance(each, list) else each[wrong] for name, each in theirs.items()
        }
        if len(wrong) > k:
            first = int(uniform(seed, torch.from_numpy(wrong)).argmax())
            at = centres(kernel(self.params["kernel"], some, some), k, first)
            some = {name: [x[at] for x in each] if isinstance(each, list) else each[at] for name, each in some.items()}
        rows, scores = choose(kernel(self.params["kernel"], some, ours), k, candidates)
        return np.array(rows), np.array(scores), np.zeros(ROWS)


RNG = np.random.default_rng(7)


class TestCorrelationOfDescriptors(FisherKernelCase):
    """Few misclassified rows, told by a mask alone: all of them are centres, and the seed does not matter."""

    params: ClassVar = {"kernel": "PCC"}
    seeded = False
    tolerance = 1e-9
    reference: ClassVar = {
        "embeddings": RNG.normal(size=(M, 6)).astype("f4"),
        "misclassified": np.arange(M) % 6 == 1,
    }

    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, 6))}

    def sides(self, inputs):
        return {"z": [self.reference["embeddings"]]}, {"z": [inputs["embeddings"]]}


class Clustered:
    """More misclassified rows than picks: which of them are centres depends on how many picks there are."""

    @pytest.mark.parametrize("seed", range(3))
    def test_picks_and_scores_are_those_of_brute_force(self, local, seed):
        inputs = self.inputs(seed)
        for context in (np.array([], int), np.array([2, 1, 9])):
            candidates = ~np.isin(np.arange(ROWS), context)
            picks, scores, _ = self.oracle(inputs, 8, context, candidates, seed)
            got = self.select(local, inputs, 8, seed=seed, labeled=context)
            assert got.indices.tolist() == picks.tolist()
            np.testing.assert_allclose(got.scores, scores, rtol=1e-9, atol=1e-9)

    def test_a_shorter_budget_is_a_prefix(self, local):
        """It is not: fewer picks have fewer centres. The centres of the shorter are the first of the longer."""
        short = self.select(local, self.inputs(), 3, labeled=[0])
        assert len(short) == 3


class TestSum(Clustered, FisherKernelCase):
    """Two scales with gradients of the caller's own."""

    params: ClassVar = {"kernel": "SUM"}
    reference: ClassVar = {
        "scales[0].embeddings": RNG.normal(size=(M, 5)).astype("f4"),
        "scales[0].gradients": RNG.normal(size=(M, 5)).astype("f4"),
        "scales[1].embeddings": RNG.normal(size=(M, 3)).astype("f4"),
        "scales[1].gradients": RNG.normal(size=(M, 4)).astype("f4"),
        "misclassified": np.arange(M) % 5 > 0,
    }

    def make(self, rng):
        widths = {name: x.shape[1] for name, x in self.reference.items() if x.ndim > 1}
        return {name: rng.normal(size=(ROWS, width)) for name, width in widths.items()}

    def sides(self, inputs):
        return tuple(
            {
                key: [side[f"scales[{at}].{part}"] for at in range(2)]
                for key, part in (("z", "embeddings"), ("g", "gradients"))
            }
            for side in (self.reference, inputs)
        )


class TestProduct(TestSum):
    params: ClassVar = {"kernel": "PRODUCT"}


class TestLastLayer(FisherKernelCase):
    """Nothing but embeddings and probabilities; labels of the pool by the likest reference row."""

    params: ClassVar = {"kernel": "LAST_LAYER"}
    reference: ClassVar = {
        "embeddings": RNG.normal(size=(5, 6)).astype("f4"),
        "probabilities": np.eye(C)[[0, 1, 2, 3, 0]] * 0.6 + 0.1,
        "labels": np.array([1, 2, 2, 0, 2]),
    }
    seeded = False

    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, 6)), "probabilities": rng.dirichlet(np.ones(C), ROWS)}

    def labels(self, inputs):
        similar = standardized(self.reference["embeddings"]) @ standardized(inputs["embeddings"]).T
        return self.reference["labels"][similar.argmax(0)]

    def sides(self, inputs):
        theirs, ours = self.reference, inputs
        return (
            {"x": theirs["embeddings"].astype(float), "e": theirs["probabilities"] - onehot(theirs["labels"])},
            {"x": ours["embeddings"], "e": ours["probabilities"] - onehot(self.labels(inputs))},
        )


class TestDerivedGradients(Clustered, TestLastLayer):
    """The last of two scales has gradients by head_weights; the other counts by its descriptors alone."""

    params: ClassVar = {"kernel": "SUM"}
    seeded = True
    beside: ClassVar = {"head_weights": RNG.normal(size=(C, 6))}
    reference: ClassVar = {
        "scales[0].embeddings": RNG.normal(size=(M, 4)).astype("f4"),
        "scales[1].embeddings": RNG.normal(size=(M, 6)).astype("f4"),
        "probabilities": RNG.dirichlet(np.ones(C), M),
        "labels": RNG.integers(0, C, M),
    }

    def make(self, rng):
        return {
            "scales[0].embeddings": rng.normal(size=(ROWS, 4)),
            "scales[1].embeddings": rng.normal(size=(ROWS, 6)),
            "probabilities": rng.dirichlet(np.ones(C), ROWS),
        }

    def labels(self, inputs):
        similar = sum(
            standardized(self.reference[f"scales[{at}].embeddings"])
            @ standardized(inputs[f"scales[{at}].embeddings"]).T
            for at in range(2)
        )
        return self.reference["labels"][similar.argmax(0)]

    def sides(self, inputs):
        found = []
        for side, labels in ((self.reference, self.reference["labels"]), (inputs, self.labels(inputs))):
            g = (side["probabilities"] - onehot(labels)) @ self.beside["head_weights"]
            z = [side[f"scales[{at}].embeddings"] for at in range(2)]
            found.append({"z": z, "g": [np.zeros((len(g), 2)), g]})
        return tuple(found)


# Labels


def some(rows: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"embeddings": rng.normal(size=(rows, 6)), "probabilities": rng.dirichlet(np.ones(C), rows)}


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def labels_of(local: Client, pool: dict, reference: dict, how: str, **options: Any) -> np.ndarray:
    params = {"kernel": "PCC", "pseudo_label": how}
    found = local.select(
        "fisher_kernel", 3, **pool, reference=reference, params=params, returns="PSEUDO_LABELS", **options
    )
    return found.pseudo_labels


def test_labels_by_prediction_and_the_callers_own(local, remote, rng):
    pool, reference = some(40, rng), {**some(20, rng), "labels": rng.integers(0, C, 20)}
    own = rng.integers(0, C, 40)
    for client in (local, remote):
        assert labels_of(client, pool, reference, "PREDICTED").tolist() == pool["probabilities"].argmax(1).tolist()
        found = labels_of(client, {**pool, "pseudo_labels": own}, reference, "PROVIDED", excluded=[3, 5])
        assert found.tolist() == np.where(np.isin(np.arange(40), [3, 5]), -1, own).tolist()


@pytest.mark.parametrize("coarse", [False, True])
def test_labels_of_the_nearest_are_exact_however_close(local, rng, coarse):
    """Reference rows a few last digits apart, with different labels, and one twice: the first counts."""
    near = rng.normal(size=(1, 16)) + 1e-7 * rng.normal(size=(30, 16))
    theirs = np.concatenate([near, near[:3]]).astype("f4")
    ours = (near + 1e-3 * rng.normal(size=(30, 16))).astype("f4")
    similar = standardized(theirs) @ standardized(ours).T
    reference = {"embeddings": theirs, "labels": np.arange(33), "misclassified": np.ones(33, bool)}
    params = {"kernel": "PCC", "coarse_products": coarse}
    got = local.select("fisher_kernel", 3, embeddings=ours, reference=reference, params=params, returns="PSEUDO_LABELS")
    best = similar.max(0)
    assert (best - similar[got.pseudo_labels, np.arange(30)] <= 1e-12 * best).all()
    assert got.pseudo_labels.max() < 30


def informative(f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """I (C,) of f (K, L) and g (C, K, L) as the authors compute it."""
    found = []
    for gradients in g:
        parts = (f, gradients, np.concatenate([f, gradients], 1))
        found.append([np.linalg.slogdet(v.T @ v + 1e-8 * np.eye(v.shape[1]))[1] for v in parts])
    return np.array([z + y - joint for z, y, joint in found])


def test_labels_from_samples(local, rng):
    pool, reference = some(20, rng), {**some(20, rng), "labels": rng.integers(0, C, 20)}
    samples, w = rng.dirichlet(np.ones(C), (20, 8)), rng.normal(size=(C, 6))
    x, eye = pool["embeddings"], np.eye(C)
    g = np.stack([(samples - eye[y]) @ w for y in range(C)], 1)  # (N, C, K, D)
    by_trace = np.einsum("nd,nckd->nc", x, g)
    given = {**pool, "samples": samples, "head_weights": w}
    assert labels_of(local, given, reference, "MC_TRACE").tolist() == by_trace.argmax(1).tolist()
    without = {**pool, "samples": samples}
    assert labels_of(local, without, reference, "MC_TRACE").tolist() == np.log(samples).sum(1).argmin(1).tolist()
    mutual = np.stack([informative(np.repeat(row[None], 8, 0), each) for row, each in zip(x, g, strict=True)])
    assert labels_of(local, given, reference, "MC_MUTUAL_INFORMATION").tolist() == mutual.argmax(1).tolist()


@pytest.mark.parametrize("kind", ["LOGITS", "LOG_PROBABILITIES"])
def test_samples_of_every_kind_give_the_same_labels(local, remote, rng, kind):
    pool, reference = some(20, rng), {**some(20, rng), "labels": rng.integers(0, C, 20)}
    samples, w = rng.dirichlet(np.ones(C), (20, 8)), rng.normal(size=(C, 6))
    logs = np.log(samples) + (rng.normal(size=(20, 8, 1)) if kind == "LOGITS" else 0)
    for how in ("MC_TRACE", "MC_MUTUAL_INFORMATION"):
        plain = labels_of(local, {**pool, "samples": samples, "head_weights": w}, reference, how)
        given = {**pool, "samples": logs, "head_weights": w}
        for client in (local, remote):
            assert labels_of(client, given, reference, how, samples_kind=kind).tolist() == plain.tolist()


def labels_of_a_slice(group, inputs, how):
    """What one process guesses of its rows."""
    strategy = strategies.STRATEGIES["fisher_kernel"]
    n = len(inputs["scales[0].embeddings"])
    found = strategies.select(
        strategy,
        inputs,
        k=3,
        pool=Slices(n, group),
        candidates=torch.ones(n, dtype=torch.bool),
        context=torch.empty(0, dtype=torch.int64),
        spec=build(strategy.spec, {"kernel": "PCC", "pseudo_label": how}),
    )
    return found.pseudo_labels()[0].tolist()


@pytest.mark.parametrize("how", ["NEAREST", "PREDICTED", "PROVIDED"])
def test_slices_guess_what_the_whole_pool_guesses(local, slices, rng, how):
    """Each its own rows, in the middle one of three slices none."""
    pool, reference = some(40, rng), {**some(20, rng), "labels": rng.integers(0, C, 20)}
    own = {"pseudo_labels": rng.integers(0, C, 40)} if how == "PROVIDED" else {}
    whole = labels_of(local, {**pool, **own}, reference, how)
    given = {f"validation_{name}": x for name, x in reference.items() if name != "embeddings"}
    given["validation_scales[0].embeddings"] = reference["embeddings"]
    rows = {"scales[0].embeddings": pool["embeddings"], "probabilities": pool["probabilities"], **own}
    parts = [
        ({name: torch.from_numpy(x[start:stop]) for name, x in rows.items()}
         | {name: torch.from_numpy(x) for name, x in given.items()}, how)
        for start, stop in ((0, 15), (15, 15), (15, 40))
    ]  # fmt: skip
    assert np.concatenate(slices.run(labels_of_a_slice, *parts)).tolist() == whole.tolist()


# References that say little


def warned(found: Any) -> dict[str, str]:
    return {each.code: each.message for each in found.warnings}


def test_without_misclassified_rows_the_least_confident_serve(local, rng):
    pool, theirs = some(40, rng), some(20, rng)
    right = theirs["probabilities"].argmax(1)
    params = {"kernel": "PCC"}
    got = local.select("fisher_kernel", 4, **pool, reference={**theirs, "labels": right}, params=params)
    assert warned(got) == {"NO_MISCLASSIFIED": "no reference row is misclassified: the 4 least confident serve"}
    least = np.sort(theirs["probabilities"].max(1).argsort()[:4])
    mask = np.isin(np.arange(20), least)
    told = local.select("fisher_kernel", 4, **pool, reference={**theirs, "misclassified": mask}, params=params)
    assert got.indices.tolist() == told.indices.tolist()
    assert not told.warnings


def test_without_labels_predictions_stand_in_for_them(local, rng):
    pool, theirs = some(40, rng), some(20, rng)
    mask = rng.random(20) < 0.3
    weak = local.select(
        "fisher_kernel", 6, **pool, reference={**theirs, "misclassified": mask}, params={"kernel": "LAST_LAYER"}
    )
    assert set(warned(weak)) == {"FALLBACK"}
    plain = local.select(
        "fisher_kernel", 6, **pool, reference={**theirs, "misclassified": mask},
        params={"kernel": "LAST_LAYER", "pseudo_label": "PREDICTED"},
    )  # fmt: skip
    assert weak.indices.tolist() == plain.indices.tolist()
    assert not plain.warnings
    asked = local.select(
        "fisher_kernel", 6, **pool, reference={**theirs, "misclassified": mask}, params={"kernel": "PCC"},
        returns="PSEUDO_LABELS",
    )  # fmt: skip
    assert warned(asked) == {"FALLBACK": "references have no labels: those of the pool are the likeliest classes"}
    assert asked.pseudo_labels.tolist() == pool["probabilities"].argmax(1).tolist()
    nothing = local.select("fisher_kernel", 6, **pool, reference=theirs, params={"kernel": "PCC"})
    assert set(warned(nothing)) == {"NO_MISCLASSIFIED"}
    bare = {"embeddings": theirs["embeddings"]}
    every = local.select("fisher_kernel", 6, **pool, reference=bare, params={"kernel": "PCC"})
    assert "all 20 serve" in warned(every)["NO_MISCLASSIFIED"]


def test_unknown_labels_are_neither_wrong_nor_anybodys(local, rng):
    pool, theirs = some(40, rng), some(20, rng)
    labels = rng.integers(0, C, 20)
    labels[5:15] = -1
    got = local.select(
        "fisher_kernel", 30, **pool, reference={**theirs, "labels": labels}, params={"kernel": "LAST_LAYER"},
        returns="PSEUDO_LABELS",
    )  # fmt: skip
    assert "10 of 20 reference rows have no label" in warned(got)["FALLBACK"]
    known = labels >= 0
    similar = standardized(theirs["embeddings"][known]) @ standardized(pool["embeddings"]).T
    assert got.pseudo_labels.tolist() == labels[known][similar.argmax(0)].tolist()
    wrong = known & (theirs["probabilities"].argmax(1) != labels)
    told = local.select(
        "fisher_kernel", 30, **pool, reference={**theirs, "labels": labels, "misclassified": wrong},
        params={"kernel": "LAST_LAYER"},
    )  # fmt: skip
    assert told.indices.tolist() == got.indices.tolist()


def test_rows_without_variance_are_like_nothing(local, rng):
    pool, theirs = some(40, rng), some(20, rng)
    pool["embeddings"][[4, 9]] = 0.1
    theirs["embeddings"][2:12] = 7.7
    reference = {**theirs, "misclassified": np.ones(20, bool)}
    got = local.select("fisher_kernel", 12, **pool, reference=reference, params={"kernel": "PCC"})
    assert len(set(got.indices)) == 12
    theirs_too, few, warning = got.warnings
    assert few.code == "COVERED"
    assert theirs_too.message == "10 of 20 reference rows that count are without variance: nothing is like them"
    assert (warning.code, warning.rows.tolist()) == ("INERT_ROWS", [4, 9])
    alive = {name: np.delete(x, range(2, 12), 0) for name, x in reference.items()}
    fewer = local.select("fisher_kernel", 12, **pool, reference=alive, params={"kernel": "PCC"})
    assert fewer.indices.tolist() == got.indices.tolist()
    assert [each.code for each in fewer.warnings] == ["COVERED", "INERT_ROWS"]


def test_references_without_variance_rank_nothing(local, rng):
    """Also where there are no more of them than picks; the first rows are picked where there is nothing else."""
    pool, theirs = some(40, rng), some(20, rng)
    reference = {**theirs, "misclassified": np.arange(20) < 6}
    theirs["embeddings"][1:6] = 3.0
    got = local.select("fisher_kernel", 12, **pool, reference=reference, params={"kernel": "PCC"})
    r = (standardized(theirs["embeddings"][:1]) @ standardized(pool["embeddings"]).T)[0]
    assert got.indices.tolist() == (-r).argsort()[:12].tolist()
    assert "5 of 6" in warned(got)["INERT_ROWS"]
    theirs["embeddings"][0] = -1.0
    nothing = local.select("fisher_kernel", 4, **pool, reference=reference, params={"kernel": "PCC"})
    assert nothing.indices.tolist() == [0, 1, 2, 3]
    assert not nothing.scores.any()
    assert "6 of 6" in warned(nothing)["INERT_ROWS"]


def test_one_reference_row_ranks_the_pool(local, rng):
    pool, theirs = some(40, rng), some(1, rng)
    r = (standardized(theirs["embeddings"]) @ standardized(pool["embeddings"]).T)[0]
    got = local.select(
        "fisher_kernel",
        40,
        **pool,
        reference={**theirs, "labels": [0], "misclassified": [True]},
        params={"kernel": "PCC"},
    )
    assert got.indices.tolist() == (-r).argsort().tolist()
    np.testing.assert_allclose(got.scores, np.sort(r)[::-1], rtol=1e-9)
    assert "that count: 1, fewer than the 40 picks" in warned(got)["COVERED"]


def test_fewer_references_than_picks_take_turns_which_is_said(local, rng):
    """Every one of them is a centre: first all their likest rows, then all their second likest."""
    pool, theirs = some(40, rng), some(20, rng)
    wrong = np.arange(20) < 6
    reference = {**theirs, "misclassified": wrong}
    r = standardized(theirs["embeddings"][wrong]) @ standardized(pool["embeddings"]).T
    for k, said in (
        (5, None),
        (6, None),
        (7, "that count: 6, fewer than the 7 picks"),
        (40, "fewer than the 40 picks"),
    ):
        got = local.select("fisher_kernel", k, **pool, reference=reference, params={"kernel": "PCC"})
        assert (said or "") in warned(got).get("COVERED", "")
        assert bool(got.warnings) is bool(said)
        if k > 5:
            rows, scores = choose(r, k, np.ones(40, bool))
            assert got.indices.tolist() == rows
            np.testing.assert_allclose(got.scores, scores, rtol=1e-9, atol=1e-9)


def test_all_rows_of_several_sets(local, rng):
    pool, theirs = some(40, rng), some(20, rng)
    whole = {"embeddings": theirs["embeddings"]}
    parts = [{"role": "VALIDATION", "embeddings": theirs["embeddings"][rows]} for rows in (slice(7), slice(7, None))]
    params = {"kernel": "PCC", "reference_subset": "ALL", "first_center": 9}
    one = local.select("fisher_kernel", 6, **pool, reference=whole, params=params)
    two = local.select("fisher_kernel", 6, **pool, references=parts, params=params)
    assert one.indices.tolist() == two.indices.tolist()
    assert not one.warnings


@pytest.mark.parametrize("form", ["PCC", "SUM", "PRODUCT", "LAST_LAYER"])
def test_coarse_products_change_no_pick(local, rng, form):
    pool, theirs = ({**some(rows, rng), "gradients": rng.normal(size=(rows, 6))} for rows in (3000, 200))
    pool, theirs = ({name: x.astype("f4") for name, x in each.items()} for each in (pool, theirs))
    reference = {**theirs, "labels": rng.integers(0, C, 200)}
    plain, coarse = (
        local.select("fisher_kernel", 60, **pool, reference=reference, params={"kernel": form, "coarse_products": each})
        for each in (False, True)
    )
    assert plain.indices.tolist() == coarse.indices.tolist()
    np.testing.assert_allclose(plain.scores, coarse.scores, rtol=1e-12)


def test_a_far_mean_costs_no_digits(local, rng):
    """Rows whose entries are all near 1000 in float32."""
    ours, theirs = (1000 + rng.normal(size=(rows, 16)).astype("f4") for rows in (500, 30))
    reference = {"embeddings": theirs, "misclassified": np.ones(30, bool)}
    narrow = local.select("fisher_kernel", 40, embeddings=ours, reference=reference, params={"kernel": "PCC"})
    wide = {**reference, "embeddings": theirs.astype("f8")}
    exact = local.select("fisher_kernel", 40, embeddings=ours.astype("f8"), reference=wide, params={"kernel": "PCC"})
    assert narrow.indices.tolist() == exact.indices.tolist()
    np.testing.assert_allclose(narrow.scores, exact.scores, rtol=1e-12)


# What is refused


REFUSED = {
    "nothing to make gradients of": ({}, {}, {}, "pool.head_weights", "kernel LAST_LAYER needs neither"),
    "gradients on one side": ({"gradients": (40, 6)}, {}, {}, "references", "gradients of the same scales"),
    "scales on one side": ({"scales": [{"embeddings": (40, 3)}]}, {}, {}, "references", "the same scales"),
    "no labels of the caller": (
        {}, {}, {"kernel": "LAST_LAYER", "pseudo_label": "PROVIDED"}, "pool.pseudo_labels", "(N)"),
    "no samples": ({}, {}, {"kernel": "LAST_LAYER", "pseudo_label": "MC_TRACE"}, "pool.samples", "(N K C)"),
    "a head of another width": (
        {"head_weights": (C, 5)}, {}, {"kernel": "SUM"}, "pool.head_weights", "D = 6"),
    "a first centre that does not count": (
        {}, {"misclassified": np.arange(20) > 2}, {"kernel": "PCC", "first_center": 1},
        "strategy.fisher_kernel.first_center", "1 is not"),
    "a label that is no class": (
        {}, {"labels": np.full(20, C)}, {"kernel": "LAST_LAYER"}, "references.labels", "row 0 has 4"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "field"), [({}, "references[0].labels"), ({"labels": [-1] * 20}, "references.labels")]
)
def test_labels_of_nothing_are_refused(local, remote, rng, labels, field):
    """Neither labels of references nor predictions, and somebody asks what labels the pool has."""
    pool, theirs = ({"embeddings": rng.normal(size=(rows, 6))} for rows in (40, 20))
    reference = {**theirs, "misclassified": np.ones(20, bool), **labels}
    for client in (local, remote):
        with pytest.raises(InvalidInput, match="references with labels, or") as caught:
            labels_of(client, pool, reference, "NEAREST")
        assert caught.value.field == field
        client.select("fisher_kernel", 3, **pool, reference=reference, params={"kernel": "PCC"})


@pytest.mark.parametrize(("extra", "more", "params", "field", "words"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_is_refused_and_named(local, remote, rng, extra, more, params, field, words):
    def filled(given: Any) -> Any:
        if isinstance(given, tuple):
            return rng.normal(size=given)
        if isinstance(given, dict):
            return {name: filled(each) for name, each in given.items()}
        return [filled(each) for each in given] if isinstance(given, list) else given

    pool, theirs = {**some(40, rng), **filled(extra)}, {**some(20, rng), "labels": rng.integers(0, C, 20), **more}
    for client in (local, remote):
        with pytest.raises(InvalidInput) as caught:
            client.select("fisher_kernel", 5, **pool, reference=theirs, params=params)
        assert (caught.value.field, words in str(caught.value)) == (field, True), str(caught.value)


@pytest.mark.parametrize("widths", [(6, None), (None, 6), (3, None)])
def test_the_last_layer_is_that_of_both_sides(local, remote, rng, widths):
    """Embeddings of one side are not compared with a scale's of the other, though they may have the same width."""
    sides = [some(rows, rng) | {"scales": [{"embeddings": rng.normal(size=(rows, 3))}]} for rows in (40, 20)]
    sides[1]["labels"] = rng.integers(0, C, 20)
    for side, width in zip(sides, widths, strict=True):
        del side["embeddings"]
        if width is not None:
            side["embeddings"] = rng.normal(size=(len(side["scales"][0]["embeddings"]), width))
    params = {"kernel": "LAST_LAYER"}
    for client in (local, remote):
        with pytest.raises(InvalidInput, match="needs embeddings in both the pool and the references, or in neither"):
            client.select("fisher_kernel", 3, **sides[0], reference=sides[1], params=params)
    for side in sides:
        side.pop("embeddings", None)
    assert len(remote.select("fisher_kernel", 3, **sides[0], reference=sides[1], params=params)) == 3


@given(data=st.data())
def test_whatever_is_given_is_served_or_refused(local, data):
    """No combination of what may be left out is a bug of the server."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    samples, labels = rng.dirichlet(np.ones(C), (12, 3)), rng.integers(-1, C, 5)
    optional = [
        {"gradients": rng.normal(size=(12, 6)), "probabilities": rng.dirichlet(np.ones(C), 12), "samples": samples,
         "head_weights": rng.normal(size=(C, 6)), "pseudo_labels": rng.integers(0, C, 12)},
        {"gradients": rng.normal(size=(5, 6)), "probabilities": rng.dirichlet(np.ones(C), 5), "labels": labels,
         "misclassified": rng.random(5) < 0.4},
    ]  # fmt: skip
    pool, reference = (
        {"embeddings": rng.normal(size=(rows, 6)), **{name: x for name, x in each.items() if draw(False, True)}}
        for rows, each in zip((12, 5), optional, strict=True)
    )
    params = {
        "kernel": draw(*Kernel),
        "pseudo_label": draw(*PseudoLabel),
        "reference_label": draw(None, *ReferenceLabel),
        "reference_subset": draw(*ReferenceSubset),
        "author_compat": draw(False, True),
        "coarse_products": draw(False, True),
    }
    asked = draw((), ("PSEUDO_LABELS",))
    k = draw(1, 3, 12)
    try:
        found = local.select("fisher_kernel", k, **pool, reference=reference, params=params, returns=asked)
    except InvalidInput as error:
        assert "needs" in str(error) or "must" in str(error)
    else:
        assert len(set(found.indices)) == k
        assert np.isfinite(found.scores).all()
        assert not asked or ((found.pseudo_labels >= 0) & (found.pseudo_labels < C)).all()
