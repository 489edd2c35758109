"""torchattacks' names for what is a setting here, and its way to save adversarial images."""

import io
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from fastadv.attacks.attributes import Attributes, TargetFunction
from fastadv.attacks.checks import BOX, box_of, check_labels, check_whole, device_of
from fastadv.attacks.losses import LOSSES
from fastadv.attacks.normalized import denormalized, normalization_of
from fastadv.attacks.verdicts import predicted
from fastadv.files import write_atomically
from fastadv.functional import to_float
from fastadv.nn.frozen import frozen

MODES: dict[object, str] = {
    False: "default",
    True: "targeted(label)",
    "random": "targeted(random)",
    "least_likely": "targeted(least-likely)",
}


class Modes(Attributes):
    """The methods of torchattacks' base class. As there, one that changes the mode prints it, unless `quiet`."""

    @property
    def supported_mode(self) -> list[str]:
        """ "default", and "targeted" where the loss has a target class."""
        no_class = not callable(self.loss) and LOSSES[self.loss].compares in ("clean", "pairs")
        return ["default"] if no_class else ["default", "targeted"]

    @property
    def attack_mode(self) -> str:
        """ "default", or "targeted(label)", "(random)", "(least-likely)" or "(custom)": what `targeted` says."""
        return "targeted(custom)" if callable(self.targeted) else MODES[self.targeted]

    def get_mode(self) -> str:
        """`attack_mode`."""
        return self.attack_mode

    def set_mode_default(self) -> None:
        """Away from the labels: targeted=False."""
        self._set_mode(False)

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """Towards the labels that are passed, which are then the targets: targeted=True."""
        self._set_mode(True, quiet)

    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Towards a class other than the label, drawn from the call's seed: targeted="random"."""
        self._set_mode("random", quiet)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Towards the class with a small logit on the clean image: targeted="least_likely", kth_min.

        Args:
            kth_min: 1 for the smallest logit, the label left out; 2 for the next.
            quiet: print nothing.

        Raises:
            TypeError: kth_min is no whole number.
            ValueError: kth_min is below 1, or the loss has no target class.
        """
        check_whole("kth_min", kth_min)
        self._set_mode("least_likely", quiet)
        self.kth_min = kth_min

    def set_mode_targeted_by_function(self, target_map_function: TargetFunction, quiet: bool = False) -> None:
        """Towards what a function returns: it becomes `targeted`.

        Args:
            target_map_function: from (images in pixels, labels) to the targets, int64 (N,).
            quiet: print nothing.

        Raises:
            TypeError: it is no callable.
            ValueError: the loss has no target class.
        """
        if not callable(target_map_function):
            raise TypeError(
                f"target_map_function must be a callable from (images, labels) to labels, got {target_map_function!r}; "
                "for labels that are the targets there is set_mode_targeted_by_label()"
            )
        self._set_mode(target_map_function, quiet)

    def _set_mode(self, targeted: bool | str | TargetFunction, quiet: bool = False) -> None:
        if targeted and "targeted" not in self.supported_mode:
            raise ValueError(f"the loss {self.loss} has no target class of yours: choose another loss first")
        self.targeted = targeted
        if not quiet:
            print(f"Attack mode is changed to '{self.attack_mode}'.")

    def set_normalization_used(self, mean: Iterable[float], std: Iterable[float]) -> None:
        """Say that the images that are passed are (pixels - mean) / std: `images_normalized`.

        Args:
            mean: one number per channel, of pixels in [0, 1].
            std: likewise.

        Raises:
            ValueError: they are out of range, or the model is `Normalized`, which normalises once more.
        """
        images_normalized = tuple(map(float, mean)), tuple(map(float, std))
        normalization_of(images_normalized, self.model)
        self.images_normalized = images_normalized

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Set `training_mode`.

        Args:
            model_training: False: "eval", whatever the others are.
            batchnorm_training: "batch_norm", which is all that model_training may mean here.
            dropout_training: must be False where model_training is True.

        Raises:
            ValueError: any other: dropout or the whole model in train mode.
        """
        if model_training and (dropout_training or not batchnorm_training):
            raise ValueError(
                "this has no training_mode: put the model's modules into the modes that they shall have, such as by "
                "model.train(), and choose training_mode='as_is'; 'batch_norm' is batch-norm alone in train mode"
            )
        self.training_mode = "batch_norm" if model_training else "eval"

    def _mapped(self, targeted: TargetFunction, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The targets that a callable `targeted` gives for pixels and labels; no labels are the model's predictions."""
        if labels is None:
            labels = predicted(self._clean_logits(x)).clamp(min=0)
        targets = targeted(to_float(x).clone(), labels.clone())  # copies, for it may write to them
        check_labels(targets, x, name="the targets that the callable `targeted` returned")
        return targets

    def save(
        self,
        data_loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
        save_path: str | Path | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: str = "float",
    ) -> tuple[float, float, float] | None:
        """Attack all batches of a loader and save the adversarial images, on the CPU and in pixels.

        `torch.load(save_path, weights_only=True)` gives a dict of "adv_inputs" and "labels", where asked for "preds"
        and "clean_inputs", and "save_type". The file is written once, at the end, and whole.

        Args:
            data_loader: of (images, labels) as a call takes them; they are brought to the model's device.
            save_path: a file; None saves nothing.
            verbose: print after each batch what `return_verbose` returns at the end.
            return_verbose: return (the share of images whose prediction is the label, in percent; the mean L2 norm, in
                pixels, of the perturbations of the others; seconds that a batch took on average).
            save_predictions: the classes of the adversarial images in eval mode, int64, -1 for none.
            save_clean_inputs: the images themselves.
            save_type: "float", or "int": uint8, pixels rounded to the nearest of 255 (torchattacks cuts them off).

        Raises:
            ValueError: save_type is another, or "int" for pixels in another box than [0, 1]; the loader is empty.
            IsADirectoryError: save_path is a folder.
        """
        if save_type not in ("float", "int"):
            raise ValueError(f"save_type must be 'float' or 'int', got {save_type!r}")
        if save_type == "int" and box_of(self.clip) != BOX:
            raise ValueError(f"save_type='int' is for pixels in [0, 1], and clip is {self.clip}: pass 'float'")
        if save_path is not None and Path(save_path).is_dir():
            raise IsADirectoryError(f"save_path must be a file, and {save_path} is a folder")
        parts: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        began = time.perf_counter()
        for batches, (images, labels) in enumerate(data_loader, 1):
            device = device_of(self.model) or images.device
            images, labels = images.to(device), labels.to(device)
            check_labels(labels, images)
            adv = self(images, labels)
            clean, pixels = self._pixels_of(images), self._pixels_of(adv)
            batch = {"labels": labels}
            if verbose or return_verbose or save_predictions:
                batch["preds"] = self._predictions(adv)
                batch["l2"] = (pixels.double() - clean.double()).flatten(1).norm(dim=1)
            if save_path is not None:
                batch["adv_inputs"] = _as_type(pixels, save_type)
            if save_path is not None and save_clean_inputs:
                batch["clean_inputs"] = _as_type(clean, save_type)
            for name, tensor in batch.items():
                parts[name].append(tensor.cpu())
            if verbose:
                accuracy, l2 = _measured(parts)
                seconds = (time.perf_counter() - began) / batches
                print(f"- batch {batches}: robust accuracy {accuracy:.2f} %, L2 {l2:.5f}, {seconds:.3f} s a batch")
        if not parts:
            raise ValueError("data_loader gave no batch: a generator that was used up, or an empty data set?")
        elapsed = (time.perf_counter() - began) / batches
        if save_path is not None:
            names = ("adv_inputs", "labels", *["preds"] * save_predictions, *["clean_inputs"] * save_clean_inputs)
            content = io.BytesIO()
            torch.save({**{name: torch.cat(parts[name]) for name in names}, "save_type": save_type}, content)
            write_atomically(save_path, content.getvalue())
        return (*_measured(parts), elapsed) if return_verbose else None

    def _pixels_of(self, images: torch.Tensor) -> torch.Tensor:
        if self._normalization is None or self.images_normalized is None:
            return to_float(images)
        return denormalized(images, self._normalization, self.clip, look=False)

    def _predictions(self, adv: torch.Tensor) -> torch.Tensor:
        """The classes of images as a call returns them."""
        with torch.inference_mode(False), frozen(self.model):
            seen = self._seen_by_model(adv) if self.images_normalized is None else adv
            return predicted(self.objective.logits(seen))


def _measured(parts: Mapping[str, list[torch.Tensor]]) -> tuple[float, float]:
    """(Percentage of images whose prediction is the label; mean L2 norm of the others' perturbations, NaN of none)."""
    wrong = torch.cat(parts["preds"]) != torch.cat(parts["labels"])
    return 100 * (1 - wrong.double().mean().item()), torch.cat(parts["l2"])[wrong].mean().item()


def _as_type(pixels: torch.Tensor, save_type: str) -> torch.Tensor:
    return (pixels.float() * 255).round().to(torch.uint8) if save_type == "int" else pixels
