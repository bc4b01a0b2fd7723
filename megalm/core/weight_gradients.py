"""Weight-gradient products that a zero-bubble schedule postpones (Qi et al. 2024, "B" and "W").

The backward of a linear layer is two independent products: the gradient of its input, which the stage before waits
for, and the gradient of its weight, which nobody waits for. A layer that is given a :class:`WeightGradients`
(:func:`megalm.core.linear.postpone_weight_gradients`) leaves the second one there while a schedule records, and
computes it at once otherwise. Without one, a layer that needs no communication is a plain ``F.linear``, which
``torch.compile`` sees through.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn


class Product(Protocol):
    """One contribution to a parameter's gradient."""

    def start(self) -> None:
        """Issue the communication that the product needs, if it needs any."""

    def __call__(self) -> Tensor:
        """The contribution; :meth:`start` comes first."""


class WeightGradients:
    """The postponed products of one rank, by the (stage, micro-batch) whose backward recorded them."""

    def __init__(self) -> None:
        self._recording: list[tuple[nn.Parameter, Product]] | None = None
        self._postponed: dict[Hashable, list[tuple[nn.Parameter, Product]]] = {}

    @property
    def postpones(self) -> bool:
        """Whether a backward that runs now is to leave its weight gradients here."""
        return self._recording is not None

    def postpone(self, parameter: nn.Parameter, product: Product) -> None:
        """Leave the computation of one contribution to ``parameter``'s gradient for later."""
        assert self._recording is not None, "products are postponed inside record() only"
        self._recording.append((parameter, product))

    @contextmanager
    def record(self, key: Hashable) -> Iterator[None]:
        """Postpone the weight gradients of a backward that runs inside; :meth:`compute` of the same key adds them."""
        self._recording = []
        try:
            yield
            self._postponed[key] = self._recording
        finally:
            self._recording = None

    def compute(self, key: Hashable) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, contribution to its gradient) of every product recorded under ``key``; each is then forgotten.

        A product's communication is under way while the one before it is computed.
        """
        products = self._postponed.pop(key)
        if products:
            products[0][1].start()
        while products:
            parameter, product = products.pop(0)
            if products:
                products[0][1].start()
            yield parameter, product()
