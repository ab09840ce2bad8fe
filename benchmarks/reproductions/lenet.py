"""LeNet as the Fisher-kernel paper trains it: its descriptors, their gradients, and its Monte-Carlo dropout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the name that torch's own pages use

from benchmarks.reproductions.mnist import CLASSES

#: Images that go through the network at once where nothing is learnt: small enough for a processor's cache.
BATCH = 256
#: The authors' optimiser: stochastic gradient descent whose rate falls tenfold three times.
RATE, MOMENTUM, MINIBATCH, FALLS = 0.05, 0.5, 25, (0.3, 0.6, 0.9)
#: The authors' shares of what Monte-Carlo dropout leaves out behind each layer.
DROPOUT = (0.25, 0.25, 0.5)


class LeNet(nn.Module):
    """Two convolutions and two linear layers, for images (n, 1, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU())  # (n, 10, 12, 12)
        self.conv2 = nn.Sequential(nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU())  # (n, 20, 4, 4)
        self.fc1 = nn.Sequential(nn.Flatten(), nn.Linear(320, 50), nn.ReLU())  # (n, 50)
        self.fc2 = nn.Linear(50, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, C)."""
        return self.layers(x)[-1]

    def layers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What each layer gives, after pooling and rectifying; the last are the logits (n, C)."""
        z1 = self.conv1(x)
        z2 = self.conv2(z1)
        z3 = self.fc1(z2)
        return z1, z2, z3, self.fc2(z3)


def train(net: LeNet, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    """So many steps of stochastic gradient descent on images (n, 1, 28, 28) and labels (n,), from where the net is."""
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(share * steps) for share in FALLS])
    for rows in _minibatches(len(labels), steps, seed):
        optimizer.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]  # torch says nothing of it
        optimizer.step()
        schedule.step()


def _minibatches(n: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Rows of n, every row once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if not len(order):
            order = torch.randperm(n, generator=generator)
        rows, order = order[:MINIBATCH], order[MINIBATCH:]
        yield rows


@torch.inference_mode()
def describe(net: LeNet, images: Tensor) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
    """Probabilities (n, C), and the descriptor of each layer but the last: its spatial mean, (n, L_j)."""
    parts = []
    for x in torch.split(images, BATCH):
        *zs, logits = net.layers(x)
        parts.append([logits.softmax(1), *(_pooled(z) for z in zs)])
    probabilities, *embeddings = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
    return probabilities, embeddings


def gradients(net: LeNet, images: Tensor, labels: Tensor) -> list[NDArray[np.float32]]:
    """The spatial means of dL/dZ for each layer but the last, (n, L_j); L is a row's own −log p of its label."""
    parts = []
    for x, y in zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True):
        *zs, logits = net.layers(x)
        loss = F.cross_entropy(logits, y, reduction="sum")  # a row's gradient is then its own
        parts.append([_pooled(each) for each in torch.autograd.grad(loss, zs)])
    return [torch.cat(each).numpy() for each in zip(*parts, strict=True)]


def _pooled(z: Tensor) -> Tensor:
    """The mean over space, where there is any, (n, L)."""
    return z.flatten(2).mean(2) if z.dim() > 2 else z


@torch.inference_mode()
def accuracy(net: LeNet, images: Tensor, labels: Tensor) -> float:
    """The share of images (n, 1, 28, 28) whose likeliest class is their label's."""
    found = torch.cat([net(x).argmax(1) for x in torch.split(images, BATCH)])
    return float((found == labels).double().mean())


@torch.inference_mode()
def variation_ratio(net: LeNet, images: Tensor, samples: int, seed: int) -> NDArray[np.float64]:
    """1 − the share of Monte-Carlo dropout samples that predict the commonest class, (n,)."""
    votes = np.zeros((len(images), CLASSES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for first in range(0, len(images), BATCH):
            z1 = net.conv1(images[first : first + BATCH])
            rows = np.arange(first, first + len(z1))
            for _ in range(samples):
                z2 = net.conv2(F.dropout(z1, DROPOUT[0]))
                z3 = net.fc1(F.dropout(z2, DROPOUT[1]))
                votes[rows, net.fc2(F.dropout(z3, DROPOUT[2])).argmax(1).numpy()] += 1
    return np.asarray(1 - votes.max(axis=1) / samples)
