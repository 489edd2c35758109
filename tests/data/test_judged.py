"""The images that judge a model: their choice, their labels, and the files that are not read."""

import io
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fastadv import cli, data, models, to_float
from fastadv.data import pictures
from fastadv.data.splits import Split

RNG = np.random.default_rng()
CLASSES = ("rose", "daisy", "tulip")  # not sorted


def png():
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1).tobytes()


def photos(root, *folders, count=12):
    """Write `count` pictures in each folder. Returns the set of their (pixels, name of the folder)."""
    found = set()
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            content = png()
            (root / folder / f"{RNG.integers(1 << 40):010x}.png").write_bytes(content)
            found.add((pixels(content), folder.rpartition("/")[2]))
    return found


def images_of(chosen, **options):
    """The set of (pixels, the model's name of the class) of the images."""
    images, labels = chosen.decoded(None, options.get("skip_corrupt", False))
    assert len(images) == len(labels)
    return {(image.numpy().tobytes(), CLASSES[label]) for image, label in zip(images, labels, strict=True)}


@pytest.fixture
def read_files(monkeypatch):
    """A set that gets the names of the files whose content is read."""
    names, stored = set(), pictures.Picture.stored
    monkeypatch.setattr(pictures.Picture, "stored", lambda self: names.add(self.name) or stored(self))
    return names


def spoil(folder):
    """Add files that must not matter: damaged pictures, a class without pictures, an unknown class, a pipe."""
    for name in ("rose", "cactus", "empty"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "rose" / "bad.png").write_bytes(b"damaged")
    (folder / "cactus" / "1.png").write_bytes(png())
    os.mkfifo(folder / "cactus" / "2.png")


@pytest.mark.parametrize("names", [CLASSES, ("daisy", "rose"), ("tulip",)])
def test_a_plain_folder_is_judged_whole_by_the_names_of_its_classes(tmp_path, names):
    found = photos(tmp_path, *names)
    chosen = data.held_out(tmp_path, CLASSES)
    assert images_of(chosen) == found
    assert "all judge it (if it was trained on them, part test keeps" in chosen.notes[0]


@pytest.mark.parametrize("part", [None, "test"])
@pytest.mark.parametrize("others", ["", "train", "val", "train,val"])
def test_the_test_part_alone_is_looked_at(tmp_path, part, others, read_files):
    found = photos(tmp_path, *(f"test/{name}" for name in CLASSES[:2]))
    for other in filter(None, others.split(",")):
        spoil(tmp_path / other)
    chosen = data.held_out(tmp_path, CLASSES, part=part)
    assert images_of(chosen) == found
    assert chosen.notes == ()
    assert {os.path.relpath(name, tmp_path).split(os.sep)[0] for name in read_files} == {"test"}


def test_all_is_every_image_of_every_part(tmp_path):
    found = photos(tmp_path, *(f"{part}/{name}" for part in ("train", "val", "test") for name in CLASSES))
    assert images_of(data.held_out(tmp_path, CLASSES, part="all")) == found
    shutil.rmtree(tmp_path / "train")
    shutil.rmtree(tmp_path / "test" / "tulip")
    assert len(images_of(data.held_out(tmp_path, CLASSES, part="all"))) == 12 * 5
    with pytest.raises(ValueError, match="unknown part 'val'; there are test, all"):
        data.held_out(tmp_path, CLASSES, part="val")


def test_uint8_and_float_parts_are_judged_together_and_known_by_what_they_were(tmp_path):
    codes = RNG.integers(0, 256, (40, 3, 4, 4), dtype=np.uint8)
    labels = np.arange(40) % 2
    np.savez(tmp_path / "set.npz", x_train=codes[:20], y_train=labels[:20], x_test=codes[20:] / 255, y_test=labels[20:])
    record = data.TrainedOn.of(data.load(tmp_path / "set.npz", validation=0))
    chosen = data.held_out(tmp_path / "set.npz", ("0", "1"), part="all")
    assert torch.equal(chosen.part.images, torch.from_numpy(codes / 255).float())
    assert record.knows(chosen.part.digests).tolist() == [True] * 20 + [False] * 20


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(ValueError, match=f"limit must be at least 1, got {limit}"):
        data.held_out("digits", tuple("0123456789"), limit=limit)


