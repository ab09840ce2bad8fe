"""Items of several rows: tokens of a sentence, boxes or pixels of an image. The rules, and item_rows as it comes."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from queryselect_service.checks import INTEGERS, Array, check_type
from queryselect_service.errors import InvalidInput, OverLimit, Unsupported
from queryselect_service.maths.items import BLOCK_ROWS, aggregate_items
from queryselect_service.shards import Shards, Whole
from queryselect_service.strategy import Strategy


class ItemAggregation(enum.StrEnum):
    """How the scores of an item's rows become the item's score."""

    MEAN = "MEAN"
    MAX = "MAX"
    SUM = "SUM"
    TOP_K_MEAN = "TOP_K_MEAN"


@dataclass
class Items:
    """The items of a request.

    array: item_rows, (N), the item of each row. top_k: how many rows TOP_K_MEAN averages. most: how many items may be.
    told: I and the path that tells it, if one does. occupied: (I,) bool, the items that have rows, once item_rows was
    read.
    """

    array: Array
    aggregation: ItemAggregation
    top_k: int | None
    most: int
    told: tuple[int, str] | None = None
    occupied: Tensor | None = None

    @property
    def size(self) -> int | None:
        """I, the number of items, None while nothing that is here tells it."""
        if self.occupied is not None:
            return len(self.occupied)
        return None if self.told is None else self.told[0]

    def check(self, strategy: Strategy) -> None:
        """Raises InvalidInput for what is wrong by itself, Unsupported where the strategy has no scores of rows."""
        if not strategy.serves_items:
            raise Unsupported(
                f"{strategy.name} does not serve pool.item_rows: it compares rows with each other, and only strategies "
                "that score every row by itself, or read none, can choose among items",
                field=self.array.path,
            )
        check_type(self.array, INTEGERS)
        if self.told is not None and self.told[0] < 1:
            size, path = self.told
            raise InvalidInput(f"{path} must be at least 1; it is {size}", field=path)
        if self.top_k is not None and self.top_k < 1:
            raise InvalidInput(f"pool.item_top_k must be at least 1; it is {self.top_k}", field="pool.item_top_k")
        if self.aggregation is ItemAggregation.TOP_K_MEAN and self.top_k is None:
            message = "pool.item_aggregation TOP_K_MEAN needs pool.item_top_k; it is not set"
            raise InvalidInput(message, field="pool.item_top_k")

    def read(self) -> None:
        """Takes item_rows, if it is here and was not read. Raises InvalidInput, OverLimit for an item that can't be."""
        data, path = self.array.data, self.array.path
        if data is None or self.occupied is not None:
            return
        least, highest = (int(each) for each in data.aminmax())
        if least < 0:
            row = int((data < 0).nonzero()[0])
            raise InvalidInput(f"{path} needs items of at least 0; row {row} has {int(data[row])}", field=path)
        if self.told is not None and highest >= self.told[0]:
            size, teller = self.told
            row = int((data >= size).nonzero()[0])
            words = f"{path} needs items 0 to {size - 1}, of which {teller} tells; row {row} has {int(data[row])}"
            raise InvalidInput(words, field=path)
        size = highest + 1 if self.told is None else self.told[0]
        if size > self.most:
            raise OverLimit("items", size, self.most, name="max_rows", field=path)
        occupied = torch.zeros(size, dtype=torch.bool)
        for start in range(0, len(data), BLOCK_ROWS):
            occupied[data[start : start + BLOCK_ROWS].long()] = True
        self.occupied = occupied

    def aggregate(self, scores: Tensor, item_rows: Tensor, pool: Shards) -> Tensor:
        """The scores (I,) of items, of rows' scores (N,). item_rows: where the scores are. pool: for its checks."""
        assert self.occupied is not None  # every value is here
        rows = Whole(len(scores), pool.check)
        return aggregate_items(scores, item_rows, len(self.occupied), self.aggregation, self.top_k, rows)

    def memory(self, rows: int, items: int) -> int:
        """The most bytes that `aggregate` takes beside item_rows: scores in another order, counts, a block's sort."""
        block = min(rows, BLOCK_ROWS)
        return 9 * rows + 32 * items + 96 * block
