"""The properties of every query strategy. A strategy's test gives `make` and `oracle` and inherits the rest.

class TestMargin(StrategyCase):
    name = "margin"

    def make(self, rng):
        return {"probabilities": rng.dirichlet(np.ones(4), ROWS)}

    def oracle(self, inputs, k, context, candidates):
        ...  # brute force in numpy: picks (k,), scores (k,), pool_scores (N,)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from queryselect import Client, InvalidInput, Picks, Unsupported
from queryselect_service import strategy as strategies
from queryselect_service.maths.predictions import SamplesKind
from queryselect_service.quotas import Quota, QuotaLimit
from queryselect_service.shards import Whole
from queryselect_service.spec import build
from queryselect_service.strategy import Limits
from tests.slices import Processes, Selected, selected

ROWS = 30
Inputs = dict[str, np.ndarray]
#: What may stand in a request's lists, by name.
LISTS = {
    "cold": {},
    "labeled": {"labeled": [0, 3, 4]},
    "pending": {"labeled": [2], "pending": [9, 1]},
    "candidates": {"labeled": [5, 6], "candidates": [5, *range(8, 20)]},
}
#: Where 1, 2 and 3 processes cut the rows: unevenly, so that some slices have no candidate and some no context.
CUTS = [[0, ROWS], [0, 11, ROWS], [0, 4, 21, ROWS]]


def coarsely(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The values of x as both bfloat16 and float16 hold them, in `dtype`."""
    tensor = torch.from_numpy(x)
    if tensor.is_floating_point():
        tensor = tensor.clamp(-500, 500).to(torch.bfloat16).to(torch.float16).to(torch.bfloat16).to(dtype)
    return tensor


def nested(inputs: Inputs) -> dict[str, Any]:
    """Inputs as the client takes them: those of scales, such as scales[0].gradients, as a list of mappings."""
    found: dict[str, Any] = {}
    for name, x in inputs.items():
        place, _, part = name.rpartition(".")
        if place:
            scales = found.setdefault("scales", [])
            at = int(place.removeprefix("scales[").removesuffix("]"))
            scales.extend({} for _ in range(at + 1 - len(scales)))
            scales[at][part] = x
        else:
            found[name] = x
    return found


def assert_promised(whole: Selected, sliced: Selected, tolerance: float) -> None:
    """Where the rows lie changes no pick, except from the first step at which the two best scores are as good as equal.

    Up to there scores agree too. tolerance: the relative difference below which two scores are as good as equal.
    """
    assert len(sliced.indices) == len(whole.indices)
    for ours, theirs, score, their_score in zip(
        whole.indices, sliced.indices, whole.scores, sliced.scores, strict=True
    ):
        apart = abs(score - their_score) / max(abs(score), abs(their_score), np.finfo(float).tiny)
        assert apart < tolerance, f"row {ours} has {score} in the whole pool, row {theirs} has {their_score} in slices"
        if ours != theirs:
            return  # from here on the two may go their own ways
    assert sliced.notices == whole.notices
    assert sliced.stop_reason == whole.stop_reason
    assert sliced.cost_spent == whole.cost_spent


