"""Images that two parts of a data set have in common, such as the training images and those that judge the model."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping

import torch

from fastadv.data.share import CHUNK, Batch, Share
from fastadv.functional import to_float

MATTERS = 0.01  # a share of known images by which an accuracy may be a point too high


def common_images(parts: Mapping[str, Batch], device: torch.device) -> list[str]:
    """Sentences about the parts of which a hundredth or more are, to the bit, images of an earlier part.

    Args:
        parts: {name of a part: its images and labels}, in the order in which they are used. Where processes hold shares
            of the images, all of them call this together, and the first one gets the sentences.
        device: the device over which images are sent from one process to another.
    """
    if len(parts) < 2:
        return []
    mixed = len({images.dtype for images, _ in parts.values()}) > 1
    hashes = {name: list(_hashes(images, device, mixed)) for name, (images, _) in parts.items()}
    found = []
    for earlier, name in itertools.combinations(hashes, 2):
        known, mine = set(hashes[earlier]), hashes[name]
        again = sum(each in known for each in mine)
        if again and again >= MATTERS * len(mine):
            found.append(
                f"{again} of the {len(mine)} images of {name} are images of {earlier} as well, to the bit: accuracy on "
                f"them says nothing about new images. Take them out of {earlier} or of {name}"
            )
    return found


def _hashes(images: torch.Tensor | Share, device: torch.device, mixed: bool) -> Iterator[bytes]:
    """As of `image_hashes`; with `mixed` of its floats, which are the same for an image in uint8 and in float32."""
    for chunk in images.chunks(device) if isinstance(images, Share) else images.split(CHUNK):
        yield from image_hashes(to_float(chunk) if mixed else chunk)


def image_hashes(images: torch.Tensor) -> Iterator[bytes]:
    """A hash of each image (N, ...): equal ones, to the bit, have the same."""
    rows = images.flatten(1).contiguous().cpu().view(torch.uint8).numpy()
    return (hashlib.blake2b(row.data, digest_size=16).digest() for row in rows)
