"""PGD with ten restarts on a trained network, by `evaluate`, by torchattacks, and by a loop that drops no image.

A fooled image can be dropped, and how many are fooled depends on the network. So a network is trained first (FGSM-RS,
about ten seconds), and its accuracy is recorded with the result. All contenders get the same images, budget, steps and
restarts. `evaluate` refills the slot of a fooled image at once. torchattacks gets one batch after the other, and drops
fooled images between restarts.
"""

import time

import networks
import pytest
import real_images
import timing
import torch
from cases import DEVICE
from contenders import torchattacks

from fastadv.attacks import PGD
from fastadv.evaluation import evaluate
from fastadv.functional import to_float
from fastadv.training import Trainer

pytestmark = pytest.mark.benchmark(timer=timing.clock)

BATCH = 128  # the batch size of the peers, and the number of our slots
# More images stay robust than there are slots. Otherwise empty slots of a GPU take further restarts, some in vain.
IMAGES = 640
ROUNDS = 2  # at most, because a round has thousands of steps


class Seen:
    """Counts the images whose gradient is computed."""

    def __init__(self, model):
        self.images, self._model = 0, model

    def __enter__(self):
        self._hook = self._model.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *error):
        self._hook.remove()

    def _count(self, model, inputs):
        self.images += len(inputs[0]) * inputs[0].requires_grad


def trained(quick):
    """(data set's name, eps, network, test images, labels)."""
    name, eps, train, test = real_images.found(*((64, 16) if quick else (6_000, IMAGES)))
    torch.manual_seed(0)
    model = networks.strided().to(DEVICE)
    epochs, warmup = (1, 0) if quick else (4, 20)
    train, test = ([t.to(DEVICE) for t in part] for part in (train, test))
    Trainer(model, eps, attack="fgsm-rs", epochs=epochs, lr=1e-3, warmup=warmup, progress=False).fit(train, test)
    return name, eps, model.eval(), to_float(test[0]), test[1]


def in_batches(right, images, labels):
    """The robust accuracy; the function `right` tells which images of a batch are not fooled."""
    batches = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    return float(torch.cat([right(x, y) for x, y in batches]).float().mean())


def contenders(model, eps, steps, restarts):
    """{name: a function from (images, labels) to the robust accuracy}."""
    settings = {"eps": eps, "alpha": eps / 4, "steps": steps}
    ours, one = (PGD(model, **settings, restarts=n) for n in (restarts, 1))

    def judged(adv, labels):
        with torch.no_grad():
            return model(adv).argmax(1) == labels

    def slots(images, labels, iterate="any", attack=ours):
        report = evaluate(model, (images, labels), [attack], iterate=iterate, batch_size=BATCH, progress=False)
        return report["attacks"][0]["robust_accuracy"]

    def nothing_dropped(x, y):
        return torch.stack([judged(one(x, y), y) for _ in range(restarts)]).all(0)

    made = {
        "fastadv": slots,
        "nothing dropped": lambda images, labels: in_batches(nothing_dropped, images, labels),
    }
    if DEVICE.type == "cpu":  # not on a GPU, whose time is short
        made["fastadv last"] = lambda images, labels: slots(images, labels, "last")
    else:
        captured = PGD(model, **settings, restarts=restarts, graph=True)
        made["fastadv graph"] = lambda images, labels: slots(images, labels, attack=captured)
    if torchattacks:
        theirs = torchattacks.MultiAttack([torchattacks.PGD(model, **settings) for _ in range(restarts)])
        made["torchattacks"] = lambda images, labels: in_batches(lambda x, y: judged(theirs(x, y), y), images, labels)
    return made


def test_evaluation(measure):
    name, eps, model, images, labels = trained(measure.quick)
    steps, restarts = (3, 2) if measure.quick else (50, 10)
    accuracy, gradients = {}, {}

    def reading(name, call):
        def read():
            start = time.perf_counter()
            with Seen(model) as seen:
                accuracy[name] = call(images, labels)
            gradients[name] = seen.images
            return time.perf_counter() - start

        return read

    made = contenders(model, eps, steps, restarts)
    readings = {name: reading(name, call) for name, call in made.items()}
    # There are no warm-up rounds, because a round is long.
    seconds = timing.run(measure.benchmark, readings, "fastadv", min(ROUNDS, measure.min_rounds), max_time=0)
    median = timing.medians(seconds)
    with torch.no_grad():
        clean = float((model(images).argmax(1) == labels).float().mean())
    measure.record(
        kind="evaluation",
        attack=f"PGD-{steps}-{restarts}",
        data=name,
        eps=eps,
        images=len(images),
        batch=BATCH,
        backend=DEVICE.type,
        clean_accuracy=clean,
        robust_accuracy=accuracy,
        gradients=gradients,
        median_seconds=median,
        relative_iqr=timing.spreads(seconds),
        speedup_over={name: value / median["fastadv"] for name, value in median.items()},
    )
