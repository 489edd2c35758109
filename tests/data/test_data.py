"""Data sets: their contents, splits and preparation, and refusals."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import tarfile
import time
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import EpsImagePlugin, Image
from sklearn.datasets import load_digits

from fastadv import data, to_float
from fastadv.data import decoding
from fastadv.data.cifar10 import CLASSES
from fastadv.data.classes import class_list, labels_of
from fastadv.data.pictures import extensions, read
from fastadv.data.source import DataSource, DigestedPart, digests
from fastadv.data.splits import Split, split_off, with_splits
from fastadv.preprocessing import Preprocessing

RNG = np.random.default_rng(random.getrandbits(32))


def noise(height, width, channels=3):
    return RNG.integers(0, 256, (height, width, channels)[: 2 if channels == 1 else 3], dtype=np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def png_of_16_bits(pixels, transparent=b""):
    """The file of a picture (H, W, 1 to 4) with 16 bits a colour."""
    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    return png_of(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], lines, transparent)


def png_of(width, height, bits, colours, lines, transparent):
    """The file of a picture by the format's specification."""
    head = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    clear = [(b"tRNS", transparent)] if transparent else []
    chunks = ((b"IHDR", head), *clear, (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in chunks
    )


def rows(images):
    """uint8 (N, C, H, W) as a set of bytes: the images without their order."""
    return {image.numpy().tobytes() for image in images}


# Digits


def test_digits_are_all_there_in_the_unit_range():
    digits = data.load("digits")
    assert digits.shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    images = torch.cat((digits.x_train, digits.x_val, digits.x_test))
    expected = torch.from_numpy(load_digits().images / 16).float()
    assert torch.equal(images.flatten(1).sort(dim=0)[0], expected.flatten(1).sort(dim=0)[0])
    assert len(digits.notes) == 1
    made, count = len(digits.x_test), len(images)
    said = f"no test part: {made} of the {count} images of its training part ({made / count:.0%}) are the test part"
    assert said in digits.notes[0]


def test_a_folder_called_digits_is_not_taken_for_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "model.safetensors").touch()  # a run's folder is no set
    photos(tmp_path / "digits" / "evaluated" / "images", {"adversarial": 2})
    (tmp_path / "digits" / "evaluated" / "report.json").touch()
    assert len(data.load("digits").classes) == 10
    shutil.rmtree(tmp_path / "digits" / "evaluated")
    photos(tmp_path / "digits", {"a": 5, "b": 6})
    with pytest.raises(ValueError, match=r"digits is the name of scikit-learn's, .*/digits has pictures, too"):
        data.load("digits")
    for path in ("./digits", "digits/", Path("digits")):
        with pytest.warns(UserWarning, match="left out, no picture of a class"):
            assert data.load(path).classes == ("a", "b")


def test_digits_for_a_model_are_codes_of_its_size():
    plain, codes = data.load("digits"), data.load("digits", preprocessing=Preprocessing((8, 8), channels=1))
    assert torch.equal(codes.x_test, (255 * plain.x_test.double()).round().to(torch.uint8))
    large = data.load("digits", preprocessing=Preprocessing((32, 24), interpolation="nearest"))
    assert large.shape == (3, 32, 24)
    # Each pixel becomes 4 x 4 pixels, and four columns are cut off at either side.
    enlarged = codes.x_val.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert torch.equal(large.x_val, enlarged[..., 4:-4].expand(-1, 3, -1, -1))
    assert torch.equal(large.y_val, plain.y_val)


# Splits and classes


def test_split_follows_the_seed_alone():
    first, again, other = (data.load("digits", seed=seed) for seed in (1, 1, 2))
    for part in ("x_train", "x_val", "x_test"):
        assert torch.equal(getattr(first, part), getattr(again, part))
    assert not torch.equal(first.x_test, other.x_test)
    assert not torch.equal(first.x_val, other.x_val)


def small_images(path, count):
    """An .npz file with `count` random training images of three classes, and one test image of each class."""
    images, labels = RNG.integers(0, 256, (count + 3, 3, 2, 2), dtype=np.uint8), np.arange(count + 3) % 3
    np.savez(path, x_train=images[:-3], y_train=labels[:-3], x_test=images[-3:], y_test=labels[-3:])
    return path


def pairs(part):
    """The pairs (image, label), sorted."""
    return sorted((image.numpy().tobytes(), int(label)) for image, label in zip(*part, strict=True))


@pytest.mark.parametrize("share", [0.02, 0.29, 0.5])
def test_validation_is_a_share_of_what_is_not_the_test_part(tmp_path, share):
    count = 4000
    path = small_images(tmp_path / "a.npz", count)
    loaded = data.load(path, validation=share)
    spread = (count * share * (1 - share)) ** 0.5  # the standard deviation of a binomial count
    assert abs(len(loaded.y_val) - share * count) < 5 * spread
    assert pairs([torch.cat(t) for t in zip(loaded.train, loaded.val, strict=True)]) == pairs(
        data.load(path, validation=0).train
    )
    folder = photos(tmp_path / "photos", dict.fromkeys("ab", 100), size=(4, 4))
    whole, split = (data.load(tmp_path / "photos", validation=v, test=0.4) for v in (0, share))
    assert torch.equal(whole.x_test, split.x_test)
    assert abs(len(split.y_test) - 0.4 * 200) < 5 * (200 * 0.4 * 0.6) ** 0.5
    assert abs(len(split.y_val) - share * 0.6 * 200) < 5 * (200 * share * 0.6) ** 0.5
    assert rows(torch.cat((split.x_train, split.x_val, split.x_test))) == set.union(*folder.values())


def test_the_seed_chooses_independently_of_other_seeds(tmp_path):
    path = small_images(tmp_path / "a.npz", 4000)
    one, other = (rows(data.load(path, validation=0.25, seed=seed).x_val) for seed in (3, 4))
    assert abs(len(one & other) - 4000 / 16) < 5 * (4000 / 16) ** 0.5


def test_one_more_picture_moves_no_other_and_names_mean_nothing(tmp_path):
    photos(tmp_path, {"a": 60, "b": 60})
    before = data.load(tmp_path, validation=0.3)
    assert len(before.notes) == 1, "60 pictures and none in a fifth: a chance of one in a million"
    photos(tmp_path / "more", {"a": 7, "b": 3})
    for i, path in enumerate(sorted((tmp_path / "more").glob("*/*"))):  # their names are among the others
        path.rename(tmp_path / path.parent.name / f"0{15 + 2 * i}-new{path.suffix}")
    for folder in (tmp_path / "more").iterdir():
        folder.rmdir()
    (tmp_path / "more").rmdir()
    for path in list((tmp_path / "a").iterdir())[::2]:
        path.rename(tmp_path / "a" / f"{random.getrandbits(32):08x}{path.suffix}")
    after = data.load(tmp_path, validation=0.3)
    assert sum(len(part[1]) for part in (after.train, after.val, after.test)) == 130
    for part in ("train", "val", "test"):
        assert rows(getattr(before, f"x_{part}")) <= rows(getattr(after, f"x_{part}"))


