"""The Fisher kernel's reproduction on MNIST, on a few images of noise: its gradients, its split, and a run of it."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

from benchmarks import machine
from benchmarks.reproductions import fisher_kernel_mnist as reproduction
from benchmarks.reproductions import lenet
from benchmarks.reproductions.fisher_kernel_mnist import Method, Run, Sizes, main, report
from benchmarks.reproductions.mnist import Images, read, split
from queryselect import Client

A_CLASS, RARE_OF_CLASS = 40, 8


@pytest.fixture
def folder(tmp_path):
    """40 training images a class, of which classes 5 to 9 keep 8 each in the pool; 30 test images."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(10), A_CLASS)
    test_y = np.arange(30) % 10
    kept = np.flatnonzero((y < 5) | (np.arange(len(y)) % A_CLASS < RARE_OF_CLASS))
    (tmp_path / "mnist").mkdir()
    for name, its in (("y_train", y), ("y_test", test_y), ("idx_imbalance100", kept)):
        np.save(tmp_path / "mnist" / f"{name}.npy", its)
    pixels = {f"X_{part}": rng.integers(0, 256, (n, 784), np.uint8) for part, n in (("train", len(y)), ("test", 30))}
    np.savez(tmp_path / "mnist" / "pixels_uint8.npz", **pixels)
    return tmp_path


@pytest.fixture
def tiny(monkeypatch):
    sizes = Sizes(budget=5, rounds=2, validation=10, steps=3, epochs_of_all=1)
    monkeypatch.setattr(reproduction, "QUICK", sizes)
    return sizes


@pytest.fixture
def net():
    torch.manual_seed(0)
    return lenet.LeNet()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return Images(torch.randn(7, 1, 28, 28), torch.arange(7))


def test_pooled_gradients_are_those_of_each_image_alone(net, images):
    found = lenet.gradients(net, images.x, images.y)
    assert [each.shape for each in found] == [(7, 10), (7, 20), (7, 50)]
    for row in range(len(images)):
        one = images.x[row : row + 1]
        # The way back from a layer of one image: what follows the layer, as a function of what the layer gave.
        after = (
            lambda z: net.fc2(net.fc1(net.conv2(z))),
            lambda z: net.fc2(net.fc1(z)),
            net.fc2,
        )
        for at, (onwards, z) in enumerate(zip(after, net.layers(one), strict=False)):
            leaf = z.detach().requires_grad_()
            torch.nn.functional.cross_entropy(onwards(leaf), images.y[row : row + 1]).backward()
            wanted = leaf.grad[0].flatten(1).mean(1) if leaf.dim() > 2 else leaf.grad[0]
            np.testing.assert_allclose(found[at][row], wanted, atol=1e-6)


def test_descriptors_are_what_the_layers_give_on_average(net, images):
    probabilities, embeddings = lenet.describe(net, images.x)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    *layers, logits = net.layers(images.x)
    np.testing.assert_allclose(probabilities, logits.softmax(1).detach(), atol=1e-6)
    for each, z in zip(embeddings, layers, strict=True):
        wanted = z.mean((2, 3)) if z.dim() > 2 else z
        np.testing.assert_allclose(each, wanted.detach(), atol=1e-6)


