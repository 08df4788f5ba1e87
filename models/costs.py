"""What a network costs before it runs: parameters, operations, and memory for activations.

Everything follows from shapes. On the ``meta`` device a pass takes a second or less and allocates nothing; on any other
the same functions measure a real one. What happens inside one operator is not seen: a convolution's workspace is not
in the bytes, and neither are a CUDA context or an allocator's rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

ENLARGED_OPERATIONS = 22
"""FLOPs of one bilinearly enlarged value. With 11 multiplications and additions, each counted as a multiply-add, the
figures published for BiSeNet's discriminators come out (30.89 and 2.147 GFLOPs, methods 2.5)."""


@dataclass(frozen=True)
class Cost:
    """Of one network and one size of input.

    Attributes:
        parameters: numbers that learn; a shared tensor counts once.
        flops: of one inference pass, see :func:`flops`.
        inference_bytes: peak of one inference pass, see :func:`peak_bytes`.
        training_bytes: peak of a forward pass in training mode and the backward pass after it, most of it the
            activations that are kept between them.
    """

    parameters: int
    flops: int
    inference_bytes: int
    training_bytes: int


def cost(network: nn.Module, inputs: Tensor, scores: Callable[[Any], Sequence[Tensor]]) -> Cost:
    """Parameters, operations and bytes of a network.

    The backward pass begins with a gradient of every score, as a loss would hand it over; the loss itself is not
    counted. On a device other than ``meta`` the gradients are zeros, and ``grad`` of the parameters is None afterwards.

    Args:
        network: on the device and of the type of ``inputs``; it is left in training mode, and its batch norms have
            seen the inputs.
        inputs: what it reads, any shape; they learn nothing.
        scores: the tensors of an answer of the network that a loss reads.

    Raises:
        ValueError: the network cannot read such inputs.
    """
    given = [inputs, *network.parameters(), *network.buffers()]

    def train() -> None:
        answer = scores(network(inputs))
        torch.autograd.backward(list(answer), [torch.zeros_like(score) for score in answer])

    network.eval()
    with torch.no_grad():
        operations = flops(lambda: network(inputs))
        inference = peak_bytes(lambda: network(inputs), given)
    network.train().zero_grad()
    training = peak_bytes(train, given, [parameter for parameter in network.parameters() if parameter.requires_grad])
    network.zero_grad()
    return Cost(parameters(network), operations, inference, training)


def parameters(network: nn.Module) -> int:
    """Numbers that learn, each once."""
    return sum(parameter.numel() for parameter in network.parameters())


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of whatever tensors do while something runs: two a multiply-add.

    Convolutions (a grouped one reads its group's channels only), matrix products and bilinear enlargements are counted;
    norms, rectifiers, poolings and the addition of biases are not.
    """
    enlarged: Mapping[Any, Any] = {
        torch.ops.aten.upsample_bilinear2d: lambda *_, out_shape, **__: ENLARGED_OPERATIONS * prod(out_shape)
    }
    with FlopCounterMode(display=False, custom_mapping=dict(enlarged)) as counter:
        run()
    return int(counter.get_total_flops())


def peak_bytes(run: Callable[[], Any], given: Iterable[Tensor], learns: Iterable[nn.Parameter] = ()) -> int:
    """The most bytes that tensors which something makes hold at a time while it runs.

    Tensors that share memory count once. An operator's inputs and outputs are alive together.

    Args:
        run: what is looked at.
        given: tensors that were there before and are not counted: parameters, buffers, inputs.
        learns: parameters whose gradients are not counted either: they take as much as the parameters do, and stay
            until the optimiser has read them.
    """
    live = _LiveBytes(given)
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda done: live.leave_out(done.grad)) for parameter in learns
    ]
    try:
        with live:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return live.peak()


class _LiveBytes(TorchDispatchMode):
    """Follows the memory of every tensor that an operator returns, until nobody holds it.

    Args:
        given: tensors whose memory does not count.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.given = [tensor.untyped_storage() for tensor in given]  # alive, so that no address is used again
        self.ignored = {storage._cdata for storage in self.given}
        self.alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        """By address: its end, and its place in ``events``."""
        self.events: list[tuple[int, int]] = []
        """(whose beginning or end it is, by the place of the beginning; bytes that are then more), in order."""
        self.left_out: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and look at what it returned."""
        answer = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, answer)
        return answer

    def leave_out(self, tensor: Tensor | None) -> None:
        """Count a tensor's memory as if it had never been."""
        if tensor is not None and (found := self.alive.get(tensor.untyped_storage()._cdata)) is not None:
            self.left_out.add(found[1])

    def peak(self) -> int:
        """The most bytes that were alive at a time."""
        counted = (more for place, more in self.events if place not in self.left_out)
        return max(accumulate(counted), default=0)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, place = storage._cdata, len(self.events)
        if address in self.ignored or address in self.alive:
            return
        self.alive[address] = weakref.ref(storage, lambda _: self._gone(address)), place
        self.events.append((place, storage.nbytes()))

    def _gone(self, address: int) -> None:
        place = self.alive.pop(address)[1]
        self.events.append((place, -self.events[place][1]))
