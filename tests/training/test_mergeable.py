"""LoRA and IA3 refuse, before anything trains, layers whose merged weights would not compute what was trained."""

import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, SHAPE, logits, made
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fastadv.training.methods import trainable
