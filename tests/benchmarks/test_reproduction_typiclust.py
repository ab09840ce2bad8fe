"""TypiClust's reproduction and that of calibration on little data, their tables, and the picture of the mixture."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

from benchmarks import machine
from benchmarks.reproductions import calibration, drawing, gaussian_mixture, typiclust
from benchmarks.reproductions.data import load
from demo.figures import short
from queryselect import Client

ROWS, DIMS, CLASSES = 120, 5, 3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    """A set called mnist, as the folder of real data has it; its last class is rare in idx_imbalance100."""
    rng = np.random.default_rng(0)
    where = tmp_path / "data" / "mnist"
    where.mkdir(parents=True)
    centres = rng.normal(size=(CLASSES, DIMS))
    for part, rows in (("train", ROWS), ("test", 50)):
        labels = np.arange(rows) % CLASSES
        np.save(where / f"X_{part}.npy", (centres[labels] + rng.normal(size=(rows, DIMS))).astype(np.float16))
        np.save(where / f"y_{part}.npy", labels)
    np.save(where / "idx_imbalance100.npy", np.setdiff1d(np.arange(ROWS), np.arange(2, 90, CLASSES)))
    return where.parent


SETTING = typiclust.Setting("mnist", rows=100, budget=4, rounds=2)


@pytest.mark.parametrize("name", list(typiclust.METHODS))
def test_every_method_runs(folder, name):
    row = typiclust.play(load(folder, "mnist"), name, 1, SETTING)
    assert row["counts"] == [4, 8, 12]
    assert len(row["values"]) == len(row["classes"]) == 3
    assert np.all(np.diff(row["classes"]) >= 0)
    assert row["seconds"] > 0


def test_a_first_batch_is_the_methods_own_or_the_draw_of_the_seed(folder):
    pool = load(folder, "mnist")
    with Client("local:") as client:
        firsts = {
            name: typiclust.first_batch(client, method, pool, 4, 5).tolist()
            for name, method in typiclust.METHODS.items()
        }
        own = client.select("typiclust", 4, embeddings=pool.features, seed=5000).indices
    drawn = np.random.default_rng(5).choice(ROWS, 4, replace=False).tolist()
    assert {name for name, rows in firsts.items() if rows == drawn} == {
        *("random", "discriminative", "margin", "entropy", "badge", "bait_binary", "drop_query")
    }
    # Without a model they are what they are made of.
    assert firsts["typiclust"] == firsts["typiclust_to_margin"] == firsts["margin_after"] == own.tolist()
    assert firsts["uncertainty_herding"] == firsts["max_herding"]


@pytest.mark.parametrize(("name", "last"), [("typiclust_to_margin", 60), ("typiclust_uncapped", 500)])
def test_what_would_end_before_it_differs_from_typiclust_is_left_out(folder, name, last):
    """Before 20 labels in each of three classes, or before more than 500 clusters."""
    data = load(folder, "mnist")
    for rows, kept in ((last, ["random", name]), (last - 20, ["random"])):
        setting = typiclust.Setting("mnist", rows=1000, budget=20, rounds=rows // 20)
        assert typiclust.differing(["random", name], setting, data) == kept


@pytest.mark.parametrize("classes", [2, 3])
def test_drop_query_is_given_the_head(folder, classes):
    """Of two classes scikit-learn keeps one row of weights."""
    pool = load(folder, "mnist").of_classes(np.arange(classes))
    row = typiclust.play(pool, "drop_query", 0, SETTING)
    assert row["counts"] == [4, 8, 12]


def test_the_share_of_rare_classes_is_counted(folder):
    pool = load(folder, "mnist-imbalance100")
    assert np.bincount(pool.labels).tolist() == [40, 40, 10]
    row = typiclust.play(pool, "random", 0, typiclust.Setting("mnist-imbalance100", rows=90, budget=30, rounds=2))
    assert row["rare"] == pytest.approx(100 * 10 / 90)  # every row has a label in the end


def test_it_runs_from_end_to_end_and_keeps_what_it_found(folder, tmp_path, monkeypatch, capsys):
    arguments = ["--data", str(folder), "--results", str(tmp_path), "--quick", "--seeds", "2", "--set"]
    methods = ["--methods", "random", "typiclust", "typiclust_to_margin", "margin_after"]
    assert typiclust.main([*arguments, "mnist", "mnist-imbalanced", *methods]) == 0
    said = capsys.readouterr().out
    assert "| TypiClust − random |" in said
    assert "to margin" not in said
    path = tmp_path / f"reproduction-typiclust-mnist-quick-{machine.name()}.json"
    kept = json.loads(path.read_text())
    assert {(row["name"], row["seed"]) for row in kept["rows"]} == {
        (name, seed) for name in ("random", "typiclust", "margin_after") for seed in (0, 1)
    }
    assert kept["about"]["rows"] == 200
    starts = {row["name"]: row["values"][0] for row in kept["rows"] if row["seed"] == 1}
    assert starts["margin_after"] == starts["typiclust"] != starts["random"]
    assert ET.parse(path.with_suffix(".svg")).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    monkeypatch.setattr(typiclust, "play", lambda *_: pytest.fail("it was measured already"))
    assert typiclust.main([*arguments, "mnist", *methods]) == 0


def test_gains_are_paired_by_seed():
    rows = [
        {"name": name, "seed": seed, "counts": [3, 6], "values": [0.4, value], "area": value, "seconds": 0.5}
        | {"classes": [2, 3], "rare": 25.0}
        for name, seed, value in (("random", 0, 0.5), ("random", 1, 0.6), ("margin", 0, 0.6), ("margin", 1, 0.7))
    ]
    assert typiclust.gains(rows)[2:] == [
        "| random | 2 | 40.0 ± 0.0 | 55.0 ± 5.0 | 55.0 ± 5.0 | 2.0 | 25.0 | 0.50 |",
        "| margin | 2 | +0.0 ± 0.0 | +10.0 ± 0.0 | +10.0 ± 0.0 | 2.0 | 25.0 | 0.50 |",
        "",
    ]


def test_drawings_have_room_and_colours_for_the_names():
    labels = [method.label for method in typiclust.METHODS.values()]
    assert len(set(labels)) == len(labels)
    assert sum(method.drawn for method in typiclust.METHODS.values()) <= len(drawing.COLOURS)
    assert all(short(label) == label for label in labels)


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--methods", "nonsense"], ["--set", "cifar"], []])
def test_nonsense_is_refused(tmp_path, arguments):
    data = ["--data", str(tmp_path)] if arguments else []
    with pytest.raises(SystemExit, match="2"):
        typiclust.main([*data, *arguments])


def test_missing_data_are_named(folder, tmp_path, capsys):
    arguments = ["--data", str(folder), "--results", str(tmp_path / "results"), "--set", "banking77"]
    assert typiclust.main(arguments) == 2
    assert "has no set banking77; it has: mnist" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_typical_rows_are_typical_and_far_ones_are_not(tmp_path, capsys):
    path = tmp_path / "mixture.svg"
    assert gaussian_mixture.main(["--picture", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    typical = {line.partition(":")[0]: int(line.split()[1]) for line in said}
    assert typical["typiclust"] >= 12
    assert typical["k_center_greedy"] <= 2
    root = ET.parse(path).getroot()
    numbers = [text.text for text in root.iterfind(".//{*}g[@class='pick']/{*}text")]
    assert sorted(numbers, key=int) == [str(rank) for rank in range(1, 17) for _ in range(2)]
    drawn = ET.parse(gaussian_mixture.PICTURE).getroot()
    assert [text.text for text in drawn.iterfind("{*}text")] == [text.text for text in root.iterfind("{*}text")]


def test_a_gaussians_share_within_a_deviation_is_what_it_is_said_to_be():
    found = gaussian_mixture.mixture()
    every = np.arange(len(found.points))
    assert gaussian_mixture.typical(found, every) / len(every) == pytest.approx(1 - np.exp(-0.5), abs=0.03)
    assert gaussian_mixture.nearest_labelled(found, every) == 1


def test_a_factor_of_logits_is_what_strategies_are_told(folder, tmp_path, capsys):
    methods = ["--methods", "random", "margin-0.2", "margin-1", "bait_binary-1", "bait_binary-5"]
    arguments = ["--data", str(folder), "--results", str(tmp_path), "--quick", "--seeds", "2", "--set", "mnist"]
    assert calibration.main([*arguments, *methods]) == 0
    said = capsys.readouterr().out
    assert "| margin × 0.2 | 2 |" in said
    assert "| BAIT-Binary × 5 − BAIT-Binary × 1 |" in said
    kept = json.loads((tmp_path / f"reproduction-calibration-mnist-quick-{machine.name()}.json").read_text())
    assert len({row["values"][0] for row in kept["rows"] if row["seed"] == 0}) == 1  # the model is the same


@pytest.mark.parametrize("name", list(calibration.STRATEGIES))
def test_a_factor_of_one_changes_nothing(name):
    rng = np.random.default_rng(0)
    features, logits = rng.normal(size=(60, 4)), rng.normal(size=(60, 3))

    class Told:
        budget, labeled, seed, embeddings = 5, np.arange(6), 3, features
        log_probabilities = torch.from_numpy(logits).log_softmax(1).numpy()

    with Client("local:") as client:
        picks = client.select(name, 5, embeddings=features, logits=logits, labeled=np.arange(6), seed=3)
    assert calibration.told(name, 1.0)(Told()).tolist() == picks.indices.tolist()


def test_calibrations_nonsense_is_refused_and_missing_data_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        calibration.main(["--data", str(tmp_path), "--seeds", "0"])
    assert calibration.main(["--data", str(tmp_path / "nowhere")]) == 2
    assert "there is no data folder" in capsys.readouterr().err