@pytest.mark.parametrize("seed", [0, 3])
def test_of_the_set_of_the_training_its_test_part_judges(tmp_path, seed):
    found = photos(tmp_path / "mine", *CLASSES, count=40)
    loaded = data.load(tmp_path / "mine", classes=CLASSES, seed=seed, test=0.3)
    test = {(image.numpy().tobytes(), CLASSES[label]) for image, label in zip(*loaded.test, strict=True)}
    record = [data.TrainedOn.of(loaded)]
    for part, split in ((None, None), ("test", None), (None, Split(seed, 0.3))):
        chosen = data.held_out(tmp_path / "mine", CLASSES, trained_on=record, part=part, split=split)
        assert images_of(chosen) == test
        said = f"{len(test)} of the 120 images of its training part ({len(test) / 120:.0%}) are the test part"
        assert f"{said}, chosen by seed {seed}" in chosen.notes[0]
        assert f"{len(loaded.y_train)} of the set's 120 images are the model's training images" in chosen.notes[-1]
    assert images_of(data.held_out(tmp_path / "mine", CLASSES, trained_on=record, part="all")) == found
    some = data.held_out(tmp_path / "mine", CLASSES, trained_on=record, classes=["tulip"])
    assert images_of(some) == {(image, name) for image, name in test if name == "tulip"}

    other = photos(tmp_path / "other", *CLASSES)
    chosen = data.held_out(tmp_path / "other", CLASSES, trained_on=record)
    assert images_of(chosen) == other
    assert f"0 of its {len(other)} images are the model's training images: all judge it" in chosen.notes[0]
    trained = sorted(loaded.digests["train"].tolist())
    copies = [path for path in (tmp_path / "mine" / "rose").iterdir() if _digest(path) in trained]
    shutil.copy(copies[0], tmp_path / "other" / "rose")  # 1 of 37 images is below the limit of 5 %
    chosen = data.held_out(tmp_path / "other", CLASSES, trained_on=record)
    assert len(images_of(chosen)) == 37
    assert "1 of its 37 images are" in chosen.notes[0]
    without = [data.TrainedOn(record[0].split, 10**7, None)]  # too many training images to be remembered
    assert len(images_of(data.held_out(tmp_path / "mine", CLASSES, trained_on=without))) == len(test)


def _digest(path):
    return data.source.digests([pictures.Picture(str(path))]).item()


def test_classes_that_the_model_does_not_know_are_refused_by_name_or_left_out(tmp_path):
    found = photos(tmp_path, "rose", "cactus", "daisy", "moss")
    with pytest.raises(
        ValueError, match="does not know the classes cactus, moss: choose those that it knows: daisy, rose"
    ):
        data.held_out(tmp_path, CLASSES)
    chosen = data.held_out(tmp_path, CLASSES, classes=["rose", "daisy"])
    assert images_of(chosen) == {(image, name) for image, name in found if name in ("rose", "daisy")}
    with pytest.raises(ValueError, match="the classes cactus: it knows rose, daisy, tulip"):
        data.held_out(tmp_path, CLASSES, classes=["cactus"])


def test_a_sample_is_read_alone_and_always_the_same(tmp_path, read_files):
    found = photos(tmp_path / "set", *(f"test/{name}" for name in CLASSES), count=30)
    first, again = (images_of(data.held_out(tmp_path / "set", CLASSES, limit=20)) for _ in range(2))
    assert first == again < found
    assert len(read_files) == len(first) == 20
    assert {name for _, name in first} == set(CLASSES)


