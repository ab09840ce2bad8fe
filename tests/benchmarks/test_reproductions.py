"""Reproductions of papers, on a small data folder: that they run, and what they say where data is missing."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from benchmarks.reproductions import fast_fishing
from benchmarks.reproductions.data import MissingData, array, load

ROWS, DIMS, CLASSES = 120, 5, 7
RARE = np.arange(0, ROWS, 2, dtype=np.int32)


@pytest.fixture
def folder(tmp_path):
    """A set called mnist, as the folder of real data has it."""
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(CLASSES, DIMS))
    where = tmp_path / "data" / "mnist"
    where.mkdir(parents=True)
    for part, rows in (("train", ROWS), ("test", 50)):
        labels = np.arange(rows, dtype=np.int16) % CLASSES
        np.save(where / f"X_{part}.npy", (centres[labels] + rng.normal(size=(rows, DIMS))).astype(np.float16))
        np.save(where / f"y_{part}.npy", labels)
    np.save(where / "idx_imbalance10.npy", RARE)
    return where.parent


@pytest.fixture(autouse=True)
def alone(one_thread):
    """Of scikit-learn's and numpy's too."""
    with threadpool_limits(1):
        yield


def run(folder, results, *more):
    return fast_fishing.main(["--data", str(folder), "--results", str(results), "--quick", "--seeds", "2", *more])


def test_fast_fishing_runs_from_end_to_end(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "results", "--set", "mnist", "--probe", "plain") == 0
    said = capsys.readouterr().out
    assert "mnist: 120 rows of the pool" in said
    kept = sorted((tmp_path / "results").glob("reproduction-fast-fishing-mnist-plain-quick-*"))
    assert [path.suffix for path in kept] == [".json", ".svg"]
    found = json.loads(kept[0].read_text())
    assert found["counts"] == [20, 24, 28]
    assert {"random", "margin", "Exp c=1", "Exp c=2", "Exp c=5", "full", "diagonal", "binary"} <= set(
        found["strategies"]
    )
    for each in found["strategies"].values():
        assert len(each["accuracy"]) == len(each["standard error"]) == 3
        assert len(each["area"]) == 2
        assert each["seconds"] > 0
        assert each["CPU seconds"] > 0
    of = {(row["one"], row["other"]): row for row in found["pairs"]}
    areas = {name: np.array(each["area"]) for name, each in found["strategies"].items()}
    assert of["Exp c=2", "full"]["area"] == pytest.approx((areas["Exp c=2"] - areas["full"]).mean())
    assert 0 <= of["Exp c=2", "full"]["first picks in common"] <= 1
    assert ET.parse(kept[1]).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_one_seed_has_no_error(folder, tmp_path):
    assert run(folder, tmp_path / "results", "--set", "mnist", "--seeds", "1") == 0
    (path,) = (tmp_path / "results").glob("*.json")
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found["strategies"]["random"]["standard error"] == [None] * 3


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("nowhere", "there is no data folder"),
        ("data", "has no set banking77; it has: mnist"),
    ],
)
def test_what_is_missing_is_named(folder, tmp_path, capsys, missing, says):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / missing, tmp_path / "results", "--set", "banking77")
    assert says in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_missing_file_is_named(folder, tmp_path, capsys):
    (folder / "mnist" / "y_test.npy").unlink()
    with pytest.raises(SystemExit, match="2"):
        run(folder, tmp_path / "results", "--set", "mnist")
    assert "the set mnist has no file y_test.npy in" in capsys.readouterr().err


def test_a_set_is_loaded_as_it_is(folder):
    whole, rare = load(folder, "mnist"), load(folder, "mnist-imbalance10")
    assert whole.features.dtype == np.float32
    assert np.array_equal(rare.features, whole.features[RARE])
    assert np.array_equal(rare.labels, whole.labels[RARE])
    assert np.array_equal(rare.test_labels, whole.test_labels)
    with pytest.raises(MissingData, match=r"no file idx_imbalance100\.npy"):
        load(folder, "mnist-imbalance100")
    np.save(folder / "mnist" / "y_train.npy", whole.labels[1:])
    with pytest.raises(ValueError, match="120 rows of features and 119 classes"):
        load(folder, "mnist")


def test_a_sample_keeps_rows_and_labels_together(folder):
    whole = load(folder, "mnist")
    whole.features[:, 0] = np.arange(ROWS)
    some = whole.sample(30)
    assert np.array_equal(some.labels, whole.labels[some.features[:, 0].astype(int)])
    assert np.all(np.diff(some.features[:, 0]) > 0)
    assert whole.sample(ROWS + 1) is whole
    few = whole.of_classes(np.array([2, 5]))
    assert set(few.labels) == set(few.test_labels) == {2, 5}
    assert few.classes == 2
    assert some.projected(DIMS) is some
    flat = whole.projected(2)
    assert flat.features.shape == (ROWS, 2)
    # The directions of largest variance, largest first; held-out rows are moved and turned alike.
    variances = np.linalg.eigvalsh(np.cov(whole.features.T))[::-1]
    np.testing.assert_allclose(np.cov(flat.features.T), np.diag(variances[:2]), atol=1e-3 * variances[0])
    mean = whole.features.mean(axis=0)
    axes = np.linalg.lstsq(whole.features - mean, flat.features, rcond=None)[0]
    np.testing.assert_allclose((whole.test_features - mean) @ axes, flat.test_features, atol=1e-2)
    assert array(folder, "mnist", "idx_imbalance10").dtype == np.int32
