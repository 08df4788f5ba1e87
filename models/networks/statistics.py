"""What a trainer does to any network beside its steps: batch-norm statistics and exponential averages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

BufferRule = Literal["average", "copy"]


@contextmanager
def norm_statistics(network: nn.Module, update: bool) -> Iterator[None]:
    """Decides whether forward passes inside it write the batch norms' running statistics; inside a no, yes is no.

    In training mode a batch is always normalised by its own statistics, whatever this says; in evaluation
    mode nothing changes. So a target pass can leave the running statistics to the source, or the reverse.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [norm.track_running_stats for norm in norms]
    for norm, tracked in zip(norms, before, strict=True):
        norm.track_running_stats = update and tracked
    try:
        yield
    finally:
        for norm, tracked in zip(norms, before, strict=True):
            norm.track_running_stats = tracked


@torch.no_grad()
def ema_update(
    average: Mapping[str, Tensor], network: nn.Module, decay: float, *, buffers: BufferRule = "average"
) -> None:
    """Moves an average in place: average <- decay * average + (1 - decay) * network.

    Running statistics are averaged like weights by default, because they belong to the weights they were
    seen under; ``buffers="copy"`` takes the network's newest instead. Integer buffers are copied.

    Args:
        average: state dict of the averaged network, on the network's device (its tensors are written).
        network: the network that learns.
        decay: share kept; 0 copies.
        buffers: what happens to floating-point buffers.

    Raises:
        ValueError: if the two have different keys or the decay is outside [0, 1].
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay is {decay}; a share lies in [0, 1]")
    state = network.state_dict()
    if state.keys() != average.keys():
        odd = sorted(state.keys() ^ average.keys())
        raise ValueError(f"the average and the network have different entries, for example {odd[0]!r}")
    parameters = {name for name, _ in network.named_parameters()}
    floats: tuple[list[Tensor], list[Tensor]] = ([], [])
    copies: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, value in state.items():
        averaged = value.is_floating_point() and (name in parameters or buffers == "average")
        kept, fresh = floats if averaged else copies
        kept.append(average[name])
        fresh.append(value)
    if floats[0]:
        torch._foreach_lerp_(floats[0], floats[1], 1.0 - decay)
    if copies[0]:
        torch._foreach_copy_(copies[0], copies[1])


@torch.no_grad()
def adapt_batch_norm(network: nn.Module, batches: Iterable[Tensor]) -> int:
    """AdaBN: replaces the running statistics by the cumulative average over the given image batches.

    Only the batch norms are in training mode meanwhile, so dropout is off; weights do not change, and
    every module's mode is restored.

    Args:
        network: the network to re-estimate, in place.
        batches: image batches (N, 3, H, W) on the network's device.

    Returns:
        The number of batches used.

    Raises:
        ValueError: if there was no batch; the statistics are then as they were.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("no batches were given, so there is nothing to estimate the statistics from")
    modes = {module: module.training for module in network.modules()}
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's name for a cumulative average
        norm.training = True
    count = 0
    try:
        batch: Tensor | None = first
        while batch is not None:
            network(batch)
            count += 1
            batch = next(iterator, None)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return count