def test_corrupt_pictures_are_refused_or_left_out(tmp_path):
    found = photos(tmp_path, *CLASSES)
    (tmp_path / "rose" / "bad.png").write_bytes(b"damaged")
    (tmp_path / "daisy" / "gone.png").symlink_to("absent")
    with pytest.raises(ValueError, match=r"2 of 38 pictures cannot be read"):
        data.held_out(tmp_path, CLASSES).decoded(None, False)
    with pytest.warns(UserWarning, match="2 of 38 pictures were left out"):
        assert images_of(data.held_out(tmp_path, CLASSES), skip_corrupt=True) == found


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_arrays_and_parquet_files_need_no_training_part_either(tmp_path, kind):
    content, labels = [png() for _ in range(30)], [["tulip", "rose", "daisy"][i % 3] for i in range(30)]
    classes, path = (CLASSES, tmp_path) if kind == "parquet" else (("7", "5", "6"), tmp_path / "set.npz")
    expected = {(pixels(c), label) for c, label in zip(content, labels, strict=True)}
    if kind == "parquet":
        pq.write_table(pa.table({"image": content, "label": labels}), tmp_path / "test.parquet")
        (tmp_path / "train.parquet").write_bytes(b"damaged")
    else:
        images = np.stack([np.frombuffer(pixels(c), np.uint8).reshape(3, 6, 6) for c in content])
        np.savez(path, x_test=images, y_test=np.array([7, 5, 6])[[CLASSES.index(label) for label in labels]])
    assert images_of(data.held_out(path, classes)) == expected
    with pytest.raises(ValueError, match=r"damaged|no array [xy]_train"):
        data.load(path)
    if kind == "parquet":  # a test part without labels is left out
        pq.write_table(pa.table({"image": content[:9], "label": [-1] * 9}), tmp_path / "test.parquet")
        pq.write_table(pa.table({"image": content, "label": labels}), tmp_path / "train.parquet")
        with pytest.warns(UserWarning, match=r"the test part .* it is left out"):
            assert images_of(data.held_out(path, classes)) == expected


def test_the_command_says_that_all_of_the_training_s_folder_overlaps(tmp_path, capsys):
    photos(tmp_path / "mine", *CLASSES, count=20)
    common = ["--data", str(tmp_path / "mine"), "--device", "cpu"]
    fast = ["--model", "mlp", "--attack", "none", "--epochs", "1", "--probe", "0", "--eval-every", "0"]
    cli.main(["finetune", *common, *fast, "--out", str(tmp_path / "run")])
    weights = tmp_path / "run" / "model.safetensors"
    out = tmp_path / "report"
    evaluate = ["evaluate", *common, "--model", str(weights), "--attacks", "fgsm", "--out", str(out)]
    with pytest.raises(SystemExit, match=r"was trained on \d\d of the 60 images that are to judge it.*--part test"):
        cli.main([*evaluate, "--part", "all"])
    assert not out.exists()
    capsys.readouterr()
    cli.main([*evaluate, "--part", "all", "--allow-overlap"])
    report = json.loads((out / "report.json").read_text())
    assert report["trained_on"] == len(data.load(tmp_path / "mine").y_train)
    assert f"was trained on {report['trained_on']} of the 60" in capsys.readouterr().out
    model = models.load(weights)
    images, labels = data.held_out(tmp_path / "mine", model.classes, part="all").decoded(None, False)
    with torch.no_grad():
        right = model.on_pixels.eval()(to_float(images)).argmax(1) == labels
    assert report["clean_correct"] == right.tolist()


def test_a_class_asked_for_that_has_no_images_is_named(tmp_path):
    content, names = [png() for _ in range(6)], ["rose", "daisy", "cactus"]
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table({"image": content, "label": [0] * 6})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "test.parquet")
    assert {name for _, name in images_of(data.held_out(tmp_path, CLASSES))} == {"rose"}
    with pytest.raises(ValueError, match="there are no images of daisy, cactus to judge"):
        data.held_out(tmp_path, CLASSES, classes=names)
