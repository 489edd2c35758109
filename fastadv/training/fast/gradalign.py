"""GradAlign: FGSM with a penalty that aligns the gradients at neighbouring points."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastadv.attacks.samplewise import cosines_of
from fastadv.functional import fgsm_step, random_init
from fastadv.nn.autocast import own_autocast
from fastadv.nn.frozen import flags_kept
from fastadv.nn.logits import at_least_float32, find_logits
from fastadv.training.fast.base import FastMethod


class GradAlign(FastMethod):
    """FGSM from the image itself, with a penalty where the gradient turns within the ball.

    The penalty is weight * (1 - c), where c is the mean cosine of the gradients g(x) and g(x + U(-eps, eps)). The
    second point is clamped to [0, 1], and the first gradient is detached. g is the gradient of cross-entropy with the
    model in eval mode, as in the attack. Samples with a zero gradient at either point are left out; with
    grad_accum_steps the mean is that of each part, which these samples make another one. The default weight
    grows with eps as in the paper for CIFAR-10; at 8/255 it is 0.2. The second derivative is not compiled. Attention is
    computed by plain matrix products, because PyTorch's faster kernels have no second derivative.

    Source: Andriushchenko and Flammarion 2020 (arXiv 2007.02617).
    """

    OPTIONS = ("penalty",)

    def __init__(self, model: nn.Module, eps: float, *, penalty: float | None = None, **options: Any):
        super().__init__(model, eps, penalty=penalty, **options)
        if penalty is None:
            self.weight = math.exp(255 * eps * math.log(10) / 8 + math.log(0.02))

    def attacked(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        seeds: torch.Tensor,
        rows: torch.Tensor | None = None,
        moves: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        self._gradient = self.gradient_at(images, labels)
        self._start = random_init(images, self.eps, seed=seeds)
        return (fgsm_step(images, self._gradient, self.eps),)

    def learn(self, labels: torch.Tensor, parameters: Sequence[torch.Tensor], scale: float) -> torch.Tensor | float:
        with flags_kept(self.model):
            for module in self.model.modules():
                module.training = False
            there = self._gradient_with_graph(self._start.requires_grad_(), labels)
        a, b = (g.flatten(1).double() for g in (self._gradient, there))
        # Zero gradients are left out: the derivative of a norm is not finite at 0.
        both = ((a != 0).any(1) & (b != 0).any(1)).nonzero()[:, 0]
        aligned = cosines_of(a[both], b[both]).sum() / max(len(both), 1)
        penalty = scale * len(labels) * self.weight * (1 - aligned)
        if len(both):
            penalty.backward(inputs=[parameter for parameter in parameters if parameter.requires_grad])
        return penalty.detach() if len(both) else 0.0

    def _gradient_with_graph(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The gradient of cross-entropy up to a positive factor of each sample, which no cosine sees.

        Cross-entropy is softplus(l), l the log-sum-exp of the other logits less the true one. The gradient of l does
        not vanish where the model is certain; that of cross-entropy does, and its norm's inverse then overflows in the
        second derivative.
        """
        with own_autocast(images.device, self.attack.autocast), sdpa_kernel(SDPBackend.MATH):
            logits = at_least_float32(find_logits(self.model(images.clone()), len(images)))
        true = F.one_hot(labels, logits.shape[1]).bool()
        losses = logits.masked_fill(true, -math.inf).logsumexp(1) - logits[true]
        return torch.autograd.grad(losses.sum(), images, create_graph=True)[0]
