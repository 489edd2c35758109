"""The host time of one eager PGD step on a tiny model, beside the body of torchattacks' loop.

The times are CPU times of this thread, the least of many. The exit status is 1 if fastadv is slower. Two more times are
printed: without the mask of finite losses and its count, and also without the checks of torch.autograd.grad.
"""

import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Variable

from fastadv import pgd_step_
from fastadv.attacks import PGD
from fastadv.attacks.engine import Engine

torch.set_num_threads(1)
torch.manual_seed(0)
x, y = torch.rand(2, 3, 4, 4), torch.randint(0, 5, (2,))
net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval().requires_grad_(False)
alpha, eps, ones, kept = 2 / 255, 8 / 255, torch.ones(2), []
adv, theirs = x.clone(), [x.clone()]
attack = PGD(net, steps=1)
engine = Engine(attack, attack.slots(x, y, eps, 3))


def lean(grad):
    with torch.enable_grad():
        leaf = adv.detach().requires_grad_()
        losses = F.cross_entropy(net(leaf), y, reduction="none")
        (g,) = grad(losses, leaf)
    kept.append(losses.detach())  # they are counted once, after the last step
    pgd_step_(adv, g, x, alpha=alpha, eps=eps)


def through_engine(losses, leaf):
    run = Variable._execution_engine.run_backward
    return run((losses,), (ones,), False, False, (leaf,), allow_unreachable=False, accumulate_grad=False)


def torchattacks_body():  # torchattacks 3.5.1, attacks/pgd.py
    a = theirs[0]
    with torch.enable_grad():
        a.requires_grad = True
        cost = nn.CrossEntropyLoss()(net(a), y)
        grad = torch.autograd.grad(cost, a, retain_graph=False, create_graph=False)[0]
        a = a.detach() + alpha * grad.sign()
        theirs[0] = torch.clamp(x + torch.clamp(a - x, min=-eps, max=eps), min=0, max=1).detach()


cases = {
    "torchattacks' loop body": torchattacks_body,
    "fastadv, engine.iterate()": engine.iterate,
    "without mask and count": lambda: lean(lambda losses, leaf: torch.autograd.grad(losses, leaf, ones)),
    "and the engine directly": lambda: lean(through_engine),
}
best = dict.fromkeys(cases, float("inf"))
with torch.no_grad():
    engine.start()
    for _ in range(60):
        for name, case in cases.items():
            kept.clear()
            begin = time.thread_time()
            for _ in range(50):
                case()
            best[name] = min(best[name], (time.thread_time() - begin) / 50)
base = best["torchattacks' loop body"]
for name, seconds in best.items():
    print(f"{name:28}{seconds * 1e6:7.1f} us   torchattacks over it {base / seconds:.2f}")
sys.exit(best["fastadv, engine.iterate()"] > base)
