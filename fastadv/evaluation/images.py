"""Keeps adversarial images: as tensors on the host, or as PNG files of eight bits, rounded so that eps still holds."""

import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.nn.functional import pad

from fastadv.attacks.verdicts import is_label, verdict
from fastadv.evaluation.queue import Verdicts
from fastadv.functional import to_float
from fastadv.ops.autograd import result_like

Logits = Callable[[torch.Tensor], torch.Tensor]  # from images (N, ...) to (N, C)


class Gallery:
    """Writes the adversarial images of one attack as PNG files, and classifies the images as they were written.

    A pixel in a PNG file is a whole number in 0 ... 255, here called a code.

    Args:
        folder: the folder for `00000.png`, ...; the number is the sample's.
        images: the clean images, (N, C, H, W) with C 1 or 3, floats in [0, 1] or uint8.
        eps: the L-inf budget in the images' units, [0, 1]; None for a budget of another kind, under which
            rounding moves no pixel further from the clean one than the attack did.
        device: the device of the adversarial images.

    Raises:
        ValueError: images of another shape.
    """

    def __init__(self, folder: Path, images: torch.Tensor, eps: float | None, device: torch.device):
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"PNG files hold images (N, 1 or 3, H, W), got the shape {tuple(images.shape)}")
        self.folder, self._shape, self._dtype, self._eps = folder, images.shape[1:], images.dtype, eps
        # 1 where the image as saved is classified correctly, 0 where it is not, -1 where it is not saved yet.
        self.right = torch.full((len(images),), -1, dtype=torch.int64, device=device)
        self.begin(self.right[:0])

    def begin(self, samples: torch.Tensor) -> None:
        """Begin a window of samples. Images that were put before and are not flushed are lost.

        Args:
            samples: int64 (n,); from now on row i is the sample `samples[i]`.
        """
        self._samples = samples
        # One row more, for images that belong to no sample.
        self._codes = torch.empty((len(samples) + 1, *self._shape), dtype=torch.uint8, device=samples.device)

    def again(self, samples: torch.Tensor) -> None:
        """Forget the images of these samples, (N,) bool: each will get another one."""
        self.right[samples] = -1

    def put(self, rows: torch.Tensor, adv: torch.Tensor, clean: torch.Tensor) -> None:
        """Keep adversarial images.

        Args:
            rows: int64 (n,), the row of each image; the row after the last one is never read.
            adv: (n, C, H, W), the adversarial images.
            clean: the clean images that they were made from.
        """
        self._codes.index_copy_(0, rows, nearest_codes(adv, clean, self._eps))

    def flush(self, verdicts: Verdicts, labels: torch.Tensor, logits: Logits) -> None:
        """Write and classify the images of samples that are decided and not written yet.

        Args:
            verdicts: the verdicts on all samples.
            labels: int64 (N,).
            logits: the model.

        Raises:
            OSError: a file cannot be written.
        """
        rows = (verdicts.todo & ~verdicts.unsettled & (self.right < 0))[self._samples].nonzero()[:, 0]
        if not len(rows):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        codes, samples = self._codes[rows], self._samples[rows]
        for sample, image in zip(samples.tolist(), codes.cpu(), strict=True):
            (self.folder / _file_of(sample)).write_bytes(png(image))
        saved = to_float(codes)
        if self._dtype.is_floating_point:
            saved = saved.to(self._dtype)
        self.right[samples] = is_label(verdict(logits(saved), labels[samples]), labels[samples]).long()

    def state(self) -> dict[str, torch.Tensor]:
        """The state for `load`."""
        return {"right": self.right}

    def facts(self) -> dict[str, float]:
        """The entry in the report: the share of images that are still classified correctly as written."""
        return {"robust_accuracy_8bit": int((self.right == 1).sum()) / len(self.right)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a state.

        Raises:
            ValueError: images that were written are not there any more.
        """
        self.right = state["right"].to(self.right.device)
        written = (self.right >= 0).nonzero()[:, 0].tolist()
        gone = [name for sample in written if not (self.folder / (name := _file_of(sample))).exists()]
        if gone:
            raise ValueError(
                f"{self.folder} lacks {len(gone)} of its {len(written)} images, such as {gone[0]}, and the state says "
                "that they are written: remove the state as well, to make them again"
            )

    @staticmethod
    def check_empty(folder: Path) -> None:
        """Refuse a folder with the images of an earlier evaluation: they would lie among those of a new one.

        Raises:
            FileExistsError: there are such images.
        """
        there = next(folder.glob("[0-9]*-*/[0-9]*.png"), None)
        if there is not None:
            raise FileExistsError(
                f"{folder} has images of an earlier evaluation, such as {there}: remove them, or choose another folder"
            )


def _file_of(sample: int) -> str:
    return f"{sample:05d}.png"


class FooledImages:
    """Keeps, on the host, those adversarial images of one attack that fool the model.

    Args:
        images: the clean images, (N, ...).
        device: the device of the adversarial images.
    """

    def __init__(self, images: torch.Tensor, device: torch.device):
        self._like = result_like(images[:0]).cpu()
        self._has = torch.zeros(len(images), dtype=torch.bool, device=device)
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.begin(torch.empty(0, dtype=torch.int64, device=device))

    def begin(self, samples: torch.Tensor) -> None:
        """As `Gallery.begin`."""
        self._samples = samples
        shape = (len(samples) + 1, *self._like.shape[1:])
        self._rows = torch.empty(shape, dtype=self._like.dtype, device=samples.device)

    def again(self, samples: torch.Tensor) -> None:
        """Nothing to forget: these samples have fooled nobody yet, so that no image of theirs is kept."""

    def put(self, rows: torch.Tensor, adv: torch.Tensor, clean: torch.Tensor) -> None:
        """As `Gallery.put`."""
        self._rows.index_copy_(0, rows, adv)

    def flush(self, verdicts: Verdicts, labels: torch.Tensor, logits: Logits) -> None:
        """Copy the new images that fool the model to the host; arguments as of `Gallery.flush`."""
        rows = (verdicts.fooled & ~self._has)[self._samples].nonzero()[:, 0]
        self._has[self._samples[rows]] = True
        self._parts.append((self._samples[rows].cpu(), self._rows[rows].cpu()))

    def state(self) -> dict[str, torch.Tensor]:
        """The state for `load`: "samples", int64 (M,) in any order, and "images" (M, ...)."""
        samples, images = ([each[i] for each in self._parts] for i in (0, 1))
        none = torch.empty(0, dtype=torch.int64)
        return {"samples": torch.cat([none, *samples]), "images": torch.cat([self._like, *images])}

    def facts(self) -> dict[str, float]:
        """The entries in the report: none."""
        return {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        self._parts = [(state["samples"], state["images"])]
        self._has[state["samples"].to(self._has.device)] = True


def nearest_codes(adv: torch.Tensor, clean: torch.Tensor, eps: float | None) -> torch.Tensor:
    """Round adversarial images to codes 0 ... 255 that stay within eps of the clean images.

    Each pixel gets the code c whose c/255 is nearest to `adv`, of the codes within eps of `clean`. A clean pixel of
    10/255 under eps = 1.5/255 may become 9, 10 or 11. Where no code is within eps, the pixel gets the code nearest to
    the clean pixel. A clean pixel that differs from a code by the rounding of its dtype alone counts as that code.

    Args:
        adv: floats in [0, 1].
        clean: floats in [0, 1] or uint8, of the same shape.
        eps: the radius of the ball, in the images' units, [0, 1]; None means for each pixel its own distance between
            `adv` and `clean`.

    Returns:
        uint8, of the same shape.
    """
    adv = adv.double() * 255
    if clean.dtype == torch.uint8:
        clean = clean.double()
    else:
        rounding = 255 * torch.finfo(clean.dtype).eps / 2
        clean = clean.double() * 255
        clean = torch.where((clean - clean.round()).abs() <= rounding, clean.round(), clean)
    radius = (adv - clean).abs() if eps is None else round(255 * eps, 9)
    lowest, highest = (clean - radius).ceil(), (clean + radius).floor()
    codes = adv.round().maximum(lowest).minimum(highest)
    return torch.where(lowest > highest, clean.round(), codes).clamp(0, 255).to(torch.uint8)


def png(image: torch.Tensor) -> bytes:
    """The bytes of a PNG file of `image`, uint8 (1 or 3, H, W)."""
    channels, height, width = image.shape
    # Each row of pixels begins with the number of its filter; 0 means none.
    rows = pad(image.permute(1, 2, 0).reshape(height, -1), (1, 0)).contiguous().numpy().tobytes()
    header = struct.pack(">2I5B", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
