"""The networks that benchmarks attack and train, for 32x32 images and ten classes: small ones of the usual kinds."""

import torch
from cases import DEVICE
from torch import nn


def conv():
    """Three convolutions."""
    widths = (3, 32, 64, 128)
    layers = [
        layer
        for i in range(3)
        for layer in (nn.Conv2d(widths[i], widths[i + 1], 3, 1 + (i > 0), 1), nn.BatchNorm2d(widths[i + 1]), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def strided():
    """Three strided convolutions and a linear layer on all pixels; it can be trained adversarially within a minute."""
    widths = (3, 64, 128, 256)
    layers = [
        layer
        for i in range(3)
        for layer in (nn.Conv2d(widths[i], widths[i + 1], 3, 2, 1), nn.BatchNorm2d(widths[i + 1]), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, 10))


class Block(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.skip = nn.Identity()
        if stride != 1 or inside != outside:
            self.skip = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        return torch.relu(self.body(x) + self.skip(x))


def resnet18():
    """ResNet-18 in its form for CIFAR, without early pooling (He et al. 2016, arXiv 1512.03385)."""
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    plan = ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2))
    blocks = [Block(*widths) for widths in (*plan, (512, 512, 1))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class ViT(nn.Module):
    """A vision transformer with patches of 4x4 pixels (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

    def __init__(self, width=192, depth=6, heads=3):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.blocks = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp(self.norm2(x))


# name -> (network, batch size)
NETWORKS = {"conv": (conv, 128), "resnet18": (resnet18, 32), "vit": (ViT, 32)}


def example(network, quick):
    """(a new model, images, labels)."""
    make, n = NETWORKS[network]
    n = 4 if quick else n
    torch.manual_seed(0)
    model = make().to(DEVICE).eval()
    return model, torch.rand(n, 3, 32, 32, device=DEVICE), torch.randint(0, 10, (n,), device=DEVICE)
