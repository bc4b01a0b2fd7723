"""Weight-gradient products that are no business of autograd: postponed ones, and those that add to a buffer themselves.

The backward of a linear layer is two independent products: the gradient of its input, which the stage before waits
for, and the gradient of its weight, which nobody waits for. A zero-bubble schedule postpones the second one (Qi et al.
2024, "B" and "W"): a layer that is given a :class:`WeightGradients`
(:func:`megalm.core.linear.postpone_weight_gradients`) leaves it there while a schedule records, and computes it at once
otherwise. Without one, a layer that needs no communication is a plain ``F.linear``, which ``torch.compile`` sees
through.

With a :class:`GradientSink` (:meth:`WeightGradients.accumulate_into`) the product adds to the fp32 buffer in which
gradients of all micro-batches are summed, at once or when its time comes: no gradient in the model's dtype is written
and read again, and no rounding to that dtype comes between a product and the sum. Biases are summed in fp32 likewise.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from megalm.core.device_kind import device_kind


class Product(Protocol):
    """One contribution to a parameter's gradient."""

    def start(self) -> None:
        """Issue the communication that the product needs, if it needs any."""

    def __call__(self) -> Tensor:
        """The contribution; :meth:`start` comes first."""

    def operands(self) -> tuple[Tensor, Tensor]:
        """What it is the product of, instead: output gradients G [n, O] and inputs X [n, I], for ``Gᵀ X``."""


class GradientSink(Protocol):
    """Sums of gradients in fp32, one of each parameter."""

    def add(self, parameter: nn.Parameter, gradient: Tensor, *, factor: Tensor | None = None) -> None:
        """Add a contribution, in any floating dtype, times a factor [1] if one is given."""

    def add_product(self, parameter: nn.Parameter, gradients: Tensor, inputs: Tensor) -> None:
        """Add ``Gᵀ X`` to the gradient [O, I] of a weight: G [n, O], X [n, I]."""


@torch.no_grad()
def add_product(total: Tensor, gradients: Tensor, inputs: Tensor, *, replace: bool) -> None:
    """``total`` [O, I] fp32 ``+= Gᵀ X``: output gradients G [n, O] and inputs X [n, I], both of one floating dtype.

    CUDA (compute capability 8.0 and above) has a product of 16-bit operands that adds to an fp32 matrix. Elsewhere the
    operands are converted first, which is as exact and slow.

    Args:
        total: what is added to, in place.
        gradients: G.
        inputs: X.
        replace: the product takes the place of what is in ``total``, which is not read.
    """
    transposed = gradients.t()
    if gradients.dtype == total.dtype or device_kind(gradients) == "cpu":
        transposed, inputs = transposed.to(total.dtype), inputs.to(total.dtype)
        if replace:
            torch.mm(transposed, inputs, out=total)
        else:
            total.addmm_(transposed, inputs)
    elif replace:
        torch.mm(transposed, inputs, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, transposed, inputs, out_dtype=total.dtype, out=total)


class WeightGradients:
    """Where the weight gradients of one rank's linear layers go.

    Postponed products are kept by the (stage, micro-batch) whose backward recorded them.

    Attributes:
        sink: what products add to; None: they are autograd's and the runner's to add.
    """

    def __init__(self) -> None:
        self.sink: GradientSink | None = None
        self._recording: list[tuple[nn.Parameter, Product]] | None = None
        self._postponed: dict[Hashable, list[tuple[nn.Parameter, Product]]] = {}

    def accumulate_into(self, sink: GradientSink) -> None:
        """Have all products from now on add to the sums of ``sink``."""
        self.sink = sink

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

        With a :attr:`sink` they are added there instead. A product's communication is under way while the one before it
        is computed.
        """
        products = self._postponed.pop(key)
        if products:
            products[0][1].start()
        while products:
            parameter, product = products.pop(0)
            if products:
                products[0][1].start()
            if self.sink is None:
                yield parameter, product()
            else:
                self.sink.add_product(parameter, *product.operands())

    def take(self, parameter: nn.Parameter, product: Product) -> Tensor | None:
        """A backward has a product: what it is to return to autograd as the weight's gradient."""
        if self.postpones:
            self.postpone(parameter, product)
            return None
        if self.sink is None:
            return product()
        self.sink.add_product(parameter, *product.operands())
        return None

    def take_bias(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        """The same of a bias [O], whose gradient is the sum of output gradients [n, O]; it is never postponed."""
        if self.sink is None:
            return gradients.sum(dim=0)
        self.sink.add(parameter, gradients.sum(dim=0, dtype=torch.promote_types(gradients.dtype, torch.float32)))
        return None
