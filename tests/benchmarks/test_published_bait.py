"""The published algorithm of BAIT, which judges our picks, against brute force: every step from scratch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.case import Part, Problem
from benchmarks.published import bait
from benchmarks.published.bait import Form, affordable, select

ROWS, DIMS, CLASSES, BUDGET = 30, 3, 4, 4
FORMS = {
    "full": Form(torch.float64),
    "two classes": Form(torch.float64, top_classes=2),
    "binary": Form(torch.float64, binary=True),
    "diagonal": Form(torch.float64, diagonal=True),
    "shared": Form(torch.float64, shared=True),
}
PARAMS = {
    "relative": {},
    "absolute": {"ridge": 0.3, "ridge_scale": "ABSOLUTE"},
    "sum": {"fisher_scale": "SUM", "oversampling": 3},
}


def make(seed, labeled, params):
    rng = np.random.default_rng(seed)
    inputs = {"embeddings": 2 * rng.normal(size=(ROWS, DIMS)), "probabilities": rng.dirichlet(np.ones(CLASSES), ROWS)}
    context = torch.arange(labeled)
    candidates = torch.ones(ROWS, dtype=torch.bool)
    candidates[: labeled + 2] = False
    return Problem(
        {name: torch.from_numpy(x) for name, x in inputs.items()}, BUDGET, context, candidates, PARAMS[params]
    )


def factor(x, p, form):
    """V_x (P, c), column by column."""
    if form.binary:
        return np.sqrt(p.max() * (1 - p.max())) * x[:, None]
    classes = range(len(p)) if form.top_classes is None else np.argsort(-p)[: form.top_classes]
    total = 1 if form.top_classes is None else p[classes].sum()
    return np.stack([np.sqrt(p[j] / total) * np.kron(np.eye(len(p))[j] - p, x) for j in classes], axis=1)


def brute_force(problem, form):
    """tr(M^-1 F) of every candidate set that a step may lead to, M inverted anew for each."""
    x, p = (problem.inputs[name].numpy() for name in ("embeddings", "probabilities"))
    factors = [factor(*row, form) for row in zip(x, p, strict=True)]
    information = [v @ v.T for v in factors]
    if form.diagonal:
        information = [np.diag(np.diag(each)) for each in information]
    params, labeled = {"ridge": 1.0, "oversampling": 2, **problem.params}, problem.context.tolist()
    fisher = sum(information) / ROWS
    ridge = params["ridge"] * (1 if params.get("ridge_scale") == "ABSOLUTE" else np.mean(x**2))
    m = ridge * np.eye(len(fisher))
    if labeled:
        known = sum(information[row] for row in labeled)
        m += (
            known
            * len(labeled)
            / (len(labeled) + BUDGET)
            / (1 if params.get("fisher_scale") == "SUM" else len(labeled))
        )
    part = BUDGET / (len(labeled) + BUDGET)

    def moved(m, row, sign):
        """M with a row more or less; of a diagonal M the diagonal of the inverse is what stays."""
        new = m + sign * part * factors[row] @ factors[row].T
        return np.diag(1 / np.diag(np.linalg.inv(new))) if form.diagonal else new

    def left(m):
        return np.trace(np.linalg.inv(m) @ fisher)

    free, chosen = problem.candidates.nonzero().flatten().tolist(), []
    for _ in range(params["oversampling"] * BUDGET):
        best = min(free, key=lambda row: left(moved(m, row, 1)))
        m = moved(m, best, 1)
        free.remove(best)
        chosen.append(best)
    while len(chosen) > BUDGET:
        worst = min(chosen, key=lambda row: left(moved(m, row, -1)))
        m = moved(m, worst, -1)
        chosen.remove(worst)
    return chosen


@pytest.mark.parametrize("labeled", [0, 3])
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_picks_are_those_of_brute_force(form, params, labeled):
    for seed in range(2):
        problem = make(seed, labeled, params)
        assert select(problem, form).tolist() == brute_force(problem, form)


def test_a_few_steps_are_the_first_of_all():
    problem, form = make(0, 3, "relative"), FORMS["full"]
    steps = select(problem, form, 5).tolist()
    assert len(steps) == 5
    assert select(problem, form, 3).tolist() == steps[:3]


def test_what_is_too_slow_is_run_in_part_and_scaled(monkeypatch):
    problem, form = make(0, 3, "relative"), FORMS["full"]
    assert affordable(problem, form).tolist() == select(problem, form).tolist()
    monkeypatch.setattr(bait, "WHOLE_FLOP", {"cpu": 0})
    part = affordable(problem, form)
    assert isinstance(part, Part)
    assert part.said == "4 of 8 steps, scaled"
    monkeypatch.setattr(bait, "STEP_FLOP", {"cpu": 0})
    assert affordable(problem, form).said == "4 of 8 steps on 8 of 30 rows, scaled"


def test_what_has_no_room_is_not_begun(monkeypatch):
    monkeypatch.setattr(bait, "WHOLE_FLOP", {"cpu": 0})
    monkeypatch.setattr(bait, "free_memory", lambda: 1000)
    with pytest.raises(MemoryError, match="A and F, and what makes them, need"):
        affordable(make(0, 3, "relative"), FORMS["full"])