class StrategyCase:
    """Inherit, and give name, make and oracle."""

    name: str
    params: dict[str, Any] = {}
    options: dict[str, Any] = {}  # more keywords of select, such as task
    beside: Inputs = {}  # inputs that are not per row, such as head_weights
    reference: Inputs = {}  # rows beside the pool, of the strategy's only role
    tolerance = 1e-9
    slice_tolerance = 1e-9  # 1e-5 for strategies that do not score their leaders again in float64

    def make(self, rng: np.random.Generator) -> Inputs:
        """Inputs of ROWS rows in float64, without ties."""
        raise NotImplementedError

    def oracle(
        self, inputs: Inputs, k: int, context: np.ndarray, candidates: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Brute force: picks (k,), their scores (k,), every row's score at the first step (N,).

        context: rows that count as labelled. candidates: (N,) bool.
        """
        raise NotImplementedError

    # What the tests below share.

    @property
    def kinds(self) -> dict[str, SamplesKind]:
        """What the samples are, as kernels are told."""
        kind = self.options.get("samples_kind")
        return {"samples": SamplesKind(kind)} if kind else {}

    @property
    def seeded(self) -> bool:
        """Whether the seed changes the picks from these inputs."""
        return self.strategy.seeded

    @property
    def score_kind(self) -> str:
        """What the scores of these inputs are."""
        return self.strategy.score_kind

    @property
    def constant(self) -> dict[str, torch.Tensor]:
        """What does not change with the pool's rows, by the names that kernels have for it."""
        theirs = {f"{self.strategy.roles[0].prefix}{name}": x for name, x in self.reference.items()}
        return {name: torch.from_numpy(x) for name, x in {**self.beside, **theirs}.items()}

    @property
    def strategy(self) -> strategies.Strategy:
        return strategies.STRATEGIES[self.name]

    def inputs(self, seed: int = 0) -> Inputs:
        return self.make(np.random.default_rng(seed))

    def select(self, client: Client, inputs: Inputs, budget: int = 5, **options: Any) -> Picks:
        merged = {"params": self.params, **self.options, **options}
        if not inputs:
            merged.setdefault("num_rows", ROWS)
        if self.reference:
            merged["reference"] = nested(self.reference)
        return client.select(self.name, budget, **nested({**inputs, **self.beside}), **merged)

    def take(self, inputs: Inputs, rows: np.ndarray) -> Inputs:
        return {name: x[rows] for name, x in inputs.items()}

    def exactly(self, inputs: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The inputs as `dtype`, their values first rounded so coarsely that every type holds them."""
        coarse = {}
        for name, x in inputs.items():
            if name == "probabilities":  # rounded probabilities no longer sum to 1: logits may be anything
                coarse["logits"] = coarsely(np.log(x), dtype)
            else:
                coarse[name] = coarsely(x, dtype)
        return coarse

    def whole_and_sliced(
        self,
        slices: Processes,
        cuts: list[int],
        inputs: dict[str, torch.Tensor],
        k: int,
        limits: Limits | None = None,
        **lists: list[int],
    ) -> tuple[Selected, Selected]:
        """The picks from one tensor and from slices of it, [cuts[i], cuts[i + 1]) each."""
        context = torch.tensor(sorted({*lists.get("labeled", ()), *lists.get("pending", ())}), dtype=torch.int64)
        candidates = torch.zeros(ROWS, dtype=torch.bool)
        candidates[lists.get("candidates", np.setdiff1d(np.arange(ROWS), context))] = True
        options = {
            "k": k,
            "context": context,
            "candidates": candidates,
            "spec": build(self.strategy.spec, self.params),
            "task": strategies.Task(self.options.get("task", "MULTICLASS")),
            "kinds": self.kinds,
            "seed": 3,
            "limits": limits,
        }
        with torch.inference_mode():
            inputs = {**inputs, **self.constant}
            whole = selected(strategies.select(self.strategy, inputs, pool=Whole(ROWS), **options))
        return whole, slices.select(self.name, inputs, cuts, **options)

    # The properties.

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
    def test_picks_and_scores_are_those_of_brute_force(self, local, seed, lists):
        inputs = self.inputs(seed)
        context = np.array(sorted({*lists.get("labeled", ()), *lists.get("pending", ())}), dtype=int)
        candidates = np.isin(np.arange(ROWS), lists.get("candidates", np.setdiff1d(np.arange(ROWS), context)))
        picks, scores, pool_scores = self.oracle(inputs, 8, context, candidates)
        got = self.select(local, inputs, 8, seed=seed, return_pool_scores=self.strategy.pool_scores, **lists)
        assert got.indices.tolist() == list(picks)
        np.testing.assert_allclose(got.scores, scores, rtol=self.tolerance, atol=self.tolerance)
        if self.strategy.pool_scores:
            np.testing.assert_allclose(
                got.pool_scores, np.where(candidates, pool_scores, -np.inf), rtol=self.tolerance, atol=self.tolerance
            )

    def test_higher_is_more_worth_choosing(self, local):
        if not self.strategy.pool_scores:
            return
        for lists in ({}, {"labeled": [1, 2]}):
            got = self.select(local, self.inputs(), return_pool_scores=True, **lists)
            assert got.indices[0] == got.pool_scores.argmax()
            if self.strategy.pointwise:
                assert (np.diff(got.scores) <= 0).all()
                assert (got.pool_scores[got.indices] == got.scores).all()

    def test_same_seed_same_picks(self, local):
        one, two = (self.select(local, self.inputs(), seed=7) for _ in range(2))
        assert one.indices.tolist() == two.indices.tolist()
        assert one.scores.tolist() == two.scores.tolist()

    def test_the_seed_matters_where_the_strategy_says_so(self, local):
        picks = {tuple(self.select(local, self.inputs(), seed=seed).indices) for seed in (0, 1, 2**64 - 1)}
        assert (len(picks) > 1) == self.seeded

    def test_rows_may_come_in_any_order(self, local):
        if self.seeded:
            return  # noise belongs to the row's number
        inputs = self.inputs()
        order = np.random.default_rng(1).permutation(ROWS)
        plain = self.select(local, inputs, labeled=[0, 1])
        moved = self.select(local, self.take(inputs, order), labeled=np.flatnonzero(order < 2))
        assert order[moved.indices].tolist() == plain.indices.tolist()

    def test_inputs_are_left_as_they_were(self, local):
        inputs = self.inputs()
        before = {name: x.copy() for name, x in inputs.items()}
        self.select(local, inputs, labeled=[3], excluded=[4])
        assert all(np.array_equal(inputs[name], before[name]) for name in inputs)
        for x in inputs.values():
            x.setflags(write=False)
        self.select(local, inputs, labeled=[3])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_types_that_hold_the_same_values_give_the_same_picks(self, local, dtype):
        wide = self.select(local, self.exactly(self.inputs(), torch.float64), 10, labeled=[0])
        narrow = self.select(local, self.exactly(self.inputs(), dtype), 10, labeled=[0])
        assert narrow.indices.tolist() == wide.indices.tolist()
        np.testing.assert_allclose(narrow.scores, wide.scores, rtol=1e-9)

    def test_duplicates_are_rows_like_any_other(self, local):
        inputs = self.take(self.inputs(), np.repeat(np.arange(ROWS), 3))
        options = {} if inputs else {"num_rows": 3 * ROWS}
        got = self.select(local, inputs, 3 * ROWS - 2, labeled=[0, 50], **options)
        assert len(set(got.indices)) == 3 * ROWS - 2
        assert not np.isnan(got.scores).any()

    def test_exact_ties_go_to_the_lowest_row(self, local):
        if self.seeded:
            return
        inputs = self.take(self.inputs(), np.zeros(ROWS, dtype=int))
        got = self.select(local, inputs, 6, labeled=[2], excluded=[0])
        assert got.indices.tolist() == [1, 3, 4, 5, 6, 7]
        assert self.select(local, inputs, 3).indices.tolist() == [0, 1, 2]

    def test_every_candidate_can_be_asked_for(self, local):
        got = self.select(local, self.inputs(), ROWS - 3, labeled=[1], pending=[2], excluded=[3])
        assert sorted(got.indices) == [0, *range(4, ROWS)]

    def test_excluded_rows_are_as_if_deleted(self, local):
        inputs, gone = self.inputs(), np.array([0, 7, 8, 29])
        kept = np.setdiff1d(np.arange(ROWS), gone)
        dirty = {
            name: np.where(np.isin(np.arange(ROWS), gone).reshape(-1, *[1] * (x.ndim - 1)), np.nan, x)
            if x.dtype.kind == "f"
            else x
            for name, x in inputs.items()
        }
        flags = {"return_pool_scores": self.strategy.pool_scores}
        excluded = self.select(local, dirty, labeled=[9, 2], pending=[11], excluded=gone, seed=3, **flags)
        rest = self.take(inputs, kept)
        options = {} if rest else {"num_rows": len(kept)}
        deleted = self.select(
            local, rest, labeled=np.flatnonzero(np.isin(kept, [2, 9])), pending=np.flatnonzero(kept == 11),
            seed=3, **flags, **options,
        )  # fmt: skip
        assert excluded.indices.tolist() == kept[deleted.indices].tolist()
        assert excluded.scores.tolist() == deleted.scores.tolist()
        if excluded.pool_scores is not None:
            assert excluded.pool_scores[kept].tolist() == deleted.pool_scores.tolist()
            assert (excluded.pool_scores[gone] == -np.inf).all()

    def test_masks_and_row_numbers_mean_the_same(self, local):
        rows = {"labeled": [4, 1], "pending": [9], "excluded": [0, 20], "candidates": [1, 5, 6, 7, 8, 28, 29]}
        masks = {name: np.isin(np.arange(ROWS), each) for name, each in rows.items()}
        one, two = (self.select(local, self.inputs(), 4, **each) for each in (rows, masks))
        assert one.indices.tolist() == two.indices.tolist()
        assert set(one.indices) <= set(rows["candidates"])

    def test_served_local_and_direct_are_the_same(self, local, remote):
        inputs = self.inputs()
        flags = {"seed": 5, "labeled": [1, 2], "return_pool_scores": self.strategy.pool_scores}
        here = self.select(local, inputs, **flags)
        served = self.select(remote, inputs, **flags)
        candidates = torch.ones(ROWS, dtype=torch.bool)
        candidates[[1, 2]] = False
        direct = strategies.select(
            self.strategy,
            {**{name: torch.from_numpy(x) for name, x in inputs.items()}, **self.constant},
            k=5,
            pool=Whole(ROWS),
            candidates=candidates,
            context=torch.tensor([1, 2]),
            spec=build(self.strategy.spec, self.params),
            task=strategies.Task(self.options.get("task", "MULTICLASS")),
            kinds=self.kinds,
            seed=5,
        )
        assert here.indices.tolist() == served.indices.tolist() == direct.indices.tolist()
        assert here.scores.tolist() == served.scores.tolist() == direct.scores.tolist()
        assert here.strategy == served.strategy
        if self.strategy.pool_scores:
            assert here.pool_scores.tolist() == served.pool_scores.tolist()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("cuts", CUTS, ids=str)
    def test_slices_pick_what_the_whole_pool_picks(self, slices, cuts, dtype):
        inputs = {name: torch.from_numpy(x) for name, x in self.inputs().items()}
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        for lists in ("cold", "pending", "candidates"):
            whole, sliced = self.whole_and_sliced(slices, cuts, inputs, 6, **LISTS[lists])
            assert_promised(whole, sliced, self.slice_tolerance)
            if whole.pool_scores is not None:
                np.testing.assert_allclose(sliced.pool_scores, whole.pool_scores, rtol=self.slice_tolerance, atol=1e-12)

    @pytest.mark.parametrize("cuts", [*CUTS[1:], [0, 0, 22, ROWS]], ids=str)
    def test_exact_ties_go_to_the_lowest_row_of_all_slices(self, slices, cuts):
        for different, lists in ((1, {}), (1, {"labeled": [2]}), (5, {"labeled": [2]})):
            rows = self.take(self.inputs(), np.arange(ROWS) % different)
            inputs = {name: torch.from_numpy(x) for name, x in rows.items()}
            whole, sliced = self.whole_and_sliced(slices, cuts, inputs, 25, **lists)
            assert sliced.indices == whole.indices
            if different == 1 and not self.seeded:
                assert sliced.indices == np.setdiff1d(np.arange(ROWS), lists.get("labeled", []))[:25].tolist()

    # Items of several rows.

    def test_items_of_one_row_each_are_the_rows_where_items_are_served(self, local, remote):
        inputs, lists = self.inputs(), {"labeled": [1, 2], "excluded": [5]}
        if not self.strategy.serves_items:
            for client in (local, remote):
                with pytest.raises(Unsupported, match=f"{self.name} does not serve pool.item_rows"):
                    self.select(client, inputs, item_rows=np.arange(ROWS))
            return
        plain = self.select(local, inputs, 9, seed=2, **lists, return_pool_scores=True)
        order = np.random.default_rng(4).permutation(ROWS)
        moved, options = self.take(inputs, order), {} if inputs else {"num_rows": ROWS}
        for how in ("MEAN", "MAX", "SUM", "TOP_K_MEAN"):
            items = {"item_aggregation": how, "item_top_k": 2, "seed": 2, "return_pool_scores": True, **options}
            here = self.select(local, inputs, 9, item_rows=np.arange(ROWS), **items, **lists)
            there = self.select(remote, moved, 9, item_rows=order, **items, **lists)  # the rows' order is no matter
            for got in (here, there):
                assert got.indices.tolist() == plain.indices.tolist()
                np.testing.assert_allclose(got.pool_scores, plain.pool_scores, rtol=self.tolerance, atol=self.tolerance)
            assert here.scores.tolist() == plain.scores.tolist()

    # Quotas, costs and a least gain.

    def test_a_quota_is_kept_and_ends_the_selection(self, local):
        for seed in range(3):
            groups = np.random.default_rng(seed).permutation(ROWS) % 7
            got = self.select(local, self.inputs(seed), 16, groups=groups, max_per_group=2, labeled=[3], seed=seed)
            assert np.unique(groups[got.indices], return_counts=True)[1].tolist() == [2] * 7
            assert got.stop_reason == "QUOTAS"
            (warning,) = (each for each in got.warnings if each.code == "CONSTRAINED")
            assert warning.message.startswith("14 of 16 picks: quota 'groups' is full for 15 of the 15 candidates left")

    def test_a_cost_budget_is_kept_and_ends_the_selection(self, local):
        for seed in range(3):
            costs = np.random.default_rng(seed).integers(4, 9, ROWS) / 4
            got = self.select(local, self.inputs(seed), 20, costs=costs, cost_budget=8, labeled=[3], seed=seed)
            left = np.delete(costs, [3, *got.indices]).min()
            assert got.cost_spent == costs[got.indices].sum() <= 8
            assert got.stop_reason == "MAX_COST"
            (warning,) = (each for each in got.warnings if each.code == "CONSTRAINED")
            words = f"{got.cost_spent:g} of the cost budget of 8 spent; the cheapest row left costs {left:g}"
            assert warning.message == f"{len(got)} of 20 picks: {words}"

    def test_minima_are_met(self, local):
        for seed in range(3):
            classes = np.random.default_rng(seed).integers(0, 5, ROWS)
            quota = {"name": "class", "values": classes, "limits": {1: (3, None), 4: (2, 2)}}
            got = self.select(local, self.inputs(seed), 6, quotas=[quota], seed=seed)
            assert len(got) == 6
            assert (classes[got.indices] == 1).sum() >= 3
            assert (classes[got.indices] == 4).sum() == 2
            assert (got.stop_reason, len(got)) == ("MAX_ITEMS", 6)
            assert "CONSTRAINED" not in {each.code for each in got.warnings}

    def test_limits_that_do_not_bind_change_nothing(self, local):
        plain = self.select(local, self.inputs(), 9, labeled=[0])
        limits = {"groups": np.arange(ROWS) // 3, "max_per_group": 3, "costs": np.ones(ROWS), "cost_budget": 100}
        bound = self.select(local, self.inputs(), 9, labeled=[0], **limits)
        assert bound.indices.tolist() == plain.indices.tolist()
        np.testing.assert_allclose(bound.scores, plain.scores, rtol=1e-9)
        assert (bound.stop_reason, bound.cost_spent, plain.cost_spent) == ("MAX_ITEMS", 9.0, None)
        assert [each.code for each in bound.warnings] == [each.code for each in plain.warnings]

    def test_rows_that_no_limit_allows_are_as_good_as_no_candidates(self, local):
        never = np.arange(ROWS) % 4 == 1
        rows = {"labeled": [0, 5], "candidates": np.flatnonzero(~never & (np.arange(ROWS) % 5 > 0)), "seed": 1}
        plain = self.select(local, self.inputs(), 5, return_pool_scores=self.strategy.pool_scores, **rows)
        listed = {**rows, "candidates": np.flatnonzero(np.arange(ROWS) % 5 > 0)}
        for limits in (
            {"costs": np.where(never, 7.0, 0.0), "cost_budget": 6},
            {"quotas": [{"values": never.astype(int), "limits": {1: 0}}]},
            {"quotas": [{"values": never.astype(int), "default_max": 0, "limits": {0: ROWS}}]},
        ):
            got = self.select(local, self.inputs(), 5, return_pool_scores=self.strategy.pool_scores, **listed, **limits)
            assert got.indices.tolist() == plain.indices.tolist()
            np.testing.assert_allclose(got.scores, plain.scores, rtol=1e-9)
            if plain.pool_scores is not None:
                assert got.pool_scores.tolist() == plain.pool_scores.tolist()

    def test_limits_of_excluded_rows_do_not_matter(self, local):
        gone = np.array([0, 7, 8, 29])
        kept = np.setdiff1d(np.arange(ROWS), gone)
        groups, costs = np.arange(ROWS) // 2, np.arange(ROWS) % 3 + 0.5
        costs[gone] = np.nan
        rest = self.take(self.inputs(), kept)
        some = {"labeled": [2, 9], "cost_budget": 6, "seed": 3}
        excluded = self.select(local, self.inputs(), 9, **some, excluded=gone, groups=groups, costs=costs)
        some["labeled"] = np.flatnonzero(np.isin(kept, [2, 9]))
        options = {} if rest else {"num_rows": len(kept)}
        deleted = self.select(local, rest, 9, **some, groups=groups[kept], costs=costs[kept], **options)
        assert excluded.indices.tolist() == kept[deleted.indices].tolist()
        assert excluded.cost_spent == deleted.cost_spent <= 6
        assert np.unique(groups[excluded.indices], return_counts=True)[1].max() == 1

    def test_a_least_gain_ends_the_selection(self, local):
        if self.strategy.score_kind != "GAIN":
            with pytest.raises(InvalidInput) as caught:
                self.select(local, self.inputs(), min_gain=0.0)
            assert caught.value.field == "stop.min_gain"
            return
        plain = self.select(local, self.inputs(), ROWS - 1, labeled=[0])
        least = float(np.median(plain.scores))
        got = self.select(local, self.inputs(), ROWS - 1, labeled=[0], min_gain=least)
        assert 0 < len(got) < ROWS - 1
        assert got.stop_reason == "MIN_GAIN"
        (warning,) = (each for each in got.warnings if each.code == "CONSTRAINED")
        assert f"below min_gain {least:g}" in warning.message

    @pytest.mark.parametrize("cuts", CUTS, ids=str)
    def test_slices_keep_the_limits_that_the_whole_pool_keeps(self, slices, cuts):
        inputs = {name: torch.from_numpy(x) for name, x in self.inputs().items()}
        rng = np.random.default_rng(0)
        values = torch.from_numpy(rng.integers(-1, 6, ROWS))
        costs = torch.from_numpy(rng.integers(1, 9, ROWS) / 8)
        for limits in (
            Limits((Quota("one", 1),), (values,), costs),
            Limits((Quota("few", 2, (QuotaLimit(5, 2), QuotaLimit(0, max=0))),), (values,), costs, 4.0),
        ):
            whole, sliced = self.whole_and_sliced(slices, cuts, inputs, 9, limits, labeled=[4, 20])
            assert_promised(whole, sliced, self.slice_tolerance)
            assert whole.cost_spent == costs[whole.indices].sum()

    def test_a_shorter_budget_is_a_prefix(self, local):
        long, short = (self.select(local, self.inputs(), k, labeled=[0]) for k in (9, 4))
        assert long.indices[:4].tolist() == short.indices.tolist()

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_bad_value_is_named_by_its_row(self, local, remote, bad):
        for name, x in self.inputs().items():
            if x.dtype.kind != "f":
                continue
            broken = x.copy()
            broken.reshape(ROWS, -1)[[17, 23], -1] = bad
            for client in (local, remote):
                with pytest.raises(InvalidInput, match=r"row 17\b") as caught:
                    self.select(client, {**self.inputs(), name: broken})
                assert caught.value.field == f"pool.{name}"

    def test_scores_are_never_nan_on_extreme_inputs(self, local):
        for factor in (0.0, 1e-30, 1e30, 1e300):
            inputs = {
                name: np.eye(x.shape[1])[x.argmax(1)] if name == "probabilities" else np.clip(x * factor, -1e308, 1e308)
                for name, x in self.inputs().items()
                if x.dtype.kind == "f" and name != "weights"  # which may not all be 0
            }
            inputs = {**self.inputs(), **inputs}  # numbers of clusters stay as they are
            got = self.select(local, inputs, return_pool_scores=self.strategy.pool_scores, labeled=[0])
            assert not np.isnan(got.scores).any()
            assert np.isfinite(got.scores).all()
            assert got.pool_scores is None or not np.isnan(got.pool_scores).any()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_picks_are_distinct_candidates_whatever_the_lists(self, local, data):
        fate = np.array(data.draw(st.lists(st.integers(0, 5), min_size=ROWS, max_size=ROWS)))
        lists = {name: np.flatnonzero(fate == at) for at, name in enumerate(("labeled", "pending", "excluded"))}
        free = np.flatnonzero(fate > 2)
        if not len(free):
            return
        k = data.draw(st.integers(1, len(free)))
        got = self.select(local, self.inputs(data.draw(st.integers(0, 9))), k, **lists)
        assert len(got) == k == len(set(got.indices))
        assert set(got.indices) <= set(free)
        assert got.score_kind == self.score_kind
        assert got.stop_reason == "MAX_ITEMS"
