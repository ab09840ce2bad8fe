"""Reproductions that are played by simulate.curves: their network, their mistakes, and runs of them on little data."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

from benchmarks import machine
from benchmarks.reproductions import multilabel_text, repeated_mnist, runs
from benchmarks.reproductions.data import load
from benchmarks.reproductions.dropout import ConvNet, MonteCarloDropout, Perceptron, Training, minibatches
from benchmarks.reproductions.runs import Method
from demo.figures import short
from queryselect import Client
from queryselect.simulate import curves

DATA = Path(__file__).parents[1] / "data"

pytestmark = pytest.mark.usefixtures("one_thread")


def conv(training, seed=0):
    return MonteCarloDropout(lambda: ConvNet((2, 3), 8, 4), training, seed)


IMAGES = np.random.default_rng(0).normal(size=(300, 784)).astype(np.float32)
CLASSES = np.arange(300) % 4
TRAINING = Training((0.5, 0.5, 0.5), steps=3, samples=5)


def test_a_sample_is_one_network_for_every_row():
    """The same units are left out wherever a row stands, and whatever stands beside it."""
    model = conv(TRAINING).fit(IMAGES, CLASSES)
    found = model.sample_logits(IMAGES)
    assert found.shape == (300, 5, 4)
    np.testing.assert_allclose(model.sample_logits(IMAGES[::-1].copy()), found[::-1], atol=1e-5)
    np.testing.assert_allclose(model.sample_logits(IMAGES[280:]), found[280:], atol=1e-5)
    assert np.ptp(found, axis=1).min() > 0


def test_a_sample_is_the_network_with_units_left_out_and_the_others_made_up_for():
    model = conv(Training((0.0, 0.0, 0.75), steps=3, samples=40)).fit(IMAGES, CLASSES)
    net = model._net
    hidden = []
    with torch.no_grad():
        net.after(net.before(torch.from_numpy(IMAGES)), lambda layer, z: (hidden.append(z), z)[1])
    found = model.sample_logits(IMAGES) - net.fc2.bias.detach().numpy()
    # What each hidden unit adds to the logits; a sample is four times the sum over the units that it keeps.
    each = (hidden[2][:, :, None] * net.fc2.weight.T).detach().numpy()  # (n, 8, C)
    for k in range(40):
        kept, *_ = np.linalg.lstsq(each.transpose(0, 2, 1).reshape(-1, 8), found[:, k].ravel(), rcond=None)
        alive = np.abs(each).max(axis=(0, 2)) > 1e-4
        assert np.minimum(np.abs(kept[alive]), np.abs(kept[alive] - 4)).max() < 0.01


def test_without_dropout_all_samples_are_the_same_and_predictions_are_as_they_were():
    on, off = (
        conv(Training((0.5, 0.5, 0.5), steps=3, samples=5, sampled=sampled)).fit(IMAGES, CLASSES)
        for sampled in (True, False)
    )
    assert not np.ptp(off.sample_logits(IMAGES), axis=1).any()
    np.testing.assert_array_equal(on.predict_log_proba(IMAGES), off.predict_log_proba(IMAGES))


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_prediction_is_the_mean_of_the_samples(multilabel):
    model = MonteCarloDropout(
        lambda: Perceptron(784, 6, 4), Training((0.1, 0.5), steps=2, samples=7), 1, multilabel=multilabel
    )
    model.fit(IMAGES, np.eye(4)[CLASSES] if multilabel else CLASSES)
    logits = torch.from_numpy(model.sample_logits(IMAGES)).double()
    wanted = (logits.sigmoid() if multilabel else logits.softmax(-1)).mean(1)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(IMAGES)), wanted, rtol=1e-6)


def test_training_learns_goes_on_and_is_the_same_again():
    x, y = IMAGES[:12], CLASSES[:12]
    training = Training((0.1, 0.1, 0.1), steps=150, samples=5)
    before = torch.random.get_rng_state()
    one, again, other = (conv(training, seed).fit(x, y) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert (one.predict_log_proba(x).argmax(axis=1) == y).mean() > 0.9
    np.testing.assert_array_equal(one.sample_logits(x), again.sample_logits(x))
    assert not np.array_equal(one.sample_logits(x), other.sample_logits(x))
    once = one.predict_log_proba(x)[np.arange(12), y].mean()
    assert one.continue_fit(x, y).predict_log_proba(x)[np.arange(12), y].mean() > once


def test_every_row_is_seen_before_any_comes_again():
    torch.manual_seed(0)
    rows = [each.tolist() for each in minibatches(5, 2, 6)]
    assert [len(each) for each in rows] == [2, 2, 1, 2, 2, 1]
    assert sorted(chain(*rows[:3])) == sorted(chain(*rows[3:])) == list(range(5))


@pytest.fixture
def mnist(tmp_path):
    """30 training images a class, of noise, and 30 test images."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    (folder / "mnist").mkdir(parents=True)
    y, test_y = np.repeat(np.arange(10), 30), np.arange(30) % 10
    for name, its in (("y_train", y), ("y_test", test_y), ("idx_imbalance100", np.arange(300))):
        np.save(folder / "mnist" / f"{name}.npy", its)
    pixels = {f"X_{part}": rng.integers(0, 256, (n, 784), np.uint8) for part, n in (("train", 300), ("test", 30))}
    np.savez(folder / "mnist" / "pixels_uint8.npz", **pixels)
    return folder


