"""Trains with FGSM from scratch, which is known to collapse, and fine-tunes the same network for comparison.

    python benchmarks/training/scratch.py DATA/cifar10 scratch                                     # zero start
    python benchmarks/training/scratch.py DATA/cifar10 scratch-slow --lr 0.03                      # does not collapse
    python benchmarks/training/scratch.py DATA/cifar100 backbone --attack nfgsm --eps 8 --epochs 30  # a robust backbone
    python benchmarks/training/scratch.py DATA/cifar10 tuned --backbone backbone/weights.pt --lr 0.03

The settings are those of Wong et al. 2020 (arXiv 2001.03994): all training images, crops and flips, SGD with a learning
rate that rises and falls once, and the attack in train mode. Only the network differs: a residual network with ReLU
that a CPU can train. OUT/result.json has a record for each epoch, with the robust accuracy on the monitor's images
under the training attack and under PGD-5. It also has the accuracies of the last epoch's weights on test images. An
interrupted run resumes with the same command.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import facts

from fastadv.attacks import create_attack
from fastadv.data import load
from fastadv.evaluation import evaluate
from fastadv.models.networks import resnet
from fastadv.training import Trainer

PROBE, TEST = 512, 512
KEPT = "attack", "eps", "robust_accuracy", "settings"  # what is kept of an attack's report
RISE = 0.4  # share of the steps in which the learning rate rises; then it falls as half a cosine


def network(classes, widths):
    """The residual network of fastadv with ReLU in the place of SiLU."""
    model = resnet((3, 32, 32), classes, widths)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.SiLU):
                setattr(module, name, nn.ReLU())
    return model


def start_from(model, path):
    """Take a backbone's weights; the head, which is for other classes, stays random."""
    weights = {name: tensor for name, tensor in torch.load(path).items() if not name.startswith("head.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(not name.startswith("head.") for name in missing):
        raise ValueError(f"{path} has weights of another network: {missing[:3]}, {unexpected[:3]}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="a folder of parquet files, images of 32x32")
    parser.add_argument("out", type=Path)
    parser.add_argument("--attack", choices=("fgsm", "nfgsm"), default="fgsm")
    parser.add_argument("--eps", type=float, default=16, help="in 1/255 (16)")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=0.3, help="peak learning rate (0.3)")
    parser.add_argument("--widths", default="64,128,256", help="channels of the stem and of the groups of two blocks")
    parser.add_argument("--backbone", type=Path, help="weights.pt of another run to start from")
    parser.add_argument("--limit", type=int, help="training images, if not all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    data = load(args.data, validation=0)
    model = network(len(data.classes), [int(width) for width in args.widths.split(",")])
    if args.backbone:
        start_from(model, args.backbone)
    eps, batch = args.eps / 255, 128
    train = data.x_train[: args.limit], data.y_train[: args.limit]
    settings = {"epochs": args.epochs, "batch_size": batch, "optimizer": "sgd", "lr": args.lr, "weight_decay": 5e-4}
    settings |= {"warmup": int(RISE * args.epochs * -(-len(train[1]) // batch)), "augment": True}
    settings |= {"probe": PROBE, "seed": args.seed, "channels_last": True}
    attack = create_attack(args.attack, model, eps, training_mode="as_is")
    records = Trainer(model, eps, attack=attack, folder=args.out, resume=True, device="cpu", **settings).fit(train)
    torch.save(model.state_dict(), args.out / "weights.pt")
    test = data.x_test[:TEST], data.y_test[:TEST]
    report = evaluate(model, test, attacks=("fgsm", "pgd-10", "pma"), eps=eps, progress=False)
    result = {
        "part": "scratch",
        "environment": facts(),
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    result |= {"parameters": sum(p.numel() for p in model.parameters()), "settings": settings, "records": records}
    result |= {"test_images": TEST, "clean_accuracy": report["clean_accuracy"], "warnings": report["warnings"]}
    result["attacks"] = [{name: found[name] for name in KEPT} for found in report["attacks"]]
    (args.out / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
