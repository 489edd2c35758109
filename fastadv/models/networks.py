"""The package's own networks, for small images."""

from collections.abc import Callable, Sequence

import torch
from torch import nn


def mlp(shape: Sequence[int], classes: int) -> nn.Module:
    """Three linear layers, two of them with 256 units, for images (N, *shape) such as the digits of 8x8."""
    pixels = torch.Size(shape).numel()
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def conv(shape: Sequence[int], classes: int) -> nn.Module:
    """Three convolutions with batch-norm, and one dropout, for images (N, *shape) of 16x16 or more."""
    channels, layers = shape[0], []
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(channels, classes)]
    return nn.Sequential(*layers, *head)


def resnet(shape: Sequence[int], classes: int, widths: Sequence[int] = (64, 64, 128), blocks: int = 2) -> nn.Module:
    """A small `ResNet`, for images (N, *shape) of about 32x32."""
    return ResNet(shape[0], classes, widths, blocks)


OWN: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "conv": conv, "resnet": resnet}


class ResNet(nn.Module):
    """The residual network of He et al. 2016 (arXiv 1512.03385), with SiLU in place of ReLU.

    SiLU is smooth, so the loss has no kinks at which the gradient, and an attack along it, would mislead.

    The stem halves the resolution, and each later width halves it again: with widths (64, 64, 128) an image of 32x32
    becomes 16x16, 8x8 and 4x4. Images (N, channels, H, W) become logits (N, classes).

    Args:
        channels: the channels of an image.
        classes: the number of logits.
        widths: the channels of the stem, then of each group of `blocks` residual blocks.
        blocks: the number of residual blocks of each width.

    Raises:
        ValueError: fewer than two widths, or no blocks.
    """

    fastadv_head = "head"
    fastadv_blocks = "blocks"

    def __init__(self, channels: int, classes: int, widths: Sequence[int], blocks: int):
        super().__init__()
        if len(widths) < 2 or blocks < 1:
            raise ValueError(f"a resnet needs two widths and one block at least, got {tuple(widths)} and {blocks}")
        self.stem = nn.Sequential(*_normed(channels, widths[0], 3, stride=2), nn.SiLU())
        self.blocks = nn.Sequential()
        width = widths[0]
        for out in widths[1:]:
            for i in range(blocks):
                self.blocks.append(Block(width, out, stride=1 if i else 2))
                width = out
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


class Block(nn.Module):
    """Two 3x3 convolutions, and a skip around them; the skip is a 1x1 convolution where the shape changes."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(*_normed(width, out, 3, stride), nn.SiLU(), *_normed(out, out, 3))
        self.skip = nn.Identity() if width == out and stride == 1 else nn.Sequential(*_normed(width, out, 1, stride))
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.act(self.body(x) + self.skip(x))
        return out


def _normed(width: int, out: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(width, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out)
