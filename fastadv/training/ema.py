"""Weights averaged over the steps of a run."""

from collections.abc import Mapping

import torch

from fastadv.training.finite import nonfinite


class EMA:
    """Exponential moving average of tensors by name. Counts, masks and the like are copied.

    The decay rises with the steps, (1 + t) / (10 + t) at first, so that the beginning is soon forgotten
    (as in Polyak averaging; Izmailov et al. 2018, arXiv 1803.05407, for the effect on networks). The average stays on
    the tensors' device: on the host, all weights would cross to it in every step.

    Args:
        state: the tensors to begin with; they are copied. A tensor that is not finite is a mask: -inf and -inf have no
            mean.
        decay: at most this, such as 0.998.

    Attributes:
        state: the averaged tensors, by name.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], decay: float):
        self.state = {name: t.detach().clone() for name, t in state.items()}
        self.decay = decay
        masks = set(nonfinite(self.state))
        self._averaged = [name for name, t in self.state.items() if t.is_floating_point() and name not in masks]

    @torch.no_grad()
    def update(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Take in the tensors `state` of the update numbered `step`, from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        names = self._averaged
        torch._foreach_lerp_([self.state[n] for n in names], [state[n].detach() for n in names], weight)
        for name in state.keys() - set(names):
            self.state[name].copy_(state[name])
