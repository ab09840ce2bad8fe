"""Monte-Carlo dropout: networks that are trained with dropout and asked with it, as `queryselect.simulate` takes them.

Gal and Ghahramani, Dropout as a Bayesian approximation (ICML 2016): a network with some of its units left out is a
sample of its parameters. A sample here leaves out the same units for every row, so that samples are consistent, and
those of rows can be put together; torch's own dropout draws anew for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the name that torch's own pages use

#: Rows that go through a network at once where nothing is learnt: small enough for a processor's cache.
BATCH = 256

#: Leaves out some of what a layer gives: (n, F) or (n, F, H, W), of which F are units; told which layer it is.
Drop = Callable[[int, Tensor], Tensor]


class Net(nn.Module):
    """A network with dropout behind some of its layers. units: how many units each of these has."""

    units: tuple[int, ...]

    def before(self, x: Tensor) -> Tensor:
        """What the layers before the first dropout give: the same for every sample, and so computed once."""
        raise NotImplementedError

    def after(self, z: Tensor, drop: Drop) -> Tensor:
        """Logits (n, C)."""
        raise NotImplementedError


class ConvNet(Net):
    """BatchBALD's network for MNIST with fewer channels: two convolutions and two linear layers, dropout in between."""

    def __init__(self, channels: tuple[int, int], hidden: int, classes: int) -> None:
        super().__init__()
        self.units = (*channels, hidden)
        self.conv1 = nn.Conv2d(1, channels[0], 5)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 5)
        self.fc1 = nn.Linear(16 * channels[1], hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def before(self, x: Tensor) -> Tensor:
        """Images (n, 784) -> (n, channels, 12, 12)."""
        return F.max_pool2d(self.conv1(x.view(-1, 1, 28, 28)), 2).relu()

    def after(self, z: Tensor, drop: Drop) -> Tensor:
        """(n, channels, 12, 12) -> logits (n, C)."""
        z = F.max_pool2d(self.conv2(drop(0, z)), 2).relu()
        z = self.fc1(drop(1, z).flatten(1)).relu()
        out: Tensor = self.fc2(drop(2, z))
        return out


class Perceptron(Net):
    """One hidden layer, with dropout behind it and behind the features."""

    def __init__(self, features: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.units = (features, hidden)
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def before(self, x: Tensor) -> Tensor:
        """The features as they are."""
        return x

    def after(self, z: Tensor, drop: Drop) -> Tensor:
        """Features (n, D) -> logits (n, C)."""
        out: Tensor = self.fc2(drop(1, self.fc1(drop(0, z)).relu()))
        return out


@dataclass(frozen=True)
class Training:
    """How a network learns and is asked. dropout: the share left out of each layer.

    steps of minibatches each time it is trained, at a constant rate of Adam's; samples: K; sampled: whether dropout is
    on when samples are asked for, which are all the same where it is not. It is on for predictions in any case.
    """

    dropout: tuple[float, ...]
    steps: int = 400
    minibatch: int = 32
    rate: float = 1e-3
    weight_decay: float = 0.0
    samples: int = 50
    sampled: bool = True


class MonteCarloDropout:
    """Such a network as a Sampling and Continuing model (see queryselect.simulate).

    multilabel: each output is the log-odds of a label.
    """

    def __init__(self, make: Callable[[], Net], training: Training, seed: int, *, multilabel: bool = False) -> None:
        self._training, self._seed, self._multilabel = training, seed, multilabel
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._net = make()
        self._optimizer = torch.optim.Adam(self._net.parameters(), lr=training.rate, weight_decay=training.weight_decay)
        self._generator = torch.Generator().manual_seed(seed)

    def fit(self, X: Any, y: Any) -> MonteCarloDropout:  # noqa: N803  # scikit-learn's own letters
        """Learns from rows (n, D) and classes (n,) from 0, or labels (n, L)."""
        x, its = torch.as_tensor(X), torch.as_tensor(y)
        loss = F.binary_cross_entropy_with_logits if self._multilabel else F.cross_entropy
        its = its.to(x.dtype) if self._multilabel else its.to(torch.int64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=self._generator)))
            for rows in minibatches(len(x), self._training.minibatch, self._training.steps):
                self._optimizer.zero_grad()
                z = self._net.before(x[rows])
                loss(self._net.after(z, self._drop_anew), its[rows]).backward()  # type: ignore[no-untyped-call]
                self._optimizer.step()
        return self

    #: Training goes on from where the network and its optimiser are.
    continue_fit = fit

    def _drop_anew(self, layer: int, z: Tensor) -> Tensor:
        """What is left out is another for every row, units as a whole."""
        share = self._training.dropout[layer]
        return F.dropout(z, share) if z.dim() == 2 else F.dropout2d(z, share)

    def sample_logits(self, X: Any) -> NDArray[np.float32]:  # noqa: N803
        """(n, K, C). The same units are left out for all rows, and whenever this network is asked."""
        shares = self._training.dropout if self._training.sampled else [0.0] * len(self._net.units)
        return np.asarray(self._sampled(X, shares).numpy())

    def predict_log_proba(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """The logarithm of the samples' mean probability of each class or label, (n, C)."""
        logits = self._sampled(X, self._training.dropout).double()
        each = F.logsigmoid(logits) if self._multilabel else logits.log_softmax(-1)
        return np.asarray((each.logsumexp(1) - np.log(self._training.samples)).numpy())

    @torch.inference_mode()
    def _sampled(self, rows: Any, shares: Sequence[float]) -> Tensor:
        """Logits (n, K, C) with these shares left out of each layer."""
        generator = torch.Generator().manual_seed(self._seed)
        masks = [  # for each sample, what each layer's units are multiplied by: 0, or what makes up for those left out
            [
                torch.bernoulli(torch.full((units,), 1 - share), generator=generator) / (1 - share)
                for units, share in zip(self._net.units, shares, strict=True)
            ]
            for _ in range(self._training.samples)
        ]
        blocks = []
        for x in torch.split(torch.as_tensor(rows), BATCH):
            z = self._net.before(x)
            blocks.append(torch.stack([self._net.after(z, _dropping(each)) for each in masks], dim=1))
        return torch.cat(blocks)


def _dropping(masks: Sequence[Tensor]) -> Drop:
    return lambda layer, z: z * masks[layer].view(-1, *[1] * (z.dim() - 2))


def minibatches(rows: int, size: int, steps: int) -> Iterator[Tensor]:
    """Rows at random from torch's generator, every row once before any comes again."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if not len(order):
            order = torch.randperm(rows)
        chosen, order = order[:size], order[size:]
        yield chosen
