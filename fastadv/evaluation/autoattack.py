"""AutoAttack, called as its authors' program is."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastadv.attacks import Ensemble
from fastadv.attacks.verdicts import verdict
from fastadv.evaluation.adversaries import Adversary, adversaries
from fastadv.evaluation.ensemble import Trial
from fastadv.evaluation.images import FooledImages
from fastadv.evaluation.robustness import check_counts, judged
from fastadv.evaluation.run import Report, Run
from fastadv.evaluation.samples import collected
from fastadv.functional import new_seed, to_float
from fastadv.nn.logits import AnyModel

Returned = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # images, and with return_labels predictions


class AutoAttack(Ensemble):
    """AutoAttack: Croce and Hein 2020 (arXiv 2003.01690), the yardstick of published robust accuracies.

    Four attacks follow each other, each on the samples that those before it left: Auto-PGD on cross-entropy, on the
    targeted DLR loss, FAB-T, and Square. Where the model has fewer other classes than n_target_classes, all of them are
    targets. A sample leaves at its first misclassified image, of whatever class.

    Args:
        model: any callable from images to logits (N, C), C from 2 on, in eval mode while it is attacked.
        norm: "Linf" or "L2".
        eps: radius of the ball, in the images' units, [0, 1].
        version: "standard"; "plus", with more attacks and restarts; "rand" for a model that answers at random, whose
            gradients and predictions are then means of 20 draws; or "custom".
        attacks_to_run: of a custom version: "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square", in any order.
        seed: sample i draws from `sample_seeds(seed, i, run)`; None draws a seed.
        device: where to attack; None means the model's.
        verbose: print the accuracy after each attack.
        log_path: a file that gets these lines too, at its end.
        options: of every attack, see `Attack`: autocast, memory_format, compile, graph. The verdict is that of the
            model under them.

    Attributes:
        apgd: settings of "apgd-ce" and "apgd-dlr", which may be assigned before a run, as those of the other attacks:
            eps, n_restarts, n_iter, rho and eot_iter.
        apgd_targeted: settings of "apgd-t": the same, and n_target_classes.
        fab: settings of "fab" and "fab-t": eps, n_restarts, n_iter, n_target_classes, alpha_max, eta and beta.
        square: settings of "square": eps, n_restarts, n_queries and p_init.
        attacks_to_run: names of the attacks in the order in which they run; may be assigned too.
        report: what `evaluate` returns, of the last run.

    Raises:
        TypeError: the options have another one.
        ValueError: norm is "L1", a version is unknown, or attacks are chosen for one that is not "custom".
    """

    __slots__ = ("device", "log_path", "report", "seed", "verbose")

    def __init__(
        self,
        model: AnyModel,
        norm: str = "Linf",
        eps: float = 8 / 255,
        *,
        version: str = "standard",
        attacks_to_run: Sequence[str] = (),
        seed: int | None = 0,
        device: torch.device | str | None = None,
        verbose: bool = True,
        log_path: str | Path | None = None,
        is_tf_model: bool = False,
        **options: Any,
    ):
        if is_tf_model:
            raise ValueError("a TensorFlow model has no PyTorch gradient: attack a PyTorch version of it")
        super().__init__(model, norm, eps, version=version, attacks_to_run=attacks_to_run, **options)
        self.seed, self.device, self.verbose, self.log_path = seed, device, verbose, log_path
        self.report: Report | None = None

    def run_standard_evaluation(
        self,
        x_orig: torch.Tensor,
        y_orig: torch.Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Returned:
        """Adversarial images of the samples that are fooled, and the others as they are.

        Args:
            x_orig: images (N, ...) in [0, 1], floats or uint8.
            y_orig: labels int64 (N,).
            bs: images under attack at a time.
            return_labels: give the model's predictions for what is returned, too.
            state_path: a file that keeps what is finished, written every few seconds; a run that was cut goes on from
                it, and returns all images.

        Returns:
            A float tensor like `x_orig` on its device; with `return_labels` a pair of it and int64 (N,), -1 where the
            model gives no prediction.

        Raises:
            TypeError: as `evaluate`.
            ValueError: as `evaluate`; also where nothing is to run, or a state is to be kept of a seed that is drawn.
        """
        images, labels, run, trials = self._run(x_orig, y_orig, bs, state_path, ensemble=True)
        return _returned(images, labels, run, trials, return_labels)

    def run_standard_evaluation_individual(
        self, x_orig: torch.Tensor, y_orig: torch.Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Returned]:
        """Each attack by itself, on all samples.

        Args:
            x_orig: images (N, ...) in [0, 1], floats or uint8.
            y_orig: labels int64 (N,).
            bs: images under attack at a time.
            return_labels: give the model's predictions for what is returned, too.

        Returns:
            For each attack's name what `run_standard_evaluation` returns.

        Raises:
            TypeError, ValueError: as `run_standard_evaluation`.
        """
        images, labels, run, trials = self._run(x_orig, y_orig, bs, None, ensemble=False)
        return {t.adversary.name: _returned(images, labels, run, [t], return_labels) for t in trials}

    def _run(
        self, x: torch.Tensor, y: torch.Tensor, bs: int, state_path: str | Path | None, ensemble: bool
    ) -> tuple[torch.Tensor, torch.Tensor, Run, list[Trial]]:
        against = adversaries(self.model, self)
        if state_path is not None and self.seed is None:
            raise ValueError("the run that goes on from a state must have its seed: give AutoAttack(seed=), an int")
        seed = int(new_seed("cpu")) if self.seed is None else self.seed
        check_counts(bs=bs, seed=seed)
        images, labels = collected((x, y), self.model, self.device)
        settings = {"iterate": "any", "ensemble": ensemble, "slots": min(int(bs), len(images)), "seed": int(seed)}
        # Also to see that the log can be written, before there is anything to lose.
        self._log(f"using {', '.join(each.title for each in against)}")
        begun = time.perf_counter()

        def after_each(run: Run, ended: Sequence[Trial]) -> None:
            accuracy = float(run.left(ended if ensemble else ended[-1:]).float().mean())
            if not ended:
                self._log(f"initial accuracy: {accuracy:.2%}")
            else:
                after = f"{'after' if ensemble else 'under'} {ended[-1].adversary.name.upper()}"
                self._log(f"robust accuracy {after}: {accuracy:.2%} (total time {time.perf_counter() - begun:.1f} s)")

        def gallery(number: int, adversary: Adversary) -> FooledImages:
            return FooledImages(images, labels.device)

        self.report, run, trials = judged(
            self.model, images, labels, against, settings, None, state_path, gallery, after_each=after_each
        )
        return images, labels, run, trials

    def _log(self, line: str) -> None:
        if self.verbose:
            print(line, flush=True)
        if self.log_path is not None:
            path = Path(self.log_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(line + "\n")


def _returned(
    images: torch.Tensor, labels: torch.Tensor, run: Run, trials: Sequence[Trial], with_labels: bool
) -> Returned:
    """For each sample the image of the first of `trials` that fools it, and what the model says of that image."""
    adv, said = to_float(images).clone(), verdict(run.clean, labels).cpu()
    for gallery, verdicts in [(trial.gallery, trial.verdicts) for trial in trials if trial.gallery is not None]:
        state = gallery.state()
        samples = state["samples"]
        adv[samples.to(adv.device)] = state["images"].to(adv)
        said[samples] = verdicts.said.cpu()[samples]
    return (adv, said.to(adv.device)) if with_labels else adv
