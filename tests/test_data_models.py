"""Data sets by name or path: what they hold, and what is refused."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fastadv import data


def test_digits_are_all_there_in_the_unit_range():
    digits = data.load("digits")
    assert digits.shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    images = torch.cat((digits.x_train, digits.x_test))
    expected = torch.from_numpy(load_digits().images / 16).float()
    assert torch.equal(images.flatten(1).sort(dim=0)[0], expected.flatten(1).sort(dim=0)[0])
    share = digits.y_test.bincount() / torch.cat((digits.y_train, digits.y_test)).bincount()
    assert ((share - 0.25).abs() < 0.01).all()


def test_split_follows_the_seed_alone():
    assert torch.equal(data.load("digits", seed=1).x_test, data.load("digits", seed=1).x_test)
    assert not torch.equal(data.load("digits", seed=1).x_test, data.load("digits", seed=2).x_test)


def test_classes_are_kept_in_order_and_relabelled():
    whole, part = data.load("digits"), data.load("digits", classes=[7, 5])
    assert part.classes == ("7", "5")
    assert torch.equal(part.x_train[part.y_train == 0], whole.x_train[whole.y_train == 7])
    assert torch.equal(part.x_test[part.y_test == 1], whole.x_test[whole.y_test == 5])
    assert len(part.x_train) == ((whole.y_train == 7) | (whole.y_train == 5)).sum()


def arrays(**changes):
    rng = np.random.default_rng(0)
    parts = {
        "x_train": rng.integers(0, 256, (8, 3, 4, 4), dtype=np.uint8),
        "y_train": np.arange(8) % 4,
        "x_test": rng.integers(0, 256, (4, 3, 4, 4), dtype=np.uint8),
        "y_test": np.arange(4),
    }
    return {key: value for key, value in {**parts, **changes}.items() if value is not None}


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_npz_is_read_as_it_is(tmp_path, dtype):
    parts = arrays()
    if dtype is np.float64:
        parts |= {key: parts[key] / 255 for key in ("x_train", "x_test")}
    np.savez(tmp_path / "set.npz", **parts)
    loaded = data.load(tmp_path / "set.npz")
    assert loaded.classes == ("0", "1", "2", "3")
    assert loaded.y_train.dtype == torch.int64
    assert loaded.x_train.dtype == (torch.uint8 if dtype is np.uint8 else torch.float32)
    assert torch.equal(data.to_float(loaded.x_train), torch.from_numpy(arrays()["x_train"] / 255).float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "no array y_test"),
        (
            {"x_train": np.zeros((8, 4, 4))},
            r"x_train must be images \(N, C, H, W\), got the shape \(8, 4, 4\)",
        ),
        ({"x_train": np.zeros((8, 3, 4, 4), np.int64)}, "x_train must be uint8 or floating point, got int64"),
        ({"x_test": np.full((4, 3, 4, 4), 255.0)}, r"x_test must be in \[0, 1\], got \[255, 255\]"),
        ({"x_test": np.full((4, 3, 4, 4), np.nan)}, r"x_test must be in \[0, 1\]"),
        ({"x_test": np.zeros((4, 3, 5, 5))}, "different shapes"),
        ({"y_train": np.zeros(7, int)}, r"y_train must be of shape \(8,\), one for each image, got \(7,\)"),
        ({"y_train": np.zeros(8)}, "y_train must be integers, got float64"),
        ({"y_train": np.full(8, -1)}, "y_train must not be negative, got -1"),
    ],
)
def test_bad_npz_is_refused_by_what_is_wrong(tmp_path, changes, message):
    np.savez(tmp_path / "set.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path / "set.npz")


def test_other_files_and_classes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="give 'digits' or the path"):
        data.load("digit")
    (tmp_path / "set.npz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"is not an \.npz file"):
        data.load(tmp_path / "set.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"is not an \.npz file|no array"):
        data.load(tmp_path / "one.npy")
    with pytest.raises(ValueError, match="class 12 has no training"):
        data.load("digits", classes=[5, 12])
