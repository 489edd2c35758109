"""Decoding of pictures: at a reduced size where nothing is lost, with a thread for each core, and with a message."""

import io
import logging
import sys
import threading

import numpy as np
import pytest
from attacked import fresh_seed
from PIL import Image, ImageOps

from fastadv import cli
from fastadv.data import decoding
from fastadv.data.decoding import cores, decode_all
from fastadv.data.pictures import Picture, decode
from fastadv.preprocessing import Preprocessing


def photo(width, height):
    """A smooth picture with the noise of a sensor."""
    rng = np.random.default_rng(fresh_seed())
    coarse = Image.fromarray(rng.integers(0, 256, (max(2, height // 100), max(2, width // 100), 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return Image.fromarray((smooth + rng.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Picture("one", buffer.getvalue())


def whole(picture, preprocessing):
    """The picture as Pillow decodes it, upright."""
    with Image.open(io.BytesIO(picture.content)) as image:
        return preprocessing.apply(ImageOps.exif_transpose(image).convert("RGB"))


def decoded_size(picture, enough):
    return decode(picture.content, "one", enough)[0].size


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("size", "crop", "divisor"), [((32, 32), 1.0, 8), ((56, 40), 0.875, 4), ((90, 120), 1.0, 2)])
def test_a_large_jpeg_is_decoded_smaller_and_hardly_a_pixel_differs(size, crop, divisor, interpolation):
    preprocessing = Preprocessing(size, crop=crop, interpolation=interpolation)
    for width, height in ((800, 600), (801, 602), (815, 607)):
        picture = encoded(photo(width, height), quality=95)
        smaller = decoded_size(picture, preprocessing.enough)
        assert smaller == (-(-width // divisor), -(-height // divisor))
        assert all(side >= 2 * least / crop - 2 for side, least in zip(smaller, size[::-1], strict=True))
        difference = np.abs(picture.prepared(preprocessing).astype(int) - whole(picture, preprocessing))
        assert difference.mean() < 0.5
        assert difference.max() <= 3


@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
def test_a_picture_that_is_to_be_turned_is_measured_upright(orientation):
    """The picture is stored as 1,207 x 301. The shorter side of the upright picture decides whether it is reduced."""
    exif = Image.Exif()
    if orientation is not None:
        exif[274] = orientation
    picture = encoded(photo(1207, 301), exif=exif, quality=95)
    turns = orientation in (5, 6, 7, 8)
    tall = Preprocessing((300, 70), interpolation="bilinear")
    assert decoded_size(picture, tall.enough) == ((151, 604) if turns else (1207, 301))
    wide = Preprocessing((70, 300), interpolation="bilinear")
    assert decoded_size(picture, wide.enough) == ((301, 1207) if turns else (604, 151))
    for preprocessing in (tall, wide):
        difference = np.abs(picture.prepared(preprocessing).astype(int) - whole(picture, preprocessing))
        assert difference.mean() < 0.5
        assert difference.max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_a_picture_of_any_kind_is_turned_before_it_is_resized(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = encoded(photo(120, 75), kind, exif=exif, **options)
    preprocessing = Preprocessing((30, 40), interpolation="bicubic")
    assert np.array_equal(picture.prepared(preprocessing), whole(picture, preprocessing))


@pytest.mark.parametrize(
    ("kind", "picture", "options"),
    [
        ("JPEG", (255, 400), {}),  # less than four times the size on a side
        ("PNG", (640, 512), {}),
        ("WEBP", (640, 512), {}),
        ("JPEG", (640, 512), {"interpolation": "nearest"}),  # this interpolation takes single pixels
        ("JPEG", (64, 64), {}),
    ],
)
def test_all_others_keep_every_bit(kind, picture, options):
    preprocessing = Preprocessing((64, 64), **options)
    picture = encoded(photo(*picture), kind)
    assert np.array_equal(picture.prepared(preprocessing), whole(picture, preprocessing))


def test_a_large_jpeg_of_another_size_is_refused_and_not_reduced():
    pictures = [encoded(photo(16, 16)), encoded(photo(128, 128))]
    with pytest.raises(ValueError, match=r"different sizes .*128 x 128, others: 16 x 16"):
        decode_all(pictures, None, False)


# ---------------------------------------------------------------------- threads


@pytest.fixture
def at_a_time(monkeypatch):
    """A function that decodes 12 pictures, each slowly, and returns how many are decoded at the same time."""
    lock, now, seen = threading.Lock(), [0], []
    more = threading.Event()

    def prepared(picture, preprocessing):
        with lock:
            now[0] += 1
            seen.append(now[0])
        more.wait(0.05)
        with lock:
            now[0] -= 1
        return np.zeros(preprocessing.shape, np.uint8)

    monkeypatch.setattr(Picture, "prepared", prepared)

    def decoded(workers):
        seen.clear()
        decode_all([Picture("one", b"")] * 12, Preprocessing((8, 8)), False, workers)
        return max(seen)

    return decoded


def test_as_many_threads_decode_as_are_told_or_as_there_are_cores(at_a_time, monkeypatch):
    assert [at_a_time(workers) for workers in (1, 2, 5)] == [1, 2, 5]
    monkeypatch.setattr("joblib.cpu_count", lambda: 4)  # this function knows affinity and containers
    assert at_a_time(None) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (cores(), at_a_time(None)) == (2, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert cores() == 1
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        at_a_time(0)


def test_the_command_line_says_how_many(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(6):
            photo(20, 20 + i).save(tmp_path / "set" / name / f"{i}.png")
    options = ["--data", str(tmp_path / "set"), "--model", "mlp", "--out", str(tmp_path / "out"), "--workers", "0"]
    with pytest.raises(SystemExit, match="workers must be at least 1, got 0"):
        cli.main(["finetune", *options])


# ---------------------------------------------------------------------- messages


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_off_a_terminal_there_is_a_line_and_on_one_a_bar(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fastadv")
    tqdm = decoding.require("tqdm").tqdm
    monkeypatch.setattr("tqdm.tqdm", lambda **options: tqdm(**{**options, "delay": 0}))
    pictures = [encoded(photo(16, 16))] * 1200
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    decode_all(pictures, None, False, 2)
    assert (caplog.messages, sys.stderr.getvalue()) == (["decoding 1,200 pictures with 2 workers"], "")
    caplog.clear()
    monkeypatch.setattr(sys, "stderr", Terminal())
    decode_all(pictures, None, False, 2)
    assert caplog.messages == []
    assert "decoding: 100%" in sys.stderr.getvalue()
    assert "1200/1200" in sys.stderr.getvalue()
