"""Augmentation: the random crop and flip of the CIFAR recipes, on the images' own device."""

import torch

from fastadv.ops.generator import as_int64
from fastadv.training.settings import of_kind


class Augment:
    """Random crop after padding with zeros, then a horizontal flip with probability one half.

    The crop and the flip of a sample depend on its seed alone, and not on its batch, its device or the number of
    processes. `fastadv.sample_seeds` makes a seed for each sample and epoch.

    Args:
        crop: pixels of padding on every side; 0 leaves the images where they are.
        flip: whether to flip. Leave it out where a mirror image is another class, as with digits.

    Raises:
        TypeError: flip is not True or False.
        ValueError: crop is no integer of at least 0.

    Source: He et al. 2016, "Deep residual learning for image recognition", section 4.2.
    """

    def __init__(self, crop: int = 4, flip: bool = True):
        if isinstance(crop, bool) or not isinstance(crop, int) or crop < 0:
            raise ValueError(f"crop must be an integer of at least 0, in pixels, got {crop!r}")
        self.crop, self.flip = crop, of_kind("flip", flip, bool)

    def __call__(self, images: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """The cropped and flipped images.

        Args:
            images: (N, C, H, W), uint8 or float.
            seeds: int64 (N,), on the images' device.

        Returns:
            New images of the same shape and dtype: channels-last if the given ones are, else contiguous.

        Raises:
            TypeError: seeds are not int64.
            ValueError: a wrong shape or device, or crop is not less than H and W.
        """
        self._check(images, seeds)
        crops = moved(images, *self.sources(seeds, *images.shape[2:]), torch.zeros_like(images))
        return crops.contiguous(memory_format=_format(images))

    def sources(self, seeds: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For each row and column of the result, the row and the column of the image that it shows.

        An image with 4 columns and a crop of 1 that shifts it by one column, without and with a flip:

            column of the result      0    1    2    3
            shows column              1    2    3    4      4 is beyond the image: zeros
            flipped, it shows         4    3    2    1

        Args:
            seeds: int64 (N,).
            height: the height of an image.
            width: the width of an image.

        Returns:
            int64 (N, height) and (N, width). A row below 0, or not below `height`, is beyond the image; likewise a
            column.
        """
        top, left, flipped = self._drawn(seeds)
        rows, columns = (torch.arange(length, device=seeds.device).expand(len(seeds), -1) for length in (height, width))
        return rows + top, torch.where(flipped, width - 1 - columns, columns) + left

    def targets(self, seeds: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of `sources`: for each row and column of the image, the row and the column of the result."""
        top, left, flipped = self._drawn(seeds)
        rows, columns = (torch.arange(length, device=seeds.device).expand(len(seeds), -1) for length in (height, width))
        return rows - top, torch.where(flipped, width - 1 - (columns - left), columns - left)

    def _drawn(self, seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(rows by which each image is shifted, columns, whether it is flipped), (N, 1) each."""
        bits = _mixed(seeds)[:, None]
        offsets = 2 * self.crop + 1
        # 31 bits for each offset, so that no offset is likelier than another by more than one in 10^8.
        top, left = (bits & 0x7FFFFFFF) % offsets, ((bits >> 31) & 0x7FFFFFFF) % offsets
        return top - self.crop, left - self.crop, (bits < 0) & self.flip

    def _check(self, images: torch.Tensor, seeds: torch.Tensor) -> None:
        if images.dim() != 4:
            raise ValueError(f"images must be (N, C, H, W), got the shape {tuple(images.shape)}")
        if seeds.dtype != torch.int64:
            raise TypeError(f"seeds must be int64, got {seeds.dtype}")
        if seeds.shape != images.shape[:1] or seeds.device != images.device:
            raise ValueError(
                f"seeds must be one for each of the {len(images)} images on {images.device}, "
                f"got the shape {tuple(seeds.shape)} on {seeds.device}"
            )
        if self.crop >= min(images.shape[2:]):
            raise ValueError(f"crop must be less than the images' height and width, got {self.crop} for {images.shape}")

    def __repr__(self) -> str:
        return f"Augment(crop={self.crop}, flip={self.flip})"


def moved(pictures: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, elsewhere: torch.Tensor) -> torch.Tensor:
    """The pixels of `pictures` in these rows and columns.

    Args:
        pictures: (N, C, H, W).
        rows: int64 (N, H), from `Augment.sources` or `Augment.targets`.
        columns: int64 (N, W), likewise.
        elsewhere: (N, C, H, W), the pixels to take where a row or a column is beyond the picture.

    Returns:
        (N, C, H, W).
    """
    count, _, height, width = pictures.shape
    within = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    rows, columns = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    sample = torch.arange(count, device=pictures.device)[:, None, None]
    return torch.where(within[:, None], pictures[sample, :, rows, columns].permute(0, 3, 1, 2), elsewhere)


def _mixed(seeds: torch.Tensor) -> torch.Tensor:
    """64 new random bits from each seed: the output function of SplitMix64.

    The bits of the seed itself are the key of the attack's noise. Offsets from the same bits would be correlated with
    that noise.

    Source: Steele et al. 2014, "Fast splittable pseudorandom number generators", figure 17.
    """
    bits = seeds + as_int64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ _shifted(bits, shift)) * as_int64(factor)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: torch.Tensor, shift: int) -> torch.Tensor:
    return (bits >> shift) & ((1 << (64 - shift)) - 1)  # the shift of int64 alone would fill in the sign bit


def _format(images: torch.Tensor) -> torch.memory_format:
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
