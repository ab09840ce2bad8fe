"""The verbs of `Whole`, and those of `Slices` in several processes: they give what `Whole` gives."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from queryselect_service import shards
from queryselect_service.errors import DeadlineExceeded, ServiceError
from queryselect_service.shards import Slices, Whole
from tests.slices import Failed, Selected
from tests.strategy_case import assert_promised

N = 30
CUTS = [[0, 30], [0, 11, 30], [0, 4, 21, 30], [0, 0, 13, 30], [0, 30, 30, 30]]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool]
SMALL = 400
LATE = "the caller's deadline has passed"


# What the processes do.


def results(pool, verb, cases):
    """What the verb returns for the arguments of each case."""
    found = [getattr(pool, verb)(*arguments) for arguments in cases]
    return [list(each) if verb in {"blocks", "spans"} else each for each in found]


def call(group, rows, verb, *cases):
    pool = Slices(rows, group)
    return results(pool, verb, cases), pool.offset, pool.size


def small_blocks(group, *arguments):
    before, shards.SPAN_BYTES = shards.SPAN_BYTES, SMALL
    try:
        return call(group, *arguments)
    finally:
        shards.SPAN_BYTES = before


def add(group, x):
    before = x.clone()
    total = Slices(len(x), group).sum(x)
    return total, torch.equal(x, before), total.data_ptr() != x.data_ptr()


MEETINGS = {
    "sum": lambda pool, x: pool.sum(x.sum()),
    "best": lambda pool, x: pool.best(x, x),
    "top": lambda pool, x: pool.top(x, 2, x > 1),
    "blocks": lambda pool, x: list(pool.blocks(x)),
}


def stop(group, verb, late, where):
    """What a slice meets when those in `late` want to stop: before the meeting what it heard, there, and afterwards."""
    rank, started = group.rank(), []

    def fail(*_):
        if started and rank in late:
            raise DeadlineExceeded(f"{LATE} at {rank}")

    pool = Slices(rank, group, **{where: fail})
    started.append(True)
    pool.check()
    pool.progress(1, 2)
    heard = len(list(pool.spans(3, shards.SPAN_BYTES)))
    x = torch.arange(rank, dtype=torch.float64)
    try:
        MEETINGS[verb](pool, x)
    except ServiceError as error:
        outcome = type(error).__name__, str(error)
    else:
        outcome = None
    return heard, outcome, float(Slices(rank, group).sum(torch.tensor(1.0)))


def stop_at_the_start(group):
    def fail():
        if group.rank() == 1:
            raise DeadlineExceeded(LATE)

    try:
        Slices(1, group, fail)
    except ServiceError as error:
        return type(error).__name__
    return None


def stop_between_blocks(group):
    """Rank 1 wants to stop when it has seen two blocks: all leave before the fourth."""
    rank, seen = group.rank(), []

    def fail():
        if rank == 1 and len(seen) >= 2:
            raise DeadlineExceeded(LATE)

    pool = Slices(4, group, fail)
    shards.SPAN_BYTES, before = 8, shards.SPAN_BYTES
    try:
        for (block,) in pool.blocks(torch.arange(4)):
            seen += block.tolist()
    except ServiceError as error:
        return seen, type(error).__name__
    finally:
        shards.SPAN_BYTES = before
    return seen, None


def default_group(_):
    pool = Slices(2)
    return pool.size, pool.offset


def progress_everywhere(group):
    told = []
    pool = Slices(1, group, report=lambda done, total: told.append((done, total)))
    pool.progress(group.rank(), 9)
    return told


def complain_at_rank_1(group):
    if group.rank() == 1:
        raise ValueError("rank 1 does not like this")
    return group.rank()


# What the tests share.


def cut(x, cuts):
    return [x[start:stop] for start, stop in pairwise(cuts)]


def both(slices, cuts, verb, cases, cut_up=call):
    """What `Whole` returns for each case and what every slice does. Arguments that are tensors are cut."""
    parts = []
    for rank, (start, stop) in enumerate(pairwise(cuts)):
        mine = [[cut(x, cuts)[rank] if isinstance(x, torch.Tensor) else x for x in arguments] for arguments in cases]
        parts.append((stop - start, verb, *mine))
    found = []
    for start, (each, offset, size) in zip(cuts, slices.run(cut_up, *parts), strict=False):
        assert (offset, size) == (start, N)
        found.append(each)
    return results(Whole(N), verb, cases), found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


def values(rng, dtype, *shape):
    """Numbers that every type holds, with many ties."""
    return torch.from_numpy(rng.integers(0, 2 if dtype == torch.bool else 7, shape)).to(dtype)


# Whole.


def test_the_best_is_the_first_of_equal_ones():
    x = torch.arange(8.0).view(4, 2)
    index, score, row = Whole(4).best(torch.tensor([1.0, 3.0, 3.0, 2.0]), x)
    assert (index.shape, score.shape, row.shape) == ((), (), (2,))
    assert (int(index), float(score), row.tolist()) == (1, 3.0, [2.0, 3.0])
    assert int(Whole(3).best(torch.full((3,), -torch.inf))[0]) == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block", [None, 7])
def test_the_top_are_those_of_a_stable_sort(dtype, block, monkeypatch):
    """However many rows are looked at between two looks whether the caller is still there."""
    if block is not None:
        monkeypatch.setattr(shards, "TOP_ROWS", block)
        monkeypatch.setattr(shards, "TOLD_ROWS", block)
    rng = np.random.default_rng(0)
    for k in (1, 2, 7, 29, 30, 50):
        for share in (0.0, 0.1, 0.5, 1.0):
            scores, candidates = values(rng, dtype, N), torch.from_numpy(rng.random(N) < share)
            pairs = torch.arange(2 * N).view(N, 2)
            rows, best, theirs = Whole(N).top(scores, k, candidates, pairs)
            order = sorted(np.flatnonzero(candidates), key=lambda row: (-float(scores[row]), row))[:k]
            assert rows.tolist() == order
            assert torch.equal(best, scores[rows])
            assert torch.equal(theirs, pairs[order])


def test_spans_cover_the_rows_and_depend_on_the_arguments_alone():
    for rows, row_bytes, number in ((0, 8, 0), (5, 0, 1), (5, 1, 1), (5, shards.SPAN_BYTES * 3, 5), (10, 10 << 20, 2)):
        found = list(Whole(7).spans(rows, row_bytes))
        assert [row for span in found for row in range(span.start, span.stop)] == list(range(rows))
        assert len(found) == number


def test_every_verb_of_a_whole_checks():
    def fail():
        raise DeadlineExceeded(LATE)

    whole, x = Whole(4, fail), torch.arange(4.0)
    for verb in (*MEETINGS.values(), lambda pool, _: pool.progress(0, 1), lambda pool, _: list(pool.spans(1, 1))):
        with pytest.raises(DeadlineExceeded, match=LATE):
            verb(whole, x)


# Slices.


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_the_best_of_all_slices(slices, cuts):
    """Ties go to the lowest row of all, and a row of any type comes along as it is."""
    rng = np.random.default_rng(0)
    shapes = ((N,), (N, 3), (N, 2, 2))
    cases = [[values(rng, dtype, N)] for dtype in (*FLOATS, torch.int64)]
    cases.append([cases[0][0], *(values(rng, dtype, *shape) for dtype in TYPES for shape in shapes)])
    cases += [[torch.full((N,), -torch.inf)], [torch.zeros(N), torch.arange(5 * N).view(5, N).T]]
    expected, found = both(slices, cuts, "best", cases)
    for each in found:
        for one, two in zip(each, expected, strict=True):
            assert_same(one, two)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_the_top_of_all_slices(slices, cuts):
    """Some slices have fewer candidates than k, or none."""
    rng = np.random.default_rng(0)
    cases = [
        [values(rng, dtype, N), k, torch.from_numpy(rng.random(N) < share)]
        for dtype in (*FLOATS, torch.int64)
        for k, share in ((1, 1.0), (5, 0.1), (5, 0.5), (29, 1.0), (50, 0.5), (3, 0.0))
    ]
    shapes = ((N,), (N, 3))
    cases.append([*cases[2], *(values(rng, dtype, *shape) for dtype in TYPES for shape in shapes)])
    expected, found = both(slices, cuts, "top", cases)
    for each in found:
        for one, two in zip(each, expected, strict=True):
            assert_same(one, two)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_blocks_of_all_slices_come_in_order(slices, cuts):
    """Several blocks to a slice, tensors of several types at once; the blocks themselves are any size that fits."""
    rng = np.random.default_rng(0)
    cases = [[values(rng, dtype, N, 3) for dtype in TYPES], [torch.arange(5 * N).view(5, N).T, torch.arange(N)]]
    expected, found = both(slices, cuts, "blocks", cases, small_blocks)
    for each in found:
        for one, two in zip(each, expected, strict=True):
            assert_same([torch.cat(x) for x in zip(*one, strict=True)], [torch.cat(x) for x in zip(*two, strict=True)])
            assert all(sum(x.numel() * x.element_size() for x in block) <= SMALL for block in one)


def test_blocks_may_be_of_any_number_of_rows(slices):
    """Fewer or more than the slice holds, and none at all."""
    x = torch.arange(14.0).view(7, 2)
    for cuts in ([0, 7], [0, 0, 7], [0, 5, 5, 7], [0, 0, 0, 0]):
        found = slices.run(call, *((4, "blocks", [part]) for part in cut(x, cuts)))
        for (blocks,), _, _ in found:
            assert torch.equal(torch.cat([x[:0], *(block for (block,) in blocks)]), x[: cuts[-1]])


def test_rows_may_lie_in_memory_as_they_like(slices):
    """Transposed, and one row or one number of something larger."""
    wide = torch.arange(34).view(2, 17)
    for x in (wide.T, wide.T[3:4], wide[:1, 3], wide[:, ::17]):
        for (blocks,), *_ in slices.run(call, *[(len(x), "blocks", [x])] * 2):
            assert torch.equal(torch.cat([block for (block,) in blocks]), torch.cat([x, x]))
        for (best,), *_ in slices.run(call, *[(len(x), "best", [torch.zeros(len(x)), x])] * 2):
            assert_same(best, [torch.tensor(0), torch.tensor(0.0), x[0]])


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_spans_are_those_of_one_place(slices, cuts):
    cases = [[0, 8], [5, 1], [10, 10 << 20]]
    expected, found = both(slices, cuts, "spans", cases)
    assert all(each == expected for each in found)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32], ids=str)
def test_the_sum_over_slices_is_the_same_everywhere_and_leaves_its_argument(slices, dtype):
    rng = np.random.default_rng(0)
    for shape in ((4,), (3, 5), (2, 0)):
        for number in (1, 2, 3):
            parts = [values(rng, dtype, *shape) for _ in range(number)]
            for total, untouched, new in slices.run(add, *((each,) for each in parts)):
                assert total.dtype == dtype
                assert torch.equal(total, torch.stack(parts).sum(0).to(dtype))
                assert untouched
                assert new or not total.numel()


def test_a_sum_of_one_number_and_of_a_transposed_matrix(slices):
    one = torch.tensor(3)
    matrix = torch.arange(6.0).view(2, 3).T
    for (numbers, matrices), *_ in slices.run(call, *[(4, "sum", [one], [matrix])] * 3):
        assert numbers.shape == ()
        assert int(numbers) == 9
        assert torch.equal(matrices, 3 * matrix)


@pytest.mark.parametrize("verb", MEETINGS)
def test_all_slices_leave_where_they_meet(slices, verb):
    """The one that wants to stop raises what its check raised, the others Cancelled; the group works afterwards."""
    for late, where in (([1], "check"), ([0, 2], "check"), ([2], "report")):
        for rank, (heard, outcome, total) in enumerate(slices.run(stop, *[(verb, late, where)] * 3)):
            assert heard == 3
            if rank in late:
                assert outcome == ("DeadlineExceeded", f"{LATE} at {rank}")
            else:
                assert outcome == ("Cancelled", "another slice of the rows has stopped")
            assert total == 3.0


def test_nobody_stops_without_a_reason(slices):
    for verb in MEETINGS:
        assert slices.run(stop, *[(verb, [], "check")] * 3) == [(3, None, 3.0)] * 3


def test_slices_leave_before_they_start(slices):
    assert slices.run(stop_at_the_start, (), (), ()) == ["Cancelled", "DeadlineExceeded", "Cancelled"]


def test_slices_leave_between_blocks(slices):
    found = slices.run(stop_between_blocks, (), (), ())
    assert [seen for seen, _ in found] == [[0, 1]] * 3
    assert [name for _, name in found] == ["Cancelled", "DeadlineExceeded", "Cancelled"]


def test_without_a_group_all_processes_are_meant(slices):
    assert slices.run(default_group, (), (), ()) == [(6, 0), (6, 2), (6, 4)]


def test_every_slice_tells_how_far_it_is(slices):
    assert slices.run(progress_everywhere, (), (), ()) == [[(0, 9)], [(1, 9)], [(2, 9)]]


# The tests' own tools.


def test_what_goes_wrong_in_a_process_is_told(slices):
    with pytest.raises(Failed, match="rank 1 does not like this") as caught:
        slices.run(complain_at_rank_1, (), (), ())
    assert {rank: kind for rank, (kind, _) in caught.value.errors.items()} == {1: "ValueError"}
    assert slices.run(add, (torch.ones(1),))[0][0] == 1


def test_the_promise_is_kept_up_to_the_first_near_tie_and_no_further():
    def outcome(indices, scores):
        return Selected(indices, scores, None, [])

    whole = outcome([4, 2, 7], [3.0, 2.0, 1.0])
    for kept in (
        outcome([4, 2, 7], [3.0, 2.0, 1.0 + 1e-12]),
        outcome([4, 9, 1], [3.0, 2.0 * (1 + 1e-12), 0.5]),
    ):
        assert_promised(whole, kept, 1e-9)
    for broken in (
        outcome([4, 9, 7], [3.0, 2.0 * (1 + 1e-8), 1.0]),
        outcome([4, 2, 7], [3.0, 2.0, 1.0 + 1e-8]),
        outcome([4, 2, 8], [3.0, 2.0, 0.9]),
        outcome([4, 2], [3.0, 2.0]),
    ):
        with pytest.raises(AssertionError):
            assert_promised(whole, broken, 1e-9)