def test_equal_pictures_fall_on_one_side_and_two_labels_are_counted(tmp_path):
    photos(tmp_path, {"a": 30, "b": 30})
    for i, path in enumerate(sorted((tmp_path / "a").iterdir())):
        for copy in range(i % 3):
            (tmp_path / "a" / f"copy-{copy}-{path.name}").write_bytes(path.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = data.load(tmp_path, validation=0.3)
    parts = [rows(loaded.x_train), rows(loaded.x_val), rows(loaded.x_test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60
    assert len(loaded.y_train) + len(loaded.y_val) + len(loaded.y_test) == 90
    for path in list((tmp_path / "b").iterdir())[:4]:
        (tmp_path / "a" / f"b-{path.name}").write_bytes(path.read_bytes())
    with pytest.warns(UserWarning, match="4 of 60 different pictures are there under two labels, .* as a and as b"):
        loaded = data.load(tmp_path, validation=0.3)
    parts = [rows(loaded.x_train), rows(loaded.x_val), rows(loaded.x_test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60
    with warnings.catch_warnings():  # with one of the two classes there is no second label
        warnings.simplefilter("error")
        data.load(tmp_path, classes=["b"])


def place(path, seed):
    """The place of a file's picture in [0, 1). Model files depend on this formula."""
    content = hashlib.blake2b(path.read_bytes(), digest_size=8).digest()
    hashed = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(hashed, "little") / 2**64


def test_parts_are_those_of_the_hash_and_a_class_without_a_picture_has_the_nearest_one(tmp_path):
    photos(tmp_path, {"few": 3, "many": 150, "single": 1})
    moved = 0
    for seed in range(12):
        loaded = data.load(tmp_path, classes=["many", "few"], validation=0.125, seed=seed)
        parts = {"test": (0, 0.2), "val": (0.2, 0.3), "train": (0.3, 1)}
        natural = {
            (part, name): {path for path in (tmp_path / name).iterdir() if low <= place(path, seed) < high}
            for part, (low, high) in parts.items()
            for name in ("many", "few")
        }
        lacking = [name for name in ("many", "few") if not all(natural[part, name] for part in parts)]
        for name in lacking:  # of three pictures the first goes to test, the second to val, the third to train
            assert name == "few", "150 pictures and none in a tenth: a chance of one in a million"
            ordered = sorted((tmp_path / name).iterdir(), key=lambda path: place(path, seed))
            natural |= {(part, name): {path} for part, path in zip(parts, ordered, strict=True)}
        for label, name in enumerate(("many", "few")):
            for part in parts:
                images, labels = getattr(loaded, part)
                pixels = {np.asarray(read(path)).transpose(2, 0, 1).tobytes() for path in natural[part, name]}
                assert rows(images[labels == label]) == pixels, (seed, part, name)
        assert any("nearest one: few (" in note for note in loaded.notes) == bool(lacking)
        moved += bool(lacking)
    assert moved > 0
    with pytest.raises(ValueError, match="class 'single' has 1 different training image, and 3 parts need one each"):
        data.load(tmp_path)


@pytest.mark.filterwarnings("ignore:.*are there under two labels:UserWarning")
def test_evaluation_finds_the_test_part_that_training_split_off():
    """Also where a class that was not chosen has too few pictures for three parts, and shares one with another."""
    for seed in range(fresh := random.randrange(2**31), fresh + 300):
        rng = np.random.default_rng(seed)
        labels = torch.tensor([0] * 4 + [1] * 4 + [2] * 2)
        contents = torch.from_numpy(rng.integers(0, 12, len(labels)))
        whole = DigestedPart(torch.arange(len(labels)), labels, contents)
        split = Split(seed=seed, test=0.2, validation=0.3)
        try:
            parts, _ = with_splits(DataSource({"train": whole}, ("a", "b", "c")), split, [0, 1])
        except ValueError:  # too few different pictures of a class
            continue
        test, _ = split_off(whole, split, ("a", "b", "c"), [0, 1])
        assert test.images.tolist() == parts["test"].images.tolist(), seed


def test_a_set_whose_own_parts_share_pictures_is_warned_of(tmp_path):
    photos(tmp_path, {f"{part}/{name}": 6 for part in ("train", "test") for name in "ab"})
    for path in list((tmp_path / "train" / "b").iterdir())[:3]:
        (tmp_path / "test" / "b" / f"again-{path.name}").write_bytes(path.read_bytes())
    with pytest.warns(UserWarning, match="3 of the 15 test pictures are training pictures as well"):
        data.load(tmp_path)


def test_sixty_thousand_small_images_are_hashed_in_a_moment():
    images = torch.from_numpy(RNG.integers(0, 256, (60_000, 1, 28, 28), dtype=np.uint8))
    start = time.perf_counter()
    found = digests(images)
    Split().places(found.numpy())
    assert time.perf_counter() - start < 2
    assert len(found.unique()) == 60_000


def test_classes_are_kept_in_order_and_relabelled():
    whole, part = data.load("digits"), data.load("digits", classes=[7, "5"])
    assert part.classes == ("7", "5")
    assert torch.equal(part.x_train[part.y_train == 0], whole.x_train[whole.y_train == 7])
    assert torch.equal(part.x_val[part.y_val == 0], whole.x_val[whole.y_val == 7])
    assert torch.equal(part.x_test[part.y_test == 1], whole.x_test[whole.y_test == 5])
    assert len(part.x_train) == ((whole.y_train == 7) | (whole.y_train == 5)).sum()


def test_classes_and_shares_that_are_none_are_refused():
    with pytest.raises(ValueError, match="class 12 has no training"):
        data.load("digits", classes=[5, 12])
    with pytest.raises(ValueError, match="no class 'five'; there are 0, 1"):
        data.load("digits", classes=["five"])
    for classes in ([], [5, "5"]):
        with pytest.raises(ValueError, match="different and at least one"):
            data.load("digits", classes=classes)
    for classes in ("012", [1.5], [0.0, 1.0], [True, False], [np.float32(2)]):
        with pytest.raises(ValueError, match="must be a list of names or of whole numbers, got"):
            data.load("digits", classes=classes)
    for seed in (1.5, "1", None):
        with pytest.raises(ValueError, match="the seed of a split must be a whole number, got"):
            data.load("digits", seed=seed)
    for share in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match=r"a share in \[0, 1\)"):
            data.load("digits", validation=share)


def test_numbers_of_numpy_choose_the_same_and_can_be_stored():
    own, theirs = (
        data.load("digits", seed=integer(5), test=real(0.25), validation=real(0.125), classes=[integer(3), integer(1)])
        for integer, real in ((int, float), (np.int64, np.float32))
    )
    assert theirs.classes == own.classes == ("3", "1")
    assert torch.equal(theirs.y_train, own.y_train)
    records = [json.dumps(data.TrainedOn.of(each).to_json()) for each in (own, theirs)]
    assert records[0] == records[1]


# .npz files


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
    loaded = data.load(tmp_path / "set.npz", validation=0)
    assert loaded.classes == ("0", "1", "2", "3")
    assert loaded.y_train.dtype == torch.int64
    assert loaded.x_train.dtype == (torch.uint8 if dtype is np.uint8 else torch.float32)
    assert torch.equal(to_float(loaded.x_train), torch.from_numpy(arrays()["x_train"] / 255).float())


@pytest.mark.parametrize("shape", [(3, 5, 1), (1, 4, 1), (64, 1, 1), (3, 4, 3), (12, 2, 3), (5, 6, 7)])
def test_unusual_shapes_that_are_no_channels_last_are_taken(tmp_path, shape):
    parts = arrays()
    images = RNG.integers(0, 256, (12, *shape), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", **parts | {"x_train": images[:8], "x_test": images[8:]})
    assert data.load(tmp_path / "set.npz", validation=0).shape == shape


def test_floats_a_hair_beyond_one_are_clamped(tmp_path):
    parts = {key: arrays()[key] / np.float32(255) for key in ("x_train", "x_test")}
    parts["x_train"][0, 0, 0, :2] = 1 + 2**-23, -(2**-24)
    np.savez(tmp_path / "set.npz", **arrays(**parts))
    expected = torch.from_numpy(parts["x_train"]).clamp(0, 1)
    assert torch.equal(data.load(tmp_path / "set.npz", validation=0).x_train, expected)


@pytest.mark.parametrize("there", [(1, 2, 3), (0, 2, 7), (5, 1000, 2**40), (2**60, 2**60 + 1, 2**60 + 2)])
@pytest.mark.parametrize("kind", ["<u8", ">i8"])
def test_labels_that_do_not_count_from_zero_make_no_empty_class(tmp_path, there, kind):
    labels = {"y_train": np.array(there, kind)[np.arange(8) % 3], "y_test": np.array(there)[[2, 1, 0, 2]]}
    np.savez(tmp_path / "set.npz", **arrays(**labels))
    loaded = data.load(tmp_path / "set.npz", validation=0)
    assert loaded.classes == tuple(map(str, there))
    assert [there[label] for label in loaded.y_train] == labels["y_train"].tolist()
    assert [there[label] for label in loaded.y_test] == labels["y_test"].tolist()
    chosen = data.load(tmp_path / "set.npz", validation=0, classes=class_list(f"{there[2]},{there[0]}"))
    assert chosen.classes == (str(there[2]), str(there[0]))
    assert rows(chosen.x_test[chosen.y_test == 0]) == rows(loaded.x_test[[0, 3]])


def test_a_class_that_a_part_lacks_is_warned_of(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays(y_test=np.array([0, 1, 2, 9])))
    with (
        pytest.warns(UserWarning, match=r"1 of 5 classes have no training images \(9\), and cannot be learnt"),
        pytest.warns(UserWarning, match=r"1 of 5 classes have no test images \(3\), and test accuracy says nothing"),
    ):
        data.load(tmp_path / "set.npz", validation=0)
    photos(tmp_path / "photos", {"train/a": 4, "train/b": 4, "val/b": 2, "test/a": 2, "test/b": 2})
    with pytest.warns(UserWarning, match=r"1 of 2 classes have no validation images \(a\), and validation accuracy"):
        data.load(tmp_path / "photos")
    data.load(tmp_path / "set.npz", validation=0, classes=[0, 1, 2])
    parquet(tmp_path / "p.parquet", [noise(4, 4) for _ in range(12)], [0, 2] * 6, names="abc")
    with pytest.warns(UserWarning, match=r"1 of 3 classes have no training images \(b\)"):
        assert data.load(tmp_path / "p.parquet").classes == ("a", "b", "c")


def test_npz_may_bring_its_own_validation_part(tmp_path):
    own = {"x_val": 255 - arrays()["x_test"], "y_val": np.arange(4)[::-1]}
    np.savez(tmp_path / "set.npz", **arrays(**own))
    loaded = data.load(tmp_path / "set.npz")
    assert torch.equal(loaded.x_val, torch.from_numpy(own["x_val"]))
    assert loaded.y_val.tolist() == [3, 2, 1, 0]
    assert len(loaded.x_train) == 8


def test_npz_is_prepared_for_a_model(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays())
    settings = Preprocessing((6, 6), interpolation="bilinear")
    loaded = data.load(tmp_path / "set.npz", validation=0, preprocessing=settings)
    for image, source in zip(loaded.x_train, arrays()["x_train"], strict=True):
        expected = Image.fromarray(source.transpose(1, 2, 0)).resize((6, 6), Image.Resampling.BILINEAR)
        assert np.array_equal(image.permute(1, 2, 0), expected)
    floats = {key: arrays()[key] / 255 for key in ("x_train", "x_test")}
    np.savez(tmp_path / "floats.npz", **arrays(**floats))
    with pytest.raises(ValueError, match=r"float32 of the shape \(3, 4, 4\), the model takes \(3, 6, 6\)"):
        data.load(tmp_path / "floats.npz", validation=0, preprocessing=settings)
    assert data.load(tmp_path / "floats.npz", preprocessing=Preprocessing((4, 4))).shape == (3, 4, 4)


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
        ({"x_test": np.full((4, 3, 4, 4), 1.00001)}, r"x_test must be in \[0, 1\], got \[1\.00001, 1\.00001\]"),
        ({"x_train": np.zeros((8, 32, 32, 3))}, r"\(8, 32, 32, 3\) is .* as Keras has it: save np\.moveaxis\(x_train"),
        ({"x_train": np.zeros((8, 4, 4, 3), np.uint8)}, "is .* as Keras has it"),
        ({"x_test": np.zeros((4, 28, 28, 1), np.uint8)}, r"x_test, -1, 1\), of the shape \(4, 1, 28, 28\)"),
        ({"x_train": np.zeros((8, 32, 32, 2), np.uint8)}, r"np\.moveaxis\(x_train, -1, 1\), of .* \(8, 2, 32, 32\)"),
        ({"x_test": np.zeros((4, 64, 64, 13), np.uint8)}, r"is .* as Keras has it.*\(4, 13, 64, 64\)"),
        ({"x_train": np.zeros((8, 4, 4), np.uint8)}, r"\(8, 4, 4\): save x_train\[:, None\]"),
        ({"x_test": np.full((4, 3, 4, 4), 255.0)}, r"got \[255, 255\]: save x_test / 255"),
        ({"y_train": np.arange(8)[:, None] % 4}, r"y_train must be .* got \(8, 1\): save y_train\[:, 0\]"),
        ({"y_test": np.array([0, 1, 2, 2**63], np.uint64)}, r"y_test must be below 2\^63, got 9223372036854775808"),
        ({"y_test": np.eye(4)}, r"y_test must be .* got \(4, 4\): save y_test\.argmax\(1\)"),
        ({"x_test": np.full((4, 3, 4, 4), np.nan)}, r"x_test must be in \[0, 1\]"),
        ({"x_test": np.zeros((4, 3, 5, 5))}, "different shapes"),
        ({"x_val": np.zeros((4, 3, 4, 4))}, "no array y_val"),
        ({"y_train": np.zeros(7, int)}, r"y_train must be of shape \(8,\), one for each image, got \(7,\)"),
        ({"y_train": np.zeros(8)}, r"y_train must be integers, got float64: save y_train.astype\(np.int64\)"),
        ({"y_train": np.full(8, "cat")}, r"y_train must be integers, got <U3: save np.unique\(y_train, return_inverse"),
        (
            {"y_train": np.full(8, 0.5)},
            r"y_train must be integers, got float64: save np.unique\(y_train, return_inverse",
        ),
        ({"y_train": np.full(8, -1)}, "y_train must not be negative, got -1: number the classes from 0"),
        ({"y_train": np.array([0, 0, 1, 1, 2, 2, 2, 3])}, "class '3' has 1 different training image, and 2 parts"),
    ],
)
def test_bad_npz_is_refused_by_what_is_wrong(tmp_path, changes, message):
    np.savez(tmp_path / "set.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path / "set.npz")


def test_other_files_and_names_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'digit': give the path .*are digits, cifar10\. Did you mean digits"):
        data.load("digit")
    np.savez(tmp_path / "whole.npz", **arrays())
    whole = (tmp_path / "whole.npz").read_bytes()
    for content in (b"not an archive", b"", whole[: len(whole) // 2]):
        (tmp_path / "set.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"is not an \.npz file"):
            data.load(tmp_path / "set.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"is not an \.npz file|no array"):
        data.load(tmp_path / "one.npy")


# One picture


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    colour, grey, alpha = noise(6, 5), noise(6, 5, 1), noise(6, 5, 1)
    wide = RNG.integers(0, 65536, (6, 5), dtype=np.uint16)

    def same(picture, expected, at_most=0):
        picture.save(tmp_path / "a.tif" if picture.mode == "CMYK" else tmp_path / "a.png")
        result = read(tmp_path / "a.tif" if picture.mode == "CMYK" else tmp_path / "a.png")
        assert result.mode == "RGB"
        assert np.abs(np.asarray(result).astype(int) - expected).max() <= at_most

    def over_white(pixels):
        share = alpha[..., None] / 255
        return np.asarray(pixels) * share + 255 * (1 - share)

    three = np.repeat(grey[..., None], 3, axis=2)
    same(Image.fromarray(colour), colour)
    same(Image.fromarray(grey), three)
    same(Image.fromarray(grey > 99), 255 * (three > 99))
    same(Image.fromarray(np.dstack((colour, alpha))), over_white(colour), at_most=1)
    same(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), over_white(three), at_most=1)
    same(Image.fromarray(wide), np.rint(wide / 257)[..., None])
    clear = int(wide[2, 3])
    (tmp_path / "clear.png").write_bytes(png_of_16_bits(wide[..., None], struct.pack(">H", clear)))
    grey_or_white = np.where(wide == clear, 255, np.rint(wide / 257))
    assert np.array_equal(np.asarray(read(tmp_path / "clear.png"))[..., 0], grey_or_white)
    same(
        Image.merge("CMYK", [Image.fromarray(255 - colour[..., i]) for i in range(3)] + [Image.new("L", (5, 6))]),
        colour,
    )
    palette = Image.fromarray(grey % 4)
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    table = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]])
    same(palette, table[grey % 4])
    palette.info["transparency"] = 2
    table[2] = 255
    same(palette, table[grey % 4])


def test_pictures_are_turned_upright_and_animations_show_their_first_frame(tmp_path):
    pixels = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the picture must be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png"), np.rot90(pixels, -1))
    frames = [Image.new("RGB", (3, 3), name) for name in ("red", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(read(tmp_path / "a.gif"), np.full((3, 3, 3), [255, 0, 0]))


def tiff_of_16_bits(pixels, photometric):
    """The file of a grey picture (H, W), whose 0 is white (photometric 0) or black (1), by the specification."""
    height, width = pixels.shape
    entries = [(256, width), (257, height), (258, 16), (259, 1), (262, photometric), (273, 200), (277, 1)]
    entries += [(278, height), (279, 2 * height * width)]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries) + struct.pack("<I", 0)
    return head.ljust(200, b"\0") + pixels.astype("<u2").tobytes()


def test_a_tiff_of_16_bits_whose_zero_is_white_is_no_negative(tmp_path):
    pixels = RNG.integers(0, 65536, (6, 5), dtype=np.uint16)
    for photometric, expected in ((1, pixels / 257), (0, 255 - pixels / 257)):
        (tmp_path / "a.tif").write_bytes(tiff_of_16_bits(pixels, photometric))
        assert np.abs(np.asarray(read(tmp_path / "a.tif"))[..., 0] - expected).max() <= 0.5


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_grey_that_is_transparent_becomes_white_whatever_the_bits(tmp_path, bits):
    most = 2**bits - 1
    pixels = RNG.integers(0, most + 1, (6, 9))
    digits = (pixels[..., None] >> np.arange(bits)[::-1]) & 1
    lines = b"".join(b"\0" + np.packbits(line).tobytes() for line in digits.reshape(6, -1))
    for clear in {0, 1, most}:
        (tmp_path / "a.png").write_bytes(png_of(9, 6, bits, 0, lines, struct.pack(">H", clear)))
        expected = np.where(pixels == clear, 255, pixels * (255 // most))
        assert np.array_equal(np.asarray(read(tmp_path / "a.png"))[..., 0], expected)


def test_a_palette_s_transparent_colour_becomes_white(tmp_path):
    colours = bytes([10, 20, 30, 0, 60, 50, 40, 255])  # blue, green, red, alpha
    head = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 2, 32, 0, 0, 2, 1, 8, 0x20)
    (tmp_path / "a.tga").write_bytes(head + colours + bytes([0, 1]))
    assert np.asarray(read(tmp_path / "a.tga")).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_damaged_pictures_are_refused_by_name(tmp_path, monkeypatch):
    whole = png(noise(40, 40))
    for content in (whole[: len(whole) // 2], whole[:20], b"", b"text", b"\xff\xd8\xff\xe0 half a head"):
        (tmp_path / "broken.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.png cannot be read as a picture .*replace it or delete it"):
            read(tmp_path / "broken.png")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.png")
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="do not fit in 16 bits"):
        read(tmp_path / "deep.tif")
    for brightest, ending in ((1, "png"), (255, "tif"), (4095, "png")):  # 1, 8 and 12 bits in files of 16 or 32
        kind = np.int32 if ending == "tif" else np.uint16
        Image.fromarray(np.array([[0, brightest]], kind)).save(tmp_path / f"dark.{ending}")
        with pytest.raises(ValueError, match=f"brightest value is {brightest} of 65535"):
            read(tmp_path / f"dark.{ending}")
    for channels in (2, 3, 4):  # Pillow reads these in 8 bits
        for brightest, dark in ((4095, True), (65535, False)):
            pixels = np.random.default_rng().integers(0, brightest + 1, (5, 6, channels))
            pixels[0, 0, :] = brightest
            if channels != 3:
                pixels[..., -1] = 65535
            (tmp_path / "colours.png").write_bytes(png_of_16_bits(pixels))
            if dark:
                with pytest.raises(ValueError, match=r"has 16 bits, but its brightest value is \d+ of 65535"):
                    read(tmp_path / "colours.png")
            else:
                read_pixels = np.asarray(read(tmp_path / "colours.png")).astype(int)
                assert np.abs(read_pixels - pixels[..., : 1 if channels == 2 else 3] / 257).max() <= 1
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="floats of unknown range"):
        read(tmp_path / "float.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "bomb.png").write_bytes(whole)
    with pytest.raises(ValueError, match=r"bomb\.png has too many pixels"):
        read(tmp_path / "bomb.png")


# Preprocessing


def test_a_picture_of_the_models_size_keeps_its_bits():
    pixels = noise(32, 32)
    for crop in (1.0, 0.875):
        assert np.array_equal(
            Preprocessing((32, 32), crop=crop).apply(Image.fromarray(pixels)), pixels.transpose(2, 0, 1)
        )
    grey = Preprocessing((32, 32), channels=1).apply(Image.fromarray(noise(32, 32, 1)))
    assert grey.shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("picture", "size", "crop", "resized", "corner"),
    [  # sizes are (H, W); the corner (top, left) of the crop is counted by hand
        ((40, 60), (32, 32), 1.0, (32, 48), (0, 8)),
        ((60, 40), (32, 32), 1.0, (48, 32), (8, 0)),
        ((64, 64), (28, 28), 0.875, (32, 32), (2, 2)),
        ((50, 75), (224, 224), 0.875, (256, 384), (16, 80)),
        ((30, 40), (10, 20), 1.0, (15, 20), (2, 0)),  # 5 / 2 is rounded to the even 2
        ((100, 100), (224, 224), 224 / 354, (354, 354), (65, 65)),  # 224 / (224 / 354) is 353.99...
        ((31, 17), (16, 16), 0.95, (29, 16), (6, 0)),  # 16 / .95 = 16.8 gives 16, 31 * 16 / 17 = 29.2 gives 29
    ],
)
def test_pictures_are_resized_to_cover_and_cut_in_the_centre(picture, size, crop, resized, corner):
    source = Image.fromarray(noise(*picture))
    expected = np.asarray(source.resize(resized[::-1], Image.Resampling.BICUBIC))
    expected = expected[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
    assert np.array_equal(Preprocessing(size, crop=crop).apply(source), expected.transpose(2, 0, 1))


def test_preprocessing_comes_back_from_json():
    settings = Preprocessing((8, 9), 3, (0.1, 0.2, 0.3), (0.5,), "lanczos", 0.9)
    assert settings.std == (0.5, 0.5, 0.5)
    assert Preprocessing.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert Preprocessing((4, 4), channels=1).mean == (0.0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (0, 4)}, "size must be"),
        ({"size": (4,)}, "size must be"),
        ({"channels": 4}, "channels must be 1 or 3"),
        ({"mean": (0.1, 0.2)}, "mean must be 3 finite numbers or one"),
        ({"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}, r"mean must be of pixels in \[0, 1\]"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"interpolation": "box"}, "unknown interpolation 'box'"),
        ({"crop": 0.0}, r"crop must be in \(0, 1\]"),
        ({"crop": 1e-320}, "a side of more than 8192 pixels"),
        ({"size": (32, 100_000)}, "a side of more than 8192 pixels"),
        ({"colour": 1}, "unknown: colour"),
        ({"size": None}, "size is missing"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    values = {key: value for key, value in {"size": (4, 4), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_json(values)


# Folders of pictures


def photos(root, counts, size=(6, 6)):
    """Write random pictures, `counts` has {folder: number}. Returns {folder: set of their pixels, (C, H, W)}."""
    pixels = {name: [noise(*size) for _ in range(count)] for name, count in counts.items()}
    for name, images in pixels.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            (root / name / f"{i:03}.{('png', 'PNG', 'bmp')[i % 3]}").write_bytes(png(image))
    return {name: {image.transpose(2, 0, 1).tobytes() for image in images} for name, images in pixels.items()}


def test_classes_in_a_folder_are_split_three_ways(tmp_path):
    found = photos(tmp_path, {"zèbre": 10, "Äpfel": 20, "äpfel/deep": 5})
    with pytest.warns(
        UserWarning, match="classes 'Äpfel', 'äpfel' differ in capitals or spaces alone, and count as 2:"
    ):
        loaded = data.load(tmp_path)
    assert loaded.classes == ("zèbre", "Äpfel", "äpfel")
    assert "no test part" in loaded.notes[0]
    assert loaded.x_train.dtype == torch.uint8
    assert loaded.x_train.is_contiguous()
    for label, name in enumerate(("zèbre", "Äpfel", "äpfel/deep")):
        parts = [rows(x[y == label]) for x, y in (loaded.train, loaded.val, loaded.test)]
        assert set.union(*parts) == found[name]
        assert sum(map(len, parts)) == len(found[name])
        assert all(parts)
    (tmp_path / "äpfel").rename(tmp_path / "äpfel1")
    again = data.load(str(tmp_path))
    assert all(torch.equal(getattr(loaded, key), getattr(again, key)) for key in ("x_train", "x_val", "x_test"))
    assert not torch.equal(loaded.x_train, data.load(tmp_path, seed=1).x_train)


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_parts_in_a_folder_are_taken_as_they_are(tmp_path, val):
    counts = {f"{part}/{name}": count for part, count in (("train", 4), (val, 2), ("test", 3)) for name in "ab"}
    found = photos(tmp_path, counts)
    loaded = data.load(tmp_path)
    assert loaded.notes == ()
    for part, (images, labels) in (("train", loaded.train), (val, loaded.val), ("test", loaded.test)):
        for label, name in enumerate("ab"):
            assert rows(images[labels == label]) == found[f"{part}/{name}"]


def test_a_class_may_be_called_train(tmp_path):
    photos(tmp_path, {"train": 5, "train/old": 5, "plane": 5})
    assert data.load(tmp_path).classes == ("plane", "train")


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("TRAIN", "test")])
def test_parts_may_be_spelt_otherwise(tmp_path, names):
    counts = {f"{part}/{name}": 4 for part in names for name in "ab"}
    found = photos(tmp_path, counts)
    loaded = data.load(tmp_path, validation=0)
    assert loaded.classes == ("a", "b")
    assert rows(loaded.x_test[loaded.y_test == 1]) == found[f"{names[1]}/b"]


def test_a_stray_picture_beside_the_classes_makes_no_class_of_the_parts(tmp_path):
    photos(tmp_path, {"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 2, "train": 1})
    with pytest.warns(UserWarning, match="left out, no picture of a class: 1, such as"):
        assert data.load(tmp_path, validation=0).classes == ("a", "b")


@pytest.mark.parametrize("counts", [{"test/a": 4, "val/a": 4}, {"train": 4, "test": 4}])
def test_parts_without_classes_or_training_are_refused(tmp_path, counts):
    photos(tmp_path, counts)
    with pytest.raises(ValueError, match="parts without classes, or classes without a training part"):
        data.load(tmp_path)


def test_a_name_that_is_stored_in_two_ways_is_one_class(tmp_path):
    photos(tmp_path, {"\u00e9": 5, "e": 5})
    for i in range(5):  # a copy from another system has the name in this form
        path = tmp_path / "e\u0301" / f"other-{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(noise(6, 6)))
    loaded = data.load(tmp_path, validation=0)
    assert loaded.classes == ("e", "\u00e9")
    assert torch.cat((loaded.y_train, loaded.y_test)).bincount().tolist() == [5, 10]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_class_whose_name_is_no_text_is_refused(tmp_path):
    photos(tmp_path, {"caf\u00e9": 3, "t\u00e9\u200d \u3000": 3})
    (tmp_path / "caf\u00e9").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(ValueError, match=r"the class 'caf\\udce9' in .* not UTF-8: rename its folder"):
        data.load(tmp_path)
    shutil.rmtree(os.fsencode(tmp_path) + b"/caf\xe9")
    assert data.load(tmp_path).classes == ("t\u00e9\u200d \u3000",)


def test_a_class_that_is_left_out_needs_no_images(tmp_path):
    photos(tmp_path, {"a": 10, "b": 10, "c": 1})
    with pytest.raises(ValueError, match="class 'c' has 1 different training image"):
        data.load(tmp_path)
    some = data.load(tmp_path, classes=["a", "b"])
    assert some.classes == ("a", "b")
    assert len(some.y_train) + len(some.y_val) + len(some.y_test) == 20


def test_numbers_are_names_where_folders_are_called_so(tmp_path):
    photos(tmp_path, {"1": 5, "2": 5, "3": 5})
    assert data.load(tmp_path, classes=[1, 3]).classes == ("1", "3")
    assert data.load(tmp_path, classes=class_list("2-3")).classes == ("2", "3")
    assert data.load(tmp_path, classes=[0]).classes == ("1",)
    with pytest.raises(ValueError, match="class 1 may be the one called 1 or the label 1, which is the class called 2"):
        data.load(tmp_path, classes=[0, 1])


@pytest.mark.parametrize("names", [("01", "02", "03"), ("9", "10", "11"), ("2", "0", "5")])
def test_classes_asked_for_on_the_command_line_are_those_or_refused(tmp_path, names):
    photos(tmp_path, dict.fromkeys(names, 5))
    for chosen in (names[:2], names[1:], names[::-1]):
        assert data.load(tmp_path, classes=class_list(",".join(chosen))).classes == chosen
    if names[0] == "01":
        with pytest.raises(ValueError, match=r"class 1 may be the one called 01 or the label 1, .* called 02"):
            data.load(tmp_path, classes=class_list("1,2"))
        with pytest.raises(ValueError, match="no class '01-03'; there are 01, 02, 03"):
            data.load(tmp_path, classes=class_list("01-03"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5-9", [range(5, 10)]),
        ("0,3, 5-7", [0, 3, range(5, 8)]),
        ("10", [10]),
        ("cat, dog", ["cat", "dog"]),
        ("01,02", ["01", "02"]),
        ("1,02", ["1", "02"]),
        ("1_0", ["1_0"]),
        ("5-3", ["5-3"]),
        ("1-2-3", ["1-2-3"]),
        ("0,5-3", ["0", "5-3"]),
        ("-1", ["-1"]),
        ("3-", ["3-"]),
    ],
)
def test_what_is_not_written_as_a_label_is_a_name(text, expected):
    assert class_list(text) == expected


def test_classes_that_are_called_as_labels_are_written_are_these_or_refused(tmp_path):
    names = ("0-2", "15-20", "4-6", "60-100", "8-13")
    photos(tmp_path, dict.fromkeys(names, 5))
    for chosen in (names[:2], names[::-1], ("60-100",)):
        assert data.load(tmp_path, classes=class_list(",".join(chosen))).classes == chosen
    assert data.load(tmp_path, classes=class_list("1-3")).classes == names[1:4]
    assert data.load(tmp_path, classes=class_list("1-2,4")).classes == (*names[1:3], names[4])
    assert data.load(tmp_path, classes=class_list('"0-2","4-6"')).classes == ("0-2", "4-6")
    with pytest.raises(ValueError, match=r"0-2 may be the class called so or the labels 0 to 2: .* in double quotes"):
        data.load(tmp_path, classes=class_list("0-2,3"))
    with pytest.raises(ValueError, match="no class '1-3'"):
        data.load(tmp_path, classes=class_list('"1-3"'))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"salt, rock",pepper', ("salt, rock", "pepper")),
        ("salt, rock,pepper", ("salt, rock", "pepper")),
        ("pepper,salt,rock", ("pepper", "salt, rock")),
        ('"1-3",pepper', ("1-3", "pepper")),
        ('pepper,"a ""b"", c"', ("pepper", 'a "b", c')),
        ('a "b", c,pepper', ('a "b", c', "pepper")),
        ("sea", ("sea",)),
        ("sea,salt", ("sea,salt",)),
    ],
)
def test_a_class_whose_name_has_a_comma_can_be_chosen(tmp_path, text, expected):
    photos(tmp_path, dict.fromkeys(["salt, rock", "pepper", "1-3", 'a "b", c', "sea", "sea,salt"], 4))
    assert data.load(tmp_path, classes=class_list(text)).classes == expected
    with pytest.raises(ValueError, match=r"no class 'salt'; .* \(names with commas in double quotes"):
        data.load(tmp_path, classes=class_list("salt,pepper"))


def test_a_part_without_classes_is_left_out_with_a_warning(tmp_path):
    found = photos(tmp_path, {"train/a": 8, "train/b": 8, "test": 5})
    with pytest.warns(UserWarning, match="test has pictures of no class: the test part is left out"):
        loaded = data.load(tmp_path, validation=0)
    assert "no test part" in loaded.notes[0]
    assert rows(torch.cat((loaded.x_train, loaded.x_test))) == found["train/a"] | found["train/b"]


def test_hidden_files_do_not_count_and_others_are_counted(tmp_path):
    photos(tmp_path, {"a": 5, "b": 5, "a/.thumbs": 3, ".cache": 3})
    (tmp_path / "a" / ".DS_Store").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = data.load(tmp_path)
    assert sum(len(labels) for labels in (loaded.y_train, loaded.y_val, loaded.y_test)) == 10
    for name in ("readme.txt", "a/notes.md", "b/Thumbs.db"):
        (tmp_path / name).write_text("")
    with pytest.warns(UserWarning, match="left out, no picture of a class: 3, such as") as warned:
        data.load(tmp_path)
    assert len(warned) == 1


@pytest.mark.parametrize("prefix", ["photos", "a/b/c", "test", "train"])
def test_classes_below_a_single_folder_are_found(tmp_path, prefix):
    found = photos(tmp_path, {f"{prefix}/{name}": 6 for name in "ab"})
    (tmp_path / "__MACOSX" / prefix).mkdir(parents=True)
    (tmp_path / "readme.txt").write_text("")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = data.load(tmp_path, validation=0)
    said = [str(warning.message) for warning in told]
    if prefix != "train":  # a folder "train" is another layout
        assert f"are not the classes: took those in these folders (train: {prefix})" in said.pop(0)
    assert said == [f"left out, no picture of a class: 1, such as {tmp_path / 'readme.txt'}"]
    assert loaded.classes == ("a", "b")
    for label, name in enumerate("ab"):
        parts = [rows(images[labels == label]) for images, labels in (loaded.train, loaded.test)]
        assert set.union(*parts) == found[f"{prefix}/{name}"]


@pytest.mark.parametrize(
    "names",
    [
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train_set", "test_set"),
        ("Training Data", "Testing Data"),
        ("flowers-train", "flowers-valid"),
        ("train/train", "test"),
        ("deep/train", "deep/test"),
    ],
)
def test_parts_one_level_deeper_or_with_longer_names_are_found(tmp_path, names):
    found = photos(tmp_path, {f"{part}/{name}": 6 for part in names for name in "ab"})
    photos(tmp_path, {"seg_pred/seg_pred": 2} if "seg" in names[0] else {})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = data.load(tmp_path, validation=0)
    assert "are not the classes: took those in these folders" in str(told[0].message)
    assert loaded.classes == ("a", "b")
    other = "x_val" if "valid" in names[1] else "x_test"
    train = loaded.x_train if other == "x_test" else torch.cat((loaded.x_train, loaded.x_test))
    for images, part in ((train, names[0]), (getattr(loaded, other), names[1])):
        assert rows(images) == found[f"{part}/a"] | found[f"{part}/b"]


def test_folders_of_folders_that_may_be_classes_are_spoken_of(tmp_path):
    photos(tmp_path, {f"{site}/{name}": 6 for site in ("north", "south") for name in "ab"})
    with pytest.warns(UserWarning, match=r"the folders in them \(a, b and so on\) are not told apart: if those are"):
        assert data.load(tmp_path).classes == ("north", "south")
    photos(tmp_path / "inverted", {f"{name}/{part}": 6 for part in ("train", "test") for name in "ab"})
    with pytest.raises(ValueError, match=r"has the parts test, train in the folders of its classes: the layout is"):
        data.load(tmp_path / "inverted")


def test_folders_below_the_classes_are_theirs_without_a_word(tmp_path):
    photos(tmp_path / "images", {f"{name}/images": 6 for name in "ab"})  # the layout of Tiny ImageNet
    photos(tmp_path / "words", {"train_station/old": 6, "train_station/new": 6, "test_tube": 6})
    photos(tmp_path / "some", {"a": 6, "a/more": 6, "a/most": 6, "b/more": 6, "b/most": 6})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.load(tmp_path / "images").classes == ("a", "b")
        assert data.load(tmp_path / "words").classes == ("test_tube", "train_station")
        assert len(data.load(tmp_path / "some", validation=0).y_train) < 30


def test_folders_that_are_no_set_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no folders with pictures; the layout is photos/CLASS"):
        data.load(tmp_path)
    photos(tmp_path, {"a": 4, "b": 4, "c": 0})
    with pytest.raises(ValueError, match="the class 'c' has no pictures"):
        data.load(tmp_path)
    photos(tmp_path / "parts", {"train/a": 4, "test/a": 1, "test/b": 1})
    with pytest.raises(ValueError, match="a class 'b' that the training part lacks"):
        data.load(tmp_path / "parts")
    photos(tmp_path / "two", {"train/a": 4, "val/a": 1, "valid/a": 1})
    with pytest.raises(ValueError, match="both val and valid"):
        data.load(tmp_path / "two")


def test_pictures_of_different_sizes_need_a_preprocessing(tmp_path):
    photos(tmp_path, {"a": 4})
    photos(tmp_path, {"b": 4}, size=(6, 8))
    with pytest.raises(ValueError, match=r"different sizes .*: 6 x [68], others: 6 x [68].*choose a model"):
        data.load(tmp_path)
    settings = Preprocessing((5, 5), crop=0.9)
    loaded = data.load(tmp_path, preprocessing=settings, validation=0, classes=["b"])
    expected = {settings.apply(read(path)).tobytes() for path in (tmp_path / "b").iterdir()}
    assert rows(loaded.x_train) | rows(loaded.x_test) == expected


def test_damaged_files_are_listed_or_left_out(tmp_path):
    photos(tmp_path, {"a": 20, "b": 20})
    for i in range(7):
        (tmp_path / "a" / f"{2 * i:03}.{('png', 'PNG', 'bmp')[2 * i % 3]}").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"7 of 40 pictures cannot be read; skip_corrupt=True(.|\n)*2 more") as error:
        data.load(tmp_path, seed=3)
    assert str(error.value).count("replace it or delete it") == 5
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = data.load(tmp_path, skip_corrupt=True, validation=0)
    assert "7 of 40 pictures were left out" in str(told[0].message)
    labels = torch.cat((loaded.y_train, loaded.y_test))
    images = torch.cat((loaded.x_train, loaded.x_test))
    assert labels.bincount().tolist() == [13, 20]
    whole = {read(path).tobytes() for path in (tmp_path / "b").iterdir()}
    assert {image.permute(1, 2, 0).numpy().tobytes() for image in images[labels == 1]} == whole
    for path in (tmp_path / "a").iterdir():
        path.write_bytes(path.name.encode())
    with pytest.warns(UserWarning, match="20 of 40"), pytest.raises(ValueError, match="class 'a' can be read"):
        data.load(tmp_path, skip_corrupt=True)
    for path in (tmp_path / "b").iterdir():
        path.write_bytes(b"b" + path.name.encode())
    with pytest.raises(ValueError, match="none of the 40 pictures can be read"):
        data.load(tmp_path, skip_corrupt=True)


BAD = {
    "empty.png": lambda path: path.touch(),
    "cut.png": lambda path: path.write_bytes(png(noise(20, 20))[:300]),
    "nowhere.png": lambda path: path.symlink_to(path.parent / "absent.png"),
    "itself.jpg": lambda path: path.symlink_to(path),
    "pipe.jpg": os.mkfifo,
}


@pytest.mark.parametrize("part", ["", "train", "test"])
def test_whatever_cannot_be_read_is_a_corrupt_picture(tmp_path, part):
    counts = {"a": 40, "b": 40} if not part else {f"{p}/{name}": 40 for p in ("train", "test") for name in "ab"}
    found = photos(tmp_path, counts)
    bad = [tmp_path / part / name / file for name in "ab" for file in BAD]
    for path in bad:
        BAD[path.name](path)
    count = 40 * len(counts) + len(bad)
    with pytest.raises(ValueError, match=f"10 of {count} pictures cannot be read; skip_corrupt=True") as error:
        data.load(tmp_path)
    assert sum(str(path) in str(error.value) for path in bad) == 5
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = data.load(tmp_path, skip_corrupt=True, validation=0)
    assert len(told) == 1, "those that are empty are not equal pictures under two labels or in two parts"
    assert f"10 of {count} pictures were left out" in str(told[0].message)
    images, labels = (torch.cat(parts) for parts in zip(loaded.train, loaded.val, loaded.test, strict=True))
    for label, name in enumerate("ab"):
        assert rows(images[labels == label]) == set().union(*(found[f] for f in found if f.endswith(name)))


def test_links_in_a_circle_are_followed_once(tmp_path):
    found = photos(tmp_path / "set", {"a": 6, "a/deep": 6, "b": 6})
    photos(tmp_path / "elsewhere", {"": 4})
    (tmp_path / "set" / "a" / "deep" / "up").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "a" / "0").symlink_to(tmp_path / "set" / "a" / "deep")
    (tmp_path / "set" / "b" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set" / "b")
    (tmp_path / "set" / "all").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "itself").symlink_to("itself")
    with pytest.warns(UserWarning, match="left out, no picture of a class: 2, such as .*all") as told:
        loaded = data.load(tmp_path / "set", validation=0)
    assert len(told) == 1
    assert loaded.classes == ("a", "b")
    labels = torch.cat((loaded.y_train, loaded.y_test))
    assert labels.bincount().tolist() == [12, 10]
    assert rows(torch.cat((loaded.x_train, loaded.x_test))) >= set.union(*found.values())


def test_a_damaged_picture_that_was_a_class_s_only_one_in_a_part_is_a_warning(tmp_path):
    photos(tmp_path, {"a": 12, "b": 12})
    (tmp_path / "a" / "000.png").write_bytes(b"damaged")
    for seed in range(1000):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loaded = data.load(tmp_path, skip_corrupt=True, seed=seed)
        said = sorted(str(warning.message) for warning in told)
        if said[1:]:  # the damaged picture was the only picture of its class in its part
            break
    part = "val" if "val" in said[1] else "test"
    assert said[0].startswith("1 of 24 pictures were left out")
    assert said[1].startswith(f"none of the {part} pictures of the class 'a' can be read: it has none in the part")
    assert (getattr(loaded, f"y_{part}") == 1).all()
    assert sum(len(labels) for labels in (loaded.y_train, loaded.y_val, loaded.y_test)) == 23


def test_too_little_memory_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    photos(tmp_path, {"a": 4, "b": 4})
    monkeypatch.setattr(decoding, "_free_memory", lambda: 8 * 3 * 50 * 50 - 1)
    assert data.load(tmp_path, preprocessing=Preprocessing((49, 50))).shape == (3, 49, 50)
    with pytest.raises(ValueError, match=r"8 images of 50 x 50 take 0\.0 GB .* smaller size"):
        data.load(tmp_path, preprocessing=Preprocessing((50, 50)))


# Parquet files


def parquet(path, pixels, labels, names=None, image="image", label="label", raw=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = [png(p) for p in pixels]
    column = pa.array(content, pa.binary()) if raw else pa.array([{"bytes": c, "path": None} for c in content])
    table = pa.table({image: column, "other": list(range(len(labels))), label: pa.array(labels, pa.int64())})
    if names:
        features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


@pytest.mark.parametrize("folder", ["", "data", "plain_text"])
def test_shards_are_read_in_order(tmp_path, folder):
    pixels = [noise(4, 4) for _ in range(14)]
    place = tmp_path / folder
    names = ("cat", "dog")
    parquet(place / "train-00001-of-00002.parquet", pixels[4:8], [1, 0, 1, 0], names)
    parquet(place / "train-00000-of-00002.parquet", pixels[:4], [0, 1, 1, 0], names)
    parquet(place / "validation-00000-of-00001.parquet", pixels[8:11], [1, 1, 0], names)
    parquet(place / "test.parquet", pixels[11:], [0, 1, 0], names)
    loaded = data.load(tmp_path)
    assert (loaded.classes, loaded.notes) == (names, ())
    assert loaded.y_train.tolist() == [0, 1, 1, 0, 1, 0, 1, 0]
    assert loaded.y_val.tolist() == [1, 1, 0]
    images = torch.cat((loaded.x_train, loaded.x_val, loaded.x_test))
    assert np.array_equal(images.permute(0, 2, 3, 1), np.stack(pixels))
    (place / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="some are missing"):
        data.load(tmp_path)


@pytest.mark.parametrize("other", [("dog", "cat"), ("cat", "dog", "bird")])
@pytest.mark.parametrize("where", ["shard", "part"])
def test_files_that_number_their_classes_otherwise_are_refused(tmp_path, where, other):
    first, second = ("test-00000-of-00002", "test-00001-of-00002") if where == "shard" else ("train", "test")
    parquet(tmp_path / f"{first}.parquet", [noise(4, 4) for _ in range(4)], [0, 1, 0, 1], ("cat", "dog"))
    parquet(tmp_path / f"{second}.parquet", [noise(4, 4) for _ in range(4)], [0, 1, 0, 1], other)
    if where == "shard":
        parquet(tmp_path / "train.parquet", [noise(4, 4) for _ in range(4)], [0, 1, 0, 1])  # without names
    with pytest.raises(ValueError, match=rf"{first}.* and .*{second}.* number their classes otherwise"):
        data.load(tmp_path)
    parquet(tmp_path / f"{second}.parquet", [noise(4, 4) for _ in range(4)], [0, 1, 0, 1])
    assert data.load(tmp_path).classes == ("cat", "dog")  # as the one file that has names says


def test_two_classes_of_one_name_stay_two(tmp_path):
    """ImageNet's short names have such classes. fastadv identifies classes only by their names."""
    names = ("crane", "maillot", "crane", "crane (2)")
    parquet(tmp_path / "train.parquet", [noise(4, 4) for _ in range(8)], [0, 1, 2, 3] * 2, names)
    parquet(tmp_path / "test.parquet", [noise(4, 4) for _ in range(4)], [3, 2, 1, 0], names)
    loaded = data.load(tmp_path, validation=0)
    assert loaded.classes == ("crane", "maillot", "crane (2)", "crane (2) (2)")
    assert data.held_out(tmp_path, loaded.classes).part.labels.tolist() == loaded.y_test.tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("label", ["label", "labels", "fine_label", "target", "cls"])
@pytest.mark.parametrize("raw", [False, True])
def test_one_file_is_split_and_its_classes_may_be_numbers(tmp_path, label, raw):
    pixels = [noise(4, 4) for _ in range(10)]
    parquet(tmp_path / "mine.parquet", pixels, [0, 2] * 5, image="img", label=label, raw=raw)
    loaded = data.load(tmp_path / "mine.parquet")
    assert loaded.classes == ("0", "2")
    assert "no test part" in loaded.notes[0]
    pairs = {(p.transpose(2, 0, 1).tobytes(), y) for p, y in zip(pixels, [0, 1] * 5, strict=True)}
    parts = (loaded.train, loaded.val, loaded.test)
    assert {
        (x.numpy().tobytes(), int(y)) for images, labels in parts for x, y in zip(images, labels, strict=True)
    } == pairs
    assert sum(len(y) for _, y in parts) == 10


def test_parquet_files_of_another_layout_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"pixels": [1, 2], "label": [0, 1]}), path)
    with pytest.raises(ValueError, match=r"needs a column image, img, .*its columns are pixels \(int64\), label"):
        data.load(path)
    with pytest.raises(ValueError, match=r"has parquet files \(a\.parquet\), but no train"):
        data.load(tmp_path)
    pq.write_table(pa.table({"image": [b"", b""], "label": [0.5, 1.5]}), path)
    with pytest.raises(ValueError, match=r"its columns are image \(binary\), label \(double\)"):
        data.load(path)
    paths = [{"bytes": None, "path": f"{i}.png"} for i in range(6)]
    paths = pa.array(paths, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": paths, "label": [0, 1] * 3}), path)
    with pytest.raises(ValueError, match=r"none of the 6 pictures .*/\d\.png cannot be read \(No such file"):
        data.load(path, test=0.5, validation=0)
    parquet(path, [noise(4, 4)] * 4, [-1] * 4)
    with pytest.raises(ValueError, match=r"has no labels .*: give files with labels, or the column that has them"):
        data.load(path)
    parquet(path, [noise(4, 4)] * 4, [0, 0, 5, 5], names=("cat", "dog"))
    with pytest.raises(ValueError, match="names 2 classes, and there is a label 5"):
        data.load(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="not a parquet file, or it is damaged"):
        data.load(path)


def named(path, pixels, labels, kind=None):
    """A parquet file with the given labels, whose pictures are files beside it."""
    files = [f"{path.stem}-{i}.png" for i in range(len(labels))]
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, image in zip(files, pixels, strict=True):
        (path.parent / file).write_bytes(png(image))
    kind = pa.struct({"bytes": kind or pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": None, "path": file} for file in files], kind)
    pq.write_table(pa.table({"image": images, "label": labels}), path)


@pytest.mark.parametrize("kind", [None, pa.null()], ids=str)
def test_labels_may_be_names_and_pictures_may_lie_beside_the_file(tmp_path, kind):
    pixels, labels = [noise(4, 4) for _ in range(30)], ["dog", "cat", "eel"] * 10
    named(tmp_path / "default" / "train" / "0000.parquet", pixels[:12], labels[:12], kind)
    named(tmp_path / "default" / "train" / "0001.parquet", pixels[12:24], labels[12:24])
    named(tmp_path / "default" / "test" / "0000.parquet", pixels[24:], labels[24:])
    loaded = data.load(tmp_path, validation=0)
    assert loaded.classes == ("cat", "dog", "eel")
    assert [loaded.classes[label] for label in (*loaded.y_train, *loaded.y_test)] == labels
    images = torch.cat((loaded.x_train, loaded.x_test))
    assert np.array_equal(images.permute(0, 2, 3, 1), np.stack(pixels))
    named(tmp_path / "default" / "test" / "0000.parquet", pixels[24:], ["cat", "dog", "cow"] * 2)
    with pytest.raises(ValueError, match="has the label 'cow', which the training part lacks"):
        data.load(tmp_path)
    named(tmp_path / "default" / "test" / "0000.parquet", pixels[24:], [0, 1, 2] * 2)
    with pytest.raises(ValueError, match="are integers in some files and strings in others"):
        data.load(tmp_path)


@pytest.mark.parametrize("train", ["train", "train/0"])
@pytest.mark.parametrize("test", ["test", "test/0"])
def test_each_part_is_files_or_a_folder_and_hidden_files_are_none(tmp_path, train, test):
    pixels = [noise(4, 4) for _ in range(24)]
    parquet(tmp_path / f"{train}.parquet", pixels[:12], [0, 1] * 6)
    parquet(tmp_path / f"{test}.parquet", pixels[12:], [0, 1] * 6)
    for hidden in (train, test):
        (tmp_path / hidden).with_name("._0.parquet").write_bytes(b"of macOS")
    loaded = data.load(tmp_path, validation=0)
    assert rows(loaded.x_train) == {p.transpose(2, 0, 1).tobytes() for p in pixels[:12]}
    assert rows(loaded.x_test) == {p.transpose(2, 0, 1).tobytes() for p in pixels[12:]}
    if train == "train":
        parquet(tmp_path / "train" / "1.parquet", pixels[:2], [0, 1])
        with pytest.warns(UserWarning, match=r"left out, of no part: 1 files, such as .*train/1\.parquet"):
            data.load(tmp_path)


@pytest.mark.parametrize("name", ["values", "testimony", "trainer-notes"])
def test_a_part_by_another_word_is_spoken_of(tmp_path, name):
    for file in ("train", "test-0", "val_clean", name):
        parquet(tmp_path / f"{file}.parquet", [noise(4, 4) for _ in range(8)], [0, 1] * 4)
    with pytest.warns(UserWarning, match=rf"/{name}\.parquet is taken for the (train|val|test) part, by how") as caught:
        data.load(tmp_path)
    assert len(caught) == 1


@pytest.mark.parametrize("names", [("val-0", "validation-0"), ("train", "trainval-1")])
def test_two_names_of_one_part_are_spoken_of(tmp_path, names):
    for file in {"train", "val", *names} - ({"val"} if "val-0" in names else set()):
        parquet(tmp_path / f"{file}.parquet", [noise(4, 4) for _ in range(8)], [0, 1] * 4)
    with pytest.warns(
        UserWarning, match=rf"part has {names[0]}\.parquet and {names[1]}\.parquet, and images"
    ) as caught:
        data.load(tmp_path)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002-0123abcd",),
        ("train-00000-of-00002", "train-00000-of-00002 (1)"),
        ("train-00001-of-00002", "train"),
    ],
)
def test_each_shard_must_be_there_once(tmp_path, names):
    for name in names:
        parquet(tmp_path / f"{name}.parquet", [noise(4, 4) for _ in range(12)], [0, 1] * 6)
    with pytest.raises(ValueError, match="some are missing or too many"):
        data.load(tmp_path)


def test_a_test_part_without_labels_is_left_out_with_a_warning(tmp_path):
    pixels = [noise(4, 4) for _ in range(60)]
    parquet(tmp_path / "train.parquet", pixels[:40], [0, 1] * 20)
    parquet(tmp_path / "validation.parquet", pixels[40:50], [0, 1] * 5)
    parquet(tmp_path / "test.parquet", pixels[50:], [-1] * 10)
    with pytest.warns(UserWarning, match=r"the test part in .* has no labels .*: it is left out"):
        loaded = data.load(tmp_path)
    assert "no test part" in loaded.notes[0]
    assert rows(torch.cat((loaded.x_train, loaded.x_test))) == {p.transpose(2, 0, 1).tobytes() for p in pixels[:40]}
    parquet(tmp_path / "test.parquet", pixels[50:], [-1] * 9 + [0])
    with pytest.raises(ValueError, match="has the label -1, of images without a label: leave out those rows"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (
            "config/de/train.parquet",
            r"files \.parquet \(of parquet files give the folder that holds train\*\.parquet\)",
        ),
        ("train/data-00000-of-00001.arrow", r"files \.arrow \(a set that save_to_disk wrote .* to_parquet\)"),
        ("train/000.tar", r"files \.tar \(unpack archives first\)"),
        ("train/notes.txt", r"files \.txt; the layout is photos/CLASS"),
    ],
)
def test_other_layouts_are_refused_with_what_works(tmp_path, file, words):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=f"has no folders with pictures, but {words}"):
        data.load(tmp_path)


def test_parquet_files_of_no_part_are_spoken_of_and_labels_may_be_truths(tmp_path):
    columns = {"image": [png(noise(4, 4)) for _ in range(24)], "label": [True, False, True] * 8}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    pq.write_table(pa.table(columns), tmp_path / "extra.parquet")
    with pytest.warns(UserWarning, match=r"left out, of no part: 1 files, such as .*extra\.parquet"):
        loaded = data.load(tmp_path, validation=0)
    assert loaded.classes == ("False", "True")
    assert torch.cat((loaded.y_train, loaded.y_test)).bincount().tolist() == [8, 16]


@pytest.mark.parametrize("kind", ["minus one", "null", "null column", "no column", "text"])
@pytest.mark.parametrize("part", ["test", "validation"])
def test_a_part_without_labels_of_any_kind_is_left_out(tmp_path, kind, part):
    pixels = [noise(4, 4) for _ in range(50)]
    parquet(tmp_path / "train.parquet", pixels[:40], [0, 1] * 20, names=("cat", "dog"))
    labels = {"minus one": pa.array([-1] * 10), "null": pa.array([None] * 10, pa.int64()), "null column": pa.nulls(10)}
    labels["text"] = pa.array(["", " "] * 5)
    column = {} if kind == "no column" else {"label": labels[kind]}
    pq.write_table(pa.table({"image": [png(p) for p in pixels[40:]], **column}), tmp_path / f"{part}.parquet")
    with pytest.warns(UserWarning, match=f"the {part[:3]}.* part in .* has no labels .*: it is left out"):
        loaded = data.load(tmp_path)
    assert loaded.classes == ("cat", "dog")
    parts = torch.cat((loaded.x_train, loaded.x_val, loaded.x_test))
    assert rows(parts) == {p.transpose(2, 0, 1).tobytes() for p in pixels[:40]}
    (tmp_path / "train.parquet").unlink()
    (tmp_path / f"{part}.parquet").rename(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"has no labels .*: give files with labels, or the column that has them"):
        data.load(tmp_path)


def test_some_missing_labels_are_refused_and_missing_pictures_are_corrupt(tmp_path):
    content, labels = [png(noise(4, 4)) for _ in range(90)], ["b", "a", "c"] * 30
    pq.write_table(
        pa.table({"image": content, "label": [None, RNG.choice(["", " "]), *labels[2:]]}), tmp_path / "p.parquet"
    )
    with pytest.raises(ValueError, match="2 of 90 labels are missing: leave out those rows"):
        data.load(tmp_path / "p.parquet")
    content[4], content[7], content[8] = None, b"", b"damaged"
    categories = pa.array(labels).dictionary_encode()
    pq.write_table(pa.table({"image": content, "label": categories}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"3 of 90 pictures cannot be read(.|\n)*p\.parquet, row [47] is empty"):
        data.load(tmp_path / "p.parquet")
    with pytest.warns(UserWarning, match="3 of 90 pictures were left out"):
        loaded = data.load(tmp_path / "p.parquet", skip_corrupt=True, validation=0)
    assert loaded.classes == ("a", "b", "c")
    assert torch.cat((loaded.y_train, loaded.y_test)).bincount().tolist() == [28, 30, 29]


def test_names_that_differ_in_capitals_or_spaces_alone_are_warned_of_wherever_they_come_from(tmp_path):
    content, names = [png(noise(4, 4)) for _ in range(24)], ["cat", "Cat ", "dog"]
    pq.write_table(pa.table({"image": content, "label": names * 8}), tmp_path / "texts.parquet")
    parquet(tmp_path / "metadata.parquet", [noise(4, 4) for _ in range(24)], [0, 1, 2] * 8, names)
    for file in ("texts", "metadata"):
        with pytest.warns(UserWarning, match="the classes 'Cat ', 'cat' differ in capitals or spaces alone"):
            data.load(tmp_path / f"{file}.parquet")


def test_a_folder_of_cifar10_is_refused_for_other_data(tmp_path):
    photos(tmp_path / "photos", {"a": 4, "b": 4})
    for path in (tmp_path / "photos", "digits"):
        with pytest.raises(ValueError, match=r"folder is where cifar10 is, and the data are .*: leave folder out"):
            data.load(path, folder=tmp_path)


def test_columns_of_other_names_are_taken_where_they_are_named(tmp_path):
    pixels = [noise(4, 4) for _ in range(24)]
    coarse, fine = [0, 1] * 12, [0, 1, 2] * 8
    columns = {"image": [b"thumb"] * 24, "scan": [png(p) for p in pixels], "label": fine, "site": coarse}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    loaded = data.load(tmp_path, image_column="scan", label_column="site", validation=0)
    assert loaded.classes == ("0", "1")
    for label in (0, 1):
        images = torch.cat((loaded.x_train[loaded.y_train == label], loaded.x_test[loaded.y_test == label]))
        assert rows(images) == {p.transpose(2, 0, 1).tobytes() for p in pixels[label::2]}
    assert data.load(tmp_path, image_column="scan").classes == ("0", "1", "2")
    with pytest.raises(ValueError, match=r"has no column 'scam'; its columns are image \(binary\), scan"):
        data.load(tmp_path, image_column="scam")
    with pytest.raises(ValueError, match="its columns are image"):
        data.load(tmp_path, image_column="scan", label_column="image")
    photos(tmp_path / "photos", {"a": 4, "b": 4})
    with pytest.raises(ValueError, match=r"are for parquet files, and .*photos' has none"):
        data.load(tmp_path / "photos", label_column="site")
    with pytest.raises(ValueError, match="are for parquet files, and 'digits' has none"):
        data.load("digits", image_column="scan")


# CIFAR-10

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def batches(count=20):
    """{file: (pixels (N, 3072), labels)} for each batch."""
    return {
        name: (RNG.integers(0, 256, (count, 3072), dtype=np.uint8), RNG.permutation(count) % 10) for name in BATCHES
    }


def binary(content):
    return {
        f"cifar-10-batches-bin/{name}.bin": np.column_stack((labels.astype(np.uint8), pixels)).tobytes()
        for name, (pixels, labels) in content.items()
    }


def python(content):
    return {
        f"cifar-10-batches-py/{name}": pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=2)
        for name, (pixels, labels) in content.items()
    }


def write(folder, files, archive=None):
    folder.mkdir(parents=True, exist_ok=True)
    if archive is None:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        return
    with tarfile.open(folder / archive, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def is_cifar(loaded, content):
    pixels = np.concatenate([content[name][0] for name in BATCHES]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([content[name][1] for name in BATCHES])
    assert loaded.classes == CLASSES
    assert np.array_equal(torch.cat((loaded.x_train, loaded.x_test)), pixels)
    assert np.array_equal(torch.cat((loaded.y_train, loaded.y_test)), labels)


@pytest.mark.parametrize(("make", "archive"), [(binary, "cifar-10-binary.tar.gz"), (python, "cifar-10-python.tar.gz")])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "extracted"])
def test_cifar10_is_read_from_its_archives(tmp_path, monkeypatch, make, archive, packed):
    content = batches()
    write(tmp_path / "cifar10", make(content), archive if packed else None)
    is_cifar(data.load("cifar10", folder=tmp_path, validation=0), content)
    monkeypatch.setenv("FASTADV_DATA", str(tmp_path / "cifar10"))
    is_cifar(data.load("cifar10", validation=0), content)
    assert (data.load("cifar10").y_val.bincount(minlength=10) > 0).all()


def test_cifar10_is_read_from_parquet_files_in_the_working_folder(tmp_path, monkeypatch):
    content = batches(10)
    for part, names in (("train", BATCHES[:5]), ("test", BATCHES[5:])):
        pixels = np.concatenate([content[name][0] for name in names]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = np.concatenate([content[name][1] for name in names])
        parquet(tmp_path / "data" / "cifar10" / "plain_text" / f"{part}.parquet", pixels, labels, CLASSES, image="img")
    monkeypatch.delenv("FASTADV_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    is_cifar(data.load("cifar10", validation=0), content)


def test_what_is_not_cifar10_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"parquet files of the data set cifar10 .* or cifar-10-binary\.tar\.gz"
    ):
        data.load("cifar10", folder=tmp_path)
    parquet(tmp_path / "train.parquet", [noise(32, 32)] * 4, [0, 0, 1, 1], names=("cat", "dog"))
    with pytest.raises(ValueError, match=r"are not CIFAR-10: their classes are \('cat', 'dog'\)"):
        data.load("cifar10", folder=tmp_path)
    parquet(tmp_path / "train.parquet", [noise(32, 32)] * 4, [0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"not complete: .* has no test\*\.parquet"):
        data.load("cifar10", folder=tmp_path)
    (tmp_path / "train.parquet").unlink()
    files = binary(batches())
    cut = {**files, "cifar-10-batches-bin/data_batch_2.bin": b"short"}
    write(tmp_path / "cut", cut)
    with pytest.raises(ValueError, match=r"data_batch_2\.bin is damaged"):
        data.load("cifar10", folder=tmp_path / "cut")
    files.pop("cifar-10-batches-bin/data_batch_3.bin")
    write(tmp_path / "some", files)
    with pytest.raises(ValueError, match="data_batch_3 missing"):
        data.load("cifar10", folder=tmp_path / "some")
    (tmp_path / "half").mkdir()
    write(tmp_path / "half", files, "cifar-10-binary.tar.gz")
    whole = (tmp_path / "half" / "cifar-10-binary.tar.gz").read_bytes()
    (tmp_path / "half" / "cifar-10-binary.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        data.load("cifar10", folder=tmp_path / "half")


class Harm:
    def __reduce__(self):
        return types.SimpleNamespace, ()


def test_a_pickle_that_wants_more_than_arrays_is_refused(tmp_path):
    files = python(batches())
    files["cifar-10-batches-py/data_batch_4"] = pickle.dumps({b"data": Harm(), b"labels": []})
    write(tmp_path, files)
    with pytest.raises(ValueError, match=r"it wants types\.SimpleNamespace, which no array needs"):
        data.load("cifar10", folder=tmp_path)


def test_a_picture_is_no_program(tmp_path, monkeypatch):
    """A PostScript file is a program. Pillow would let Ghostscript run it under any file name."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow stores here where it found Ghostscript
    for name in ("a.jpg", "a.eps"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "EPS")
        with pytest.raises(ValueError, match="cannot be read as a picture"):
            read(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    assert not {".eps", ".ps"} & extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif"} <= extensions()


def test_parquet_parts_without_rows_are_no_parts(tmp_path):
    pixels = [noise(4, 4) for _ in range(40)]
    parquet(tmp_path / "train.parquet", pixels, [0, 1] * 20)
    parquet(tmp_path / "test.parquet", [], [], raw=True)
    with pytest.warns(UserWarning, match=r"the test part in .* has no labels \(no rows,.*: it is left out"):
        assert len(data.load(tmp_path).x_test) > 0
    parquet(tmp_path / "alone.parquet", [], [], raw=True)
    with pytest.raises(ValueError, match=r"has no labels \(no rows,"):
        data.load(tmp_path / "alone.parquet")


def test_arrays_that_nobody_reads_are_spoken_of(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays(x_valid=arrays()["x_test"], y_valid=np.arange(4)))
    with pytest.warns(UserWarning, match=r"left out, of no part: x_valid, y_valid \(validation images are x_val"):
        data.load(tmp_path / "set.npz")


def test_a_number_that_is_a_name_and_no_label_is_no_class_without_images():
    with pytest.raises(ValueError, match="the one called 10 or the label 10, which is no class's: give all classes"):
        labels_of([10, 2], ("02", "10"))
