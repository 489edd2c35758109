"""Weights averaged over the steps of a run."""

from collections.abc import Mapping

import torch

from fastadv.training.finite import in_8_bits, inexact, nonfinite


class EMA:
    """Exponential moving average of tensors by name.

    Integers such as counts, floats in 8 bits, masks and sparse tensors are copied.

    The decay at step t is min(decay, (1 + t) / (10 + t)): 0.1 at first, 0.92 at step 100. So the average soon forgets
    the beginning. It is kept on the tensors' device; otherwise all weights would be copied to the host in every step.

    Source: Polyak averaging; for its effect on networks Izmailov et al. 2018 (arXiv 1803.05407).

    Args:
        state: the tensors to begin with, which are copied. A tensor with infinite numbers or NaN counts as a mask: -inf
            and -inf have no mean.
        decay: the largest decay, such as 0.998.

    Attributes:
        state: the averaged tensors, by name.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], decay: float):
        self.state = {name: t.detach().clone() for name, t in state.items()}
        self.decay = decay
        masks = set(nonfinite(self.state))
        self._averaged = [
            name
            for name, t in self.state.items()
            if name not in masks and inexact(t) and not in_8_bits(t) and t.layout == torch.strided
        ]

    @torch.no_grad()
    def update(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Update the average.

        Args:
            state: the tensors after an update, by name.
            step: the number of the update, from 0.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        names = [name for name in self._averaged if self.state[name].shape == state[name].shape]
        torch._foreach_lerp_([self.state[n] for n in names], [state[n].detach() for n in names], weight)
        for name in state.keys() - set(names):
            if self.state[name].shape == state[name].shape:
                self.state[name].copy_(state[name])
            else:  # a buffer that grows
                self.state[name] = state[name].detach().clone()
