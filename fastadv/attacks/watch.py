"""Problems that an attack counts on the device while it runs, and tells at the end of a call in one read."""

from functools import reduce
from operator import add

import torch

from fastadv._warnings import warn

# Of the first batches that have 8 images or more together, a warning says where a tenth of the gradients or more are
# zero.
WATCHED, ALARMING = 8, 0.1
# {what is counted in a batch after the first: what is wrong with it}
PROBLEMS = {
    "labels": "{count} labels name no class, they must be in [0, {classes})",
    "start": "some of x_init are NaN",
    "images": "images of this batch are beyond [{lo:g}, {hi:g}], in which those of the first were",
    "eps": "{count} budgets are negative, not finite or beyond the images' scale (8/255, not 8)",
    "soft labels": "{count} soft labels are no probabilities, which sum to 1",
    "signs": "{count} labels are neither 0 nor 1",
    "reach": "{count} images leave eps or [{lo:g}, {hi:g}], to which the class of the attack must project them",
}


class Watch:
    """What is known of the batches so far, and counted of the one that is attacked.

    Attributes:
        first: whether no batch came yet. Values are looked at in the first one alone, because that waits for the
            device.
        losses: those of this call, (steps, N) of each run.
    """

    def __init__(self) -> None:
        self.first = True
        self.losses: list[torch.Tensor] = []
        self._watched = self._still = 0  # images whose first gradient was looked at; those of them without one
        self._counts: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        """Forget the counts of the call before."""
        self.losses, self._counts = [], {}

    def looks(self, count: int, loss: object) -> bool:
        """Whether the first gradients of a batch of `count` images are to be looked at."""
        # The gradient of dlr is zero where the label's logit is the third, as it may be of any single image.
        return self._watched < WATCHED and count >= (WATCHED if loss == "dlr" else 1)

    def tally(self, name: str, sound: torch.Tensor) -> None:
        """Count on the device what is not sound, bool; `name` is one of `PROBLEMS`."""
        self._counts[name] = (~sound).sum()

    def report(self, still: torch.Tensor | None, classes: int | None, box: tuple[float, float], least: float) -> None:
        """Warn of what was counted, in one read: what small models wait for is launches.

        Args:
            still: which images have a first gradient that no step can follow, (N,) bool; None where nobody looked.
            classes: the number of classes.
            box: (lo, hi) of the images.
            least: the length up to which a gradient counts as none.
        """
        losses, self.losses = self.losses, []
        if losses[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return
        # x - x is 0 where x is finite, else NaN.
        counts = {"losses": reduce(add, ((each - each != 0).sum() for each in losses)), **self._counts}
        if still is not None:
            still = still[: losses[0].shape[1]]  # without what fills up a batch
            counts["still"] = still.sum()
        values = torch.stack(list(counts.values())).tolist() if len(counts) > 1 else [int(counts["losses"])]
        told = dict(zip(counts, values, strict=True))
        if told["losses"]:
            warn(
                f"{told['losses']} losses were not finite; where a gradient is not, its sample takes no step. Is the "
                "model in a half precision that its logits leave?"
            )
        for name, problem in PROBLEMS.items():
            if told.get(name):
                said = problem.format(count=told[name], classes=classes, lo=box[0], hi=box[1])
                warn(f"{said}: their samples were not attacked as they should be")
        if still is not None and not told.get("labels"):  # labels that name no class have no gradient
            self._watched += len(still)
            self._still += told["still"]
            self._warn_of_still(least)

    def _warn_of_still(self, least: float) -> None:
        if self._watched >= WATCHED and self._still >= ALARMING * self._watched:
            warn(
                f"the gradient is exactly zero{f', or at most {least:g} long,' if least else ''} for {self._still} of "
                f"{self._watched} images at the first step (NaN counts as zero), and no attack that follows it gets "
                "anywhere there: does the model round, saturate, return probabilities, or take the root of 0? Where it "
                "is only sure, loss='margin' has a gradient, and cross-entropy may have one in float64"
            )