def test_training_is_the_same_again_and_learns(images):
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(lenet.LeNet())
        lenet.train(nets[-1], images.x, images.y, steps=60, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert lenet.accuracy(nets[0], images.x, images.y) == 1


def test_the_variation_ratio_is_a_share_of_dissent_and_leaves_the_generator_alone(net, images):
    before = torch.random.get_rng_state()
    ratios = lenet.variation_ratio(net, images.x, samples=8, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(ratios, lenet.variation_ratio(net, images.x, samples=8, seed=0))
    assert ((ratios >= 0) & (ratios <= 7 / 8)).all()
    np.testing.assert_array_equal(ratios * 8, np.round(ratios * 8))
    for layer in (net.conv1, net.conv2, net.fc1, net.fc2):  # nothing left to drop out but the last bias
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
    assert not lenet.variation_ratio(net, images.x, samples=8, seed=0).any()


def test_the_validation_set_is_balanced_and_apart_and_the_pool_stays_rare(folder):
    train, imbalanced, test = read(folder)
    at = Images(torch.arange(len(train)).view(-1, 1, 1, 1), train.y)  # its own row in place of an image
    data = split(at, imbalanced, test, validation=10, seed=0)
    pool, held_out = data.pool.x.flatten(), data.validation.x.flatten()
    assert not np.intersect1d(pool, held_out).size
    assert np.isin(pool, imbalanced).all()
    assert np.bincount(data.validation.y).tolist() == [10] * 10
    # 30 of 40 images are left of the common classes, and as many of 40 of the rare ones' 8
    assert np.bincount(data.pool.y).tolist() == [30] * 5 + [6] * 5
    again = split(at, imbalanced, test, validation=10, seed=0)
    assert torch.equal(pool, again.pool.x.flatten())
    assert not torch.equal(pool, split(at, imbalanced, test, validation=10, seed=1).pool.x.flatten())


@pytest.mark.parametrize("name", list(reproduction.METHODS))
def test_every_method_asks_for_unlabelled_rows_only(folder, tiny, name):
    data = split(*read(folder), tiny.validation, 0)
    with Client("local:") as client:
        run = Run(client, reproduction.METHODS[name], data, tiny, seed=0)
        found = list(run.rounds())
    assert len(set(run.labeled.tolist())) == len(run.labeled) == tiny.rounds * tiny.budget
    assert len(found) == tiny.rounds
    assert found[-1][1] == np.mean(data.pool.y.numpy()[run.labeled] >= 5)


def test_what_the_kernel_is_asked_and_given(folder, tiny, monkeypatch):
    """Labels are asked for first where they are to be guessed; then gradients of them are sent."""
    data = split(*read(folder), tiny.validation, 0)
    guessed = np.arange(len(data.pool)) % 10
    calls = []

    class Answer:
        indices = np.arange(5)
        pseudo_labels = guessed

    class Listening:
        def select(self, name, budget, **options):
            calls.append((name, budget, {**options, "with": [sorted(each) for each in options["scales"]]}))
            return Answer

    run = Run(Listening(), reproduction.METHODS["nearest"], data, tiny, seed=0)
    next(run.rounds())
    (_, _, asked), (name, budget, given) = calls
    assert (name, budget) == ("fisher_kernel", 5)
    assert asked["returns"] == ["PSEUDO_LABELS"]
    assert asked["params"] == {"kernel": "PCC", "pseudo_label": "NEAREST"}
    assert asked["with"] == [["embeddings"]] * 3
    assert given["with"] == [["embeddings", "gradients"]] * 3
    assert given["params"] == {"kernel": "SUM", "pseudo_label": "NEAREST"}
    np.testing.assert_array_equal(given["reference"]["labels"], data.validation.y)
    wanted = lenet.gradients(reproduction._new(0), data.pool.x, torch.from_numpy(guessed))
    for scale, each in zip(given["scales"], wanted, strict=True):
        np.testing.assert_array_equal(scale["gradients"], each)


def test_a_run_keeps_what_it_found_and_goes_on_from_there(folder, tiny, tmp_path, monkeypatch, capsys):
    arguments = ["--data", str(folder), "--quick", "--seeds", "1", "--results", str(tmp_path), "--resume", "--methods"]
    assert main([*arguments, "random", "validation"]) == 0
    said = capsys.readouterr().out
    assert "| random | 1 |" in said
    assert "Trained on the validation set alone" in said
    path = tmp_path / f"reproduction-fisher-kernel-mnist-quick-{machine.name()}.json"
    kept = json.loads(path.read_text())
    drawn = ET.parse(path.with_suffix(".svg"))
    assert [text.text for text in drawn.iterfind(".//{*}text") if text.text == "random"]
    assert kept["sizes"]["budget"] == 5
    by_name = {row["name"]: row for row in kept["rows"]}
    assert len(by_name["random"]["accuracy"]) == len(by_name["random"]["rare"]) == 2
    assert by_name["validation"]["rare"] == [0.5]
    monkeypatch.setattr(reproduction, "play", lambda *_: pytest.fail("it was measured already"))
    assert main([*arguments, "random"]) == 0
    assert "| random | 1 |" in capsys.readouterr().out


def test_the_report_compares_seed_by_seed(monkeypatch):
    monkeypatch.setattr(reproduction, "METHODS", {"a": Method("A"), "b": Method("B", paper_of="B", paper=(50.5, None))})
    monkeypatch.setattr(reproduction, "PAIRS", (("b", "a"),))
    rows = [
        {"name": name, "seed": seed, "accuracy": [0.5 + gain + seed / 10, 0.6 + gain], "rare": [0.1, 0.2]}
        for name, gain in (("a", 0.0), ("b", 0.1))
        for seed in (0, 1)
    ]
    said = report(rows)
    assert "| A | 2 | 55.0 ± 5.0 | 60.0 ± 0.0 | 57.5 ± 2.5 | 20.0 |" in said
    assert "| *paper: B* | 10 | ~50.5 |  | | |" in said
    assert "| B − A | +10.0 ± 0.0 | +10.0, +10.0 |" in said


@pytest.mark.parametrize("lacking", ["", "mnist", "mnist/y_train.npy", "mnist/pixels_uint8.npz"])
def test_missing_data_are_named(folder, tmp_path, capsys, lacking):
    """An absent folder, set or file is told in one line, and nothing is run."""
    (folder / lacking).rename(tmp_path.parent / f"{tmp_path.name}-away")
    assert main(["--data", str(folder), "--quick", "--seeds", "1", "--methods", "random"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "there is no data folder" in said or "mnist has no file" in said or "no set mnist" in said
    assert lacking.removeprefix("mnist/") in said


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--rounds", "-1"], ["--methods", "nonsense"]])
def test_nonsense_is_refused(tmp_path, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(["--data", str(tmp_path), *arguments])
