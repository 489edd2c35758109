"""Augmentation against a loop over samples, and statistics of its random numbers."""

import random

import pytest
import torch

from fastadv import sample_seeds
from fastadv.training.augment import Augment


def seeds_of(count):
    return sample_seeds(random.getrandbits(63), torch.arange(count))


def splitmix64(state):
    """The generator of Steele et al. 2014, with Python's integers."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def by_slicing(images, seeds, crop, flip):
    results = []
    for image, seed in zip(images, seeds.tolist(), strict=True):
        bits = splitmix64(seed % 2**64)
        top, left = bits % 2**31 % (2 * crop + 1), (bits >> 31) % 2**31 % (2 * crop + 1)
        _, height, width = image.shape
        padded = image.new_zeros((len(image), height + 2 * crop, width + 2 * crop))
        padded[:, crop : crop + height, crop : crop + width] = image
        cut = padded[:, top : top + height, left : left + width]
        results.append(cut.flip(2) if flip and bits >> 63 else cut)
    return torch.stack(results)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("crop", "flip"), [(4, True), (4, False), (0, True), (2, True)])
def test_it_is_a_crop_and_a_flip_of_every_sample(dtype, crop, flip):
    images = torch.randint(0, 256, (40, 3, 9, 7)).to(dtype)
    seeds = seeds_of(40)
    result = Augment(crop, flip)(images, seeds)
    assert result.dtype == dtype
    assert torch.equal(result, by_slicing(images, seeds, crop, flip))


def test_splitmix_is_the_published_one():
    assert [splitmix64(0), splitmix64(0x9E3779B97F4A7C15)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_is_kept_and_the_images_are_not_changed(layout):
    images = torch.rand(6, 3, 8, 8).contiguous(memory_format=layout)
    before = images.clone()
    result = Augment()(images, seeds_of(6))
    assert result.is_contiguous(memory_format=layout)
    assert result.data_ptr() != images.data_ptr()
    assert torch.equal(images, before)


def test_a_sample_does_not_depend_on_its_batch():
    images, seeds = torch.rand(64, 3, 8, 8), seeds_of(64)
    whole = Augment()(images, seeds)
    order = torch.randperm(64)
    shuffled = [Augment()(images[index], seeds[index]) for index in order.tensor_split(5)]
    assert torch.equal(torch.cat(shuffled), whole[order])


def test_every_offset_and_flip_is_equally_likely():
    # Pixel values are the places 1 to 25. The centre of the result is never padding and tells the offset. Its neighbour
    # on a side that is inside the picture tells whether the picture was flipped.
    count, crop = 40_000, 2
    places = torch.arange(1.0, 26).view(1, 1, 5, 5).expand(count, 1, 5, 5)
    result = Augment(crop)(places, seeds_of(count))[:, 0].long() - 1
    offset = result[:, 2, 2]
    flipped = torch.where(offset % 5 < 4, result[:, 2, 3] != offset + 1, result[:, 2, 1] != offset - 1)
    counts = torch.bincount(flipped * 25 + offset, minlength=50).double()
    expected = count / 50
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < 120  # 49 degrees of freedom: exceeded once in 10^8


def test_bad_input_is_refused():
    for crop in (-1, 1.5, True):
        with pytest.raises(ValueError, match="crop must be an integer of at least 0"):
            Augment(crop)
    with pytest.raises(TypeError, match="flip is True or False, got 'no'"):
        Augment(flip="no")
    images = torch.rand(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"images must be \(N, C, H, W\)"):
        Augment()(images[0], seeds_of(3))
    with pytest.raises(TypeError, match="seeds must be int64"):
        Augment()(images, seeds_of(4).int())
    with pytest.raises(ValueError, match="one for each of the 4 images"):
        Augment()(images, seeds_of(3))
    with pytest.raises(ValueError, match="less than the images' height and width, got 8"):
        Augment(8)(images, seeds_of(4))


def test_its_settings_are_its_name():
    assert repr(Augment(2, flip=False)) == "Augment(crop=2, flip=False)"
