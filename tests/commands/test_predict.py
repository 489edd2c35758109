"""fastadv predict gives every picture a row, whatever its name is and whatever else is in the folder."""

import csv
import io
import json
import os
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastadv import cli, models
from fastadv.commands import predict
from fastadv.commands.tables import table
from fastadv.data import pictures, walking
from fastadv.preprocessing import Preprocessing

CLASSES = ("salt, rock", 'say "b"', "çä")
ODD = ["a, b.png", 'with "quotes".png', "two\nlines.png", "tab\t;.png", "ü雪\u200d.png", "x" * 251 + ".png", "=1+1.png"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model of three classes for 12 x 10 pictures, whose predictions differ from picture to picture."""
    torch.manual_seed(0)
    model = models.source("mlp").build(CLASSES, (3, 12, 10))
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(3)
    model.preprocessing = Preprocessing((12, 10), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    models.save(model, path)
    return path


def pixels():
    return np.random.default_rng().integers(0, 256, (12, 10, 3), dtype=np.uint8)


def encoded(kind="png"):
    buffer = io.BytesIO()
    Image.fromarray(pixels()).save(buffer, kind)
    return buffer.getvalue()


def photos(folder, names):
    """Write a picture under each name. Returns {path: pixels} for predictions by hand."""
    found = {}
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        found[str(path)] = pixels()
        Image.fromarray(found[str(path)]).save(path, "png")
    return found


def shares(weights, images):
    """{path: float64 probabilities of the classes}."""
    network = models.load(weights).network.eval().double()
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.5, 0.4, 0.3), (0.2, 0.2, 0.3)))
    batch = torch.from_numpy(np.stack(list(images.values()))).permute(0, 3, 1, 2).double() / 255
    with torch.no_grad():
        return dict(zip(images, network((batch - mean) / std).softmax(1).tolist(), strict=True))


def classified(weights, out, *words, status=None):
    """({picture: its row in the output of `fastadv predict`}, the message of an error)."""
    words = ["predict", *map(str, words), "--model", str(weights), "--out", str(out), "--device", "cpu"]
    said = ""
    if status is None:
        cli.main(words)
    else:
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        said = str(ended.value.code)
        assert ended.value.code not in (0, None)
    if out.suffix == ".json":
        rows = json.loads(out.read_bytes())
    else:
        rows = list(csv.DictReader(out.open(newline="", encoding="utf-8")))
    assert len({row["picture"] for row in rows}) == len(rows)
    return {row["picture"]: row for row in rows}, said


def are_right(rows, expected):
    for path, values in expected.items():
        says = values[CLASSES.index(rows[path]["class"])]
        assert says == pytest.approx(max(values), abs=1e-4)
        assert float(rows[path]["probability"]) == pytest.approx(says, abs=1e-4)
        assert not rows[path]["error"]


def cut(kind):
    def write(path):
        content = encoded(kind)
        path.write_bytes(content[: 2 * len(content) // 3])

    return write


# {name: a function that writes a file that is no readable picture}.
BAD = {
    "cut.png": cut("png"),
    "cut.jpg": cut("jpeg"),
    "cut.webp": cut("webp"),
    "empty.jpg": lambda path: path.touch(),
    "text.gif": lambda path: path.write_text("<html>not found</html>"),
    "._x.jpg": lambda path: path.write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X        " + bytes(80)),
    "nowhere.png": lambda path: path.symlink_to(path.parent / "absent.png"),
    "itself.png": lambda path: path.symlink_to(path),
    "pipe.jpg": os.mkfifo,
    "bomb.png": lambda path: path.write_bytes(encoded().replace(b"\0\0\0\x0a\0\0\0\x0c", b"\0\1\0\0\0\1\0\0")),
}


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_a_picture_that_cannot_be_read_costs_its_row_alone(weights, tmp_path, batch):
    images = photos(tmp_path / "new", [f"{name}.png" for name in "aelnqz"] + ["deep/x.jpg/y.png"])
    for name, write in BAD.items():
        write(tmp_path / "new" / name)
    rows, said = classified(weights, tmp_path / "p.csv", tmp_path / "new", "--batch-size", batch, status=1)
    are_right(rows, shares(weights, images))
    assert rows.keys() - images.keys() == {str(tmp_path / "new" / name) for name in BAD}
    for name in BAD:
        row = rows[str(tmp_path / "new" / name)]
        assert name in row["error"], row
        assert not any(value for key, value in row.items() if key not in ("picture", "error"))
    assert f"{len(BAD)} of {len(rows)} pictures cannot be read" in said
    assert list(rows) == sorted(rows)

    given = [tmp_path / "new" / name for name in ("cut.png", "a.png", "nowhere.png")]
    rows, said = classified(weights, tmp_path / "p.csv", *given, "--batch-size", batch, status=1)
    assert [bool(row["error"]) for row in rows.values()] == [True, False, True]


def test_skip_corrupt_leaves_them_out_with_a_warning(weights, tmp_path):
    images = photos(tmp_path / "new", ["a.png", "b.png"])
    for name, write in BAD.items():
        write(tmp_path / "new" / name)
    with pytest.warns(UserWarning, match=f"{len(BAD)} of {len(BAD) + 2} pictures were left out: .*_x.jpg"):
        rows, _ = classified(weights, tmp_path / "p.csv", tmp_path / "new", "--skip-corrupt")
    assert rows.keys() == images.keys()
    for path in images:
        os.remove(path)
    rows, said = classified(weights, tmp_path / "p.json", tmp_path / "new", "--skip-corrupt", status=1)
    assert not rows
    assert "cannot be read" in said


def test_a_folder_that_cannot_be_read_has_a_row(weights, tmp_path, monkeypatch):
    images = photos(tmp_path / "new", ["a.png", "closed/b.png", "z.png"])
    entries = walking._entries

    def refused(folder):
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return entries(folder)

    monkeypatch.setattr(walking, "_entries", refused)
    rows, _ = classified(weights, tmp_path / "p.csv", tmp_path / "new", status=1)
    closed = rows.pop(str(tmp_path / "new" / "closed"))
    assert closed["error"].endswith("closed cannot be read (Permission denied)")
    assert rows.keys() == images.keys() - {str(tmp_path / "new" / "closed" / "b.png")}


def test_names_come_back_from_csv_and_json_as_they_are(weights, tmp_path):
    images = photos(tmp_path / "new", ODD)
    expected = shares(weights, images)
    for out in (tmp_path / "p.csv", tmp_path / "p.json"):
        rows, _ = classified(weights, out, tmp_path / "new")
        assert rows.keys() == images.keys()
        are_right(rows, expected)
    rows, _ = classified(weights, tmp_path / "p.csv", tmp_path / "new")
    for path, values in expected.items():
        assert [float(rows[path][name]) for name in CLASSES] == pytest.approx(values, abs=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_name_that_is_not_utf_8_can_be_written_and_had_back(weights, tmp_path):
    name = os.fsdecode(b"caf\xe9 \xff, 1.png")
    images = photos(tmp_path / "new", ["a.png", name, "z.png"])
    (tmp_path / "new" / os.fsdecode(b"b\xe9.jpg")).write_bytes(b"damaged")
    rows, _ = classified(weights, tmp_path / "p.json", tmp_path / "new", status=1)
    assert {os.fsencode(path) for path in rows} == {os.fsencode(path) for path in (tmp_path / "new").iterdir()}
    are_right(rows, shares(weights, images))
    rows, _ = classified(weights, tmp_path / "p.csv", tmp_path / "new", status=1)
    assert len(rows) == 4
    assert f"{tmp_path}/new/caf\\udce9 \\udcff, 1.png" in rows


def test_the_terminal_gets_the_same_table(weights, tmp_path, capsys):
    photos(tmp_path / "new", [*ODD, os.fsdecode(b"\xe9.png")])
    classified(weights, tmp_path / "p.csv", tmp_path / "new")
    cli.main(["predict", str(tmp_path / "new"), "--model", str(weights), "--device", "cpu"])
    assert capsys.readouterr().out == (tmp_path / "p.csv").read_bytes().decode()


@pytest.mark.parametrize("top", [1, 2, 3])
def test_top_k_gives_the_most_probable_classes_in_order(weights, tmp_path, top):
    images = photos(tmp_path / "new", [f"{i}.png" for i in range(9)])
    (tmp_path / "new" / "bad.png").touch()
    table, _ = classified(weights, tmp_path / "p.csv", tmp_path / "new", "--top-k", top, status=1)
    objects, _ = classified(weights, tmp_path / "p.json", tmp_path / "new", "--top-k", top, status=1)
    are_right(table, shares(weights, images))
    for path, values in shares(weights, images).items():
        ordered = sorted(zip(values, CLASSES, strict=True), reverse=True)[:top]
        cells = [value for key, value in table[path].items() if key not in ("picture", "error")]
        assert cells[::2] == [name for _, name in ordered]
        assert list(map(float, cells[1::2])) == pytest.approx([share for share, _ in ordered], abs=1e-4)
        assert list(objects[path]["probabilities"]) == cells[::2]
        assert list(objects[path]["probabilities"].values()) == pytest.approx([s for s, _ in ordered], abs=1e-4)
    bad = objects[str(tmp_path / "new" / "bad.png")]
    assert (bad["class"], bad["probability"], bad["probabilities"]) == (None, None, None)


@pytest.mark.parametrize("words", [("--top-k", 4), ("--top-k", 0), ("--batch-size", 0), ("--workers", 0)])
def test_numbers_that_cannot_be_are_refused_before_anything_is_written(weights, tmp_path, words):
    photos(tmp_path / "new", ["a.png"])
    out = tmp_path / "p.csv"
    out.write_text("picture\nmine\n")
    _, said = classified(weights, out, tmp_path / "new", *words, status=1)
    assert f"{words[0]} must be" in said
    assert out.read_text() == "picture\nmine\n"


def test_a_file_stays_as_it_is_until_there_is_a_row(weights, tmp_path):
    photos(tmp_path / "new", ["a.png", "b.json"])
    whole = (tmp_path / "new" / "b.json").read_bytes()
    given = [tmp_path / "new" / "a.png", tmp_path / "new" / "b.json"]
    words = ["predict", *given, "--model", weights, "--out", given[1], "--device", "cpu"]
    with pytest.raises(SystemExit, match="is one of the pictures, and would be overwritten"):
        cli.main([str(word) for word in words])
    assert given[1].read_bytes() == whole
    out = tmp_path / "p.csv"
    out.write_text("picture\nmine\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "predictions", lambda *_: (_ for _ in ()).throw(ValueError("the model fails")))
        _, said = classified(weights, out, tmp_path / "new", status=1)
    assert "the model fails" in said
    assert out.read_text() == "picture\nmine\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_named_by_the_file(weights, tmp_path):
    Image.new("RGB", (12, 10)).save(tmp_path / "a.png")
    (tmp_path / "table.csv").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match=r"No space left on device: '.*/table\.csv'"):
        cli.main(["predict", str(tmp_path / "a.png"), "--model", str(weights), "--out", str(tmp_path / "table.csv")])


def test_a_missing_folder_is_made_for_the_table(weights, tmp_path):
    photos(tmp_path / "new", ["a.png"])
    rows, _ = classified(weights, tmp_path / "some" / "where" / "p.csv", tmp_path / "new")
    assert list(rows) == [str(tmp_path / "new" / "a.png")]


@pytest.mark.parametrize("name", ["picture", "class", "probability", "error"])
def test_a_class_with_the_name_of_another_column_has_none_of_its_own_in_a_csv(tmp_path, name):
    classes, path = ("a", name), tmp_path / "p.csv"
    with pytest.raises(ValueError, match=f"classes are called {name}, as other columns"), table(path, classes, None):
        pass
    assert not path.exists()
    for place, top in ((path, 1), (tmp_path / "p.json", None)):
        with table(place, classes, top) as write:
            write("x.png", (0.25, 0.75), 1, None)
    (row,) = csv.DictReader(path.open())
    assert (row["class"], row["probability"]) == (name, "0.750000")
    assert json.loads((tmp_path / "p.json").read_text())[0]["probabilities"] == {"a": 0.25, name: 0.75}


def test_a_table_of_another_kind_is_refused(weights, tmp_path, capsys):
    photos(tmp_path / "new", ["a.png"])
    with pytest.raises(SystemExit, match="2"):
        classified(weights, tmp_path / "p.xlsx", tmp_path / "new")
    assert "must end in .csv or .json" in capsys.readouterr().err
    assert not (tmp_path / "p.xlsx").exists()


def test_links_in_a_circle_are_followed_once(weights, tmp_path):
    new = tmp_path / "new"
    images = photos(new, ["a/1.png", "a/b/2.png", "c/3.png"])
    elsewhere = photos(tmp_path / "elsewhere", ["4.png"])
    (new / "a" / "b" / "up").symlink_to(new)
    (new / "a" / "aside").symlink_to(new / "c")
    (new / "c" / "aside").symlink_to(new / "a")
    (new / "0").symlink_to(new / "c")  # a second name of this folder, which comes first
    (new / "itself").symlink_to(new / "itself")
    (new / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(new)
    rows, _ = classified(weights, tmp_path / "p.csv", new)
    assert rows.keys() == {*images, str(new / "other" / "4.png")}
    assert len(elsewhere) == 1


def test_what_is_no_picture_by_its_name_is_spoken_of(weights, tmp_path, caplog):
    photos(tmp_path / "new", ["a.png", ".hidden/b.png", "__MACOSX/c.png"])
    for name in ("notes.txt", "no-ending", ".DS_Store"):
        (tmp_path / "new" / name).write_text("")
    rows, _ = classified(weights, tmp_path / "p.csv", tmp_path / "new")
    assert f"left out, no pictures by their names: 2, such as {tmp_path / 'new' / 'no-ending'}" in caplog.text
    assert rows.keys() == {str(tmp_path / "new" / "a.png")}


class Noting(nn.Module):
    """Records the size of each batch, and how many pictures are decoded ahead of it."""

    def __init__(self, decoded):
        super().__init__()
        self.decoded, self.sizes, self.ahead = decoded, [], []

    def forward(self, images):
        time.sleep(0.05)  # time in which a reader without a limit would decode far ahead
        self.ahead.append(len(self.decoded) - sum(self.sizes))
        self.sizes.append(len(images))
        return images.mean((2, 3)) + torch.arange(3) / 100


def test_pictures_are_decoded_a_batch_ahead_by_as_many_workers_as_given(tmp_path, monkeypatch):
    images = photos(tmp_path, [f"{i:02}.png" for i in range(21)])
    decoded, running, most = [], [], []
    prepared, lock = pictures.Picture.prepared, threading.Lock()

    def slow(picture, preprocessing):
        with lock:
            running.append(picture)
            most.append(len(running))
        time.sleep(0.01)
        with lock:
            running.remove(picture)
            decoded.append(picture)
        return prepared(picture, preprocessing)

    monkeypatch.setattr(pictures.Picture, "prepared", slow)
    for batch, workers in ((4, 3), (5, 1), (30, 2)):
        decoded.clear(), most.clear()
        network = Noting(decoded)
        model = SimpleNamespace(on_pixels=network, preprocessing=Preprocessing((12, 10)), classes=CLASSES)
        found = predict.found(tmp_path)
        given = list(predict.predictions(model, found, torch.device("cpu"), batch, workers))
        assert [str(prediction.path) for prediction in given] == sorted(images)
        assert network.sizes == [batch] * (21 // batch) + [21 % batch] * (21 % batch > 0)
        assert max(network.ahead) <= 2 * batch
        assert max(most) == workers


@pytest.mark.parametrize(("option", "value", "place"), [("--batch-size", 7, 3), ("--workers", 5, 4)])
def test_the_numbers_of_the_command_are_those_of_the_decoding(weights, tmp_path, monkeypatch, option, value, place):
    photos(tmp_path / "new", ["a.png"])
    given, predictions = [], predict.predictions
    monkeypatch.setattr(predict, "predictions", lambda *values: given.append(values) or predictions(*values))
    classified(weights, tmp_path / "p.csv", tmp_path / "new")
    classified(weights, tmp_path / "p.csv", tmp_path / "new", option, value)
    assert [before == after for before, after in zip(*given, strict=True)][3:] == [i != place for i in (3, 4)]
    assert given[1][place] == value