@pytest.fixture
def texts(tmp_path):
    """160 rows of which each has some of four labels, under the name of the real set."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / multilabel_text.SET
    folder.mkdir(parents=True)
    for part, rows in (("train", 160), ("test", 40)):
        x = rng.normal(size=(rows, 6)).astype(np.float16)
        np.save(folder / f"X_{part}.npy", x)
        np.save(folder / f"y_{part}.npy", (x[:, :4] > [0, 0.3, 0.6, 0.9]).astype(np.uint8))
    return folder.parent


def test_a_pool_repeats_its_images_with_noise(mnist):
    sizes = repeated_mnist.Sizes(unique=200, copies=3, initial=1, test=20)
    found = repeated_mnist.repeated(mnist, sizes, seed=0)
    assert found.x.shape == (600, 784)
    assert found.test_x.shape == (20, 784)
    np.testing.assert_array_equal(found.y, np.tile(found.y[:200], 3))
    for one, other in ((0, 200), (200, 400)):
        noise = found.x[one : one + 200] - found.x[other : other + 200]
        assert noise.std() == pytest.approx(0.1 * np.sqrt(2), rel=0.02)
    assert sorted(found.y[found.start]) == list(range(10))
    assert (found.start < 200).all()
    np.testing.assert_array_equal(repeated_mnist.repeated(mnist, sizes, seed=0).x, found.x)
    assert not np.array_equal(repeated_mnist.repeated(mnist, sizes, seed=1).y, found.y)


def test_repetitions_are_counted():
    images = np.array([[1, 1, 1, 2], [2, 3, 4, 9]])
    assert repeated_mnist.repetitions(images, np.array([9])) == {"repeats": [2, 0], "known": [0, 2]}


@pytest.fixture
def tiny(monkeypatch):
    sizes = repeated_mnist.Sizes(
        unique=100, rounds=1, budget=3, initial=1, test=20, samples=3, channels=(1, 1), hidden=4, steps=2
    )
    monkeypatch.setattr(repeated_mnist, "QUICK", sizes)
    return sizes


def test_repeated_mnist_runs_and_keeps_what_it_found(mnist, tiny, tmp_path, monkeypatch, capsys):
    methods = repeated_mnist.METHODS
    arguments = ["--data", str(mnist), "--quick", "--seeds", "2", "--results", str(tmp_path), "--methods"]
    assert repeated_mnist.main([*arguments, *methods]) == 0
    said = capsys.readouterr().out
    path = tmp_path / f"reproduction-repeated-mnist-quick-{machine.name()}.json"
    kept = json.loads(path.read_text())
    assert {(row["name"], row["seed"]) for row in kept["rows"]} == {(name, seed) for name in methods for seed in (0, 1)}
    assert all(row["counts"] == [10, 13] and len(row["repeats"]) == len(row["known"]) == 1 for row in kept["rows"])
    assert len({row["values"][0] for row in kept["rows"] if row["seed"] == 0}) == 1  # all start alike
    assert kept["machine"]["threads"] == "1"
    assert "| BALD | 2 |" in said
    assert "| BALD − random |" in said
    drawn = ET.parse(path.with_suffix(".svg"))
    assert [text.text for text in drawn.iterfind(".//{*}text") if text.text == "PowerBALD"]
    monkeypatch.setattr(repeated_mnist, "play", lambda *_: pytest.fail("it was measured already"))
    assert repeated_mnist.main([*arguments, "random"]) == 0
    assert "PowerBALD" not in capsys.readouterr().out
    monkeypatch.setattr(repeated_mnist, "QUICK", repeated_mnist.Sizes(unique=99))
    with pytest.raises(pytest.fail.Exception, match="measured already"):  # of other sizes nothing is kept
        repeated_mnist.main([*arguments, "random"])


@pytest.mark.parametrize("name", list(multilabel_text.METHODS))
def test_every_way_to_choose_among_texts_runs(texts, name):
    retrain = name != "bald"
    sizes = multilabel_text.Sizes(
        pool=100, initial=10, budget=4, rounds=2, retrain=retrain, samples=3, hidden=4, steps=3
    )
    row = multilabel_text.play(load(texts, multilabel_text.SET), name, 0, sizes)
    assert row["counts"] == [10, 14, 18]
    assert len(row["first"]) == len(set(row["first"])) == 4
    assert 0 <= row["labels"] <= 4
    assert 0 <= row["most"] <= 100


def test_the_mistaken_bald_is_the_one_that_was_run():
    with np.load(DATA / "bald_mistaken.npz") as found:
        p = torch.from_numpy(found["probabilities"])
        np.testing.assert_allclose(multilabel_text.mistaken_bald(p), found["given_probabilities"], rtol=1e-12)
        np.testing.assert_allclose(multilabel_text.mistaken_bald(p.log()), found["given_logarithms"], rtol=1e-12)
        with Client("local:") as client:
            picks = client.select("bald", 6, samples=p.numpy(), samples_kind="PROBABILITIES", return_pool_scores=True)
        np.testing.assert_allclose(picks.pool_scores, found["given_logarithms"], rtol=1e-12)


def test_to_second_order_the_mistaken_bald_is_a_variance():
    rng = np.random.default_rng(0)
    p = torch.from_numpy(rng.dirichlet(np.ones(5), 20)[:, None] + 1e-3 * rng.normal(size=(20, 8, 5)))
    wanted = (p.mean(1).exp() * p.var(1, unbiased=False)).sum(-1) / 2
    np.testing.assert_allclose(multilabel_text.mistaken_bald(p), wanted, rtol=1e-2)


class Told:
    """An offer of certain samples."""

    budget, labeled = 2, np.array([3])

    def __init__(self, p):
        self.samples = np.log(p)


def test_mistakes_prefer_what_they_should_not():
    """Rows of three samples and three labels: sure of one label, unsure of which, and disagreeing."""
    sure, unsure = [[0.98, 0.01, 0.01]] * 3, [[0.4, 0.3, 0.3]] * 3
    torn = [[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.01, 0.01, 0.98]]
    offer = Told(np.array([sure, unsure, torn, torn]))
    assert multilabel_text._margin_largest(offer).tolist() == [0, 1]
    assert multilabel_text._least_confidence_softmaxed(offer).tolist() == [2, 1]
    assert multilabel_text._bald_softmaxed(offer).tolist() == [2, 0]  # nothing to learn of either: the lowest row
    assert multilabel_text._bald_mistaken(offer).tolist()[0] == 2


def test_text_options_reach_the_curves(texts, tmp_path, monkeypatch, capsys):
    asked = []

    def play(data, name, seed, sizes):
        asked.append((name, seed, sizes.initial, sizes.budget, sizes.rounds, sizes.retrain))
        value = [0.5, 0.6 + 0.1 * seed + (name == "margin") / 10]
        more = {"first": [1, 2 + (name == "margin-largest")], "labels": 1.5, "most": 25.0}
        return {"name": name, "seed": seed, "counts": [10, 20], "values": value, "area": value[1], "seconds": 1, **more}

    monkeypatch.setattr(multilabel_text, "play", play)
    base = ["--data", str(texts), "--results", str(tmp_path), "--seeds", "2", "--methods", "random", "margin"]
    more = ["margin-largest", "--initial", "0.1", "--budget", "20", "--rounds", "3", "--continue"]
    assert multilabel_text.main([*base, *more]) == 0
    assert asked[0] == ("random", 0, 0.1, 20, 3, False)
    assert asked[-1][:2] == ("margin-largest", 1)
    said = capsys.readouterr().out
    assert "| random | 2 | 50.0 ± 0.0 | 65.0 ± 5.0 | 65.0 ± 5.0 | 1.50 | 25 |  |" in said
    assert "| largest margin − margin | -10.0 ± 0.0 | -10.0, -10.0 | 50 |" in said
    name = f"reproduction-multilabel-text-initial0.1-budget20-rounds3-continue-{machine.name()}"
    assert sorted(path.name for path in tmp_path.glob("repro*")) == [f"{name}.json", f"{name}.svg"]
    assert "Test macro AUROC of 3 strategies" in (tmp_path / f"{name}.svg").read_text()


@pytest.mark.parametrize("script", [repeated_mnist, multilabel_text])
def test_drawings_have_room_for_the_names(script):
    labels = [method.label for method in script.METHODS.values()]
    assert len(set(labels)) == len(labels)
    assert all(short(label) == label for label in labels)


def test_tables_pair_seeds_that_both_have():
    rows = [
        {"name": name, "seed": seed, "counts": [1, 2], "values": [0.1, 0.2], "area": area}
        for name, seed, area in (("a", 0, 0.5), ("a", 1, 0.4), ("b", 1, 0.5), ("b", 2, 0.9))
    ]
    methods = {"a": Method("A", "random"), "b": Method("B", "random"), "c": Method("C", "random")}
    assert runs.paired(rows, methods, [("b", "a"), ("c", "a")])[2:] == ["| B − A | +10.0 | +10.0 |", ""]
    assert runs.saturated(rows) == ""
    assert runs.saturated([*rows, {"saturated": [1, 4]}]) == "2.5"
    assert runs.table(rows, methods, {})[2] == "| A | 2 | 10.0 ± 0.0 | 20.0 ± 0.0 | 45.0 ± 5.0 |"


def test_picks_from_saturation_on_are_counted():
    """Four samples that one row tells apart leave nothing to know: it and what is picked after it are warned of."""
    x, y = np.arange(20.0).reshape(10, 2), np.arange(10) % 4

    class Model:
        def fit(self, rows, labels):
            return self

        def predict_log_proba(self, rows):
            return np.full((len(rows), 4), -np.log(4))

        def sample_logits(self, rows):
            return np.tile(np.where(np.eye(4) > 0, 0, -np.inf), (len(rows), 1, 1))

    with Client("local:") as client:
        found = curves(
            client, x, y, test_features=x, test_labels=y, strategies=["batch_bald", "bald"],
            rounds=2, budget=3, initial=4, seeds=[7], model=Model, progress=False,
        )  # fmt: skip
    assert runs.row(found, "batch_bald", 7)["saturated"] == [3, 3]
    assert "saturated" not in runs.row(found, "bald", 7)


@pytest.mark.parametrize("script", [repeated_mnist, multilabel_text])
@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--methods", "nonsense"], []])
def test_nonsense_is_refused(tmp_path, script, arguments):
    data = ["--data", str(tmp_path)] if arguments else []
    with pytest.raises(SystemExit, match="2"):
        script.main([*data, *arguments])


@pytest.mark.parametrize("script", [repeated_mnist, multilabel_text])
def test_missing_data_are_named(tmp_path, script, capsys):
    assert script.main(["--data", str(tmp_path / "nowhere"), "--results", str(tmp_path / "results")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "there is no data folder" in said
    assert not (tmp_path / "results").exists()
