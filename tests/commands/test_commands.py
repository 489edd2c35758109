"""The command line turns a folder of pictures into a model, a report, predictions and an export."""

import csv
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from families import processor_of
from PIL import Image

from fastadv import cli, data, models, to_float
from fastadv.commands import predict, pretrain
from fastadv.data.pictures import Picture
from fastadv.data.source import digests
from fastadv.models.networks import resnet
from fastadv.preprocessing import Preprocessing

COLOURS = {"blue": (40, 40, 200), "grün": (40, 200, 40), "red": (200, 40, 40)}


def picture(colour, rng, size=(40, 36)):
    pixels = np.clip(np.array(colour) + rng.normal(0, 40, (*size, 3)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures") / "photos", np.random.default_rng()
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(20):
            picture(colour, rng).save(folder / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A checkpoint for 16 x 16 pictures with a normalisation and random weights; training replaces its head."""
    torch.manual_seed(0)
    network = resnet((3, 16, 16), 2, widths=(16, 16), blocks=1)
    architecture = {"kind": "own", "name": "resnet", "shape": [3, 16, 16], "options": {"widths": [16, 16], "blocks": 1}}
    given = Preprocessing((16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), crop=0.9)
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    models.save(models.Model(network, given, architecture, ("a", "b"), pretrained=True), path)
    return path


@pytest.fixture(scope="module")
def tuned(photos, backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "run"
    finetune(photos, backbone, out)
    return out


def finetune(photos, backbone, out, *options):
    common = ("--data", photos, "--model", backbone, "--out", out, "--device", "cpu", "--eps", "4")
    fast = ("--epochs", "12", "--lr", "0.03", "--batch-size", "12", "--method", "bias")
    cli.main(["finetune", *map(str, (*common, *fast, *options))])


def test_a_folder_of_pictures_becomes_a_robust_model(tuned):
    final = json.loads((tuned / "log.jsonl").read_text().splitlines()[-1])
    assert final["clean_accuracy"] > 0.9
    assert final["robust_accuracy"] > 0.7
    assert models.load(tuned / "model.safetensors").classes == tuple(COLOURS)


def test_predictions_are_those_on_the_validation_images(photos, tuned, tmp_path):
    table = tmp_path / "table.csv"
    cli.main(["predict", str(photos), "--model", str(tuned / "model.safetensors"), "--out", str(table)])
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 60
    model = models.load(tuned / "model.safetensors")
    loaded = data.load(photos, preprocessing=model.preprocessing, seed=0)
    with torch.no_grad():
        shares = model.on_pixels.eval()(to_float(loaded.x_val)).softmax(1)
    # Six decimals are in the table; the rounding of a convolution is another in a batch of another size.
    found = torch.tensor([[float(row[name]) for name in COLOURS] for row in rows])
    assert (torch.cdist(shares, found, p=math.inf).amin(1) < 5e-6).all()
    for row in rows:
        assert row["class"] == max(COLOURS, key=lambda name: float(row[name]))
        assert row["probability"] == row[row["class"]]
    right = sum(f"/{row['class']}/" in row["picture"] for row in rows)
    assert right >= 54


def test_a_model_of_transformers_is_judged_and_predicts_as_it_is(photos, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**shape, intermediate_size=12, id2label=dict(enumerate(COLOURS)))
    network = transformers.ViTForImageClassification(config).eval()
    network.save_pretrained(tmp_path / "vit")
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    size = {"height": 16, "width": 16}
    processor_of(tmp_path / "vit", size=size, image_mean=mean, image_std=std, resample=2)
    name, table = f"hf:{tmp_path / 'vit'}", tmp_path / "table.csv"
    loaded = data.load(photos, preprocessing=models.source(name).preprocessing, seed=0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    with torch.no_grad():
        shares = network((to_float(loaded.x_val) - mean) / std).logits.softmax(1)
    cli.main(["predict", str(photos), "--model", name, "--out", str(table)])
    rows = list(csv.DictReader(table.open()))
    found = torch.tensor([[float(row[colour]) for colour in COLOURS] for row in rows])
    assert (torch.cdist(shares, found, p=math.inf).amin(1) < 5e-6).all()
    judge = ("--data", str(photos), "--part", "all", "--attacks", "fgsm", "--device", "cpu", "--out", str(tmp_path))
    cli.main(["evaluate", "--model", name, *judge])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["clean_accuracy"] == sum(f"/{row['class']}/" in row["picture"] for row in rows) / 60


@pytest.mark.parametrize("name", ["mlp", "timm:resnet10t?pretrained=false"])
def test_a_model_without_names_of_its_classes_is_refused_where_one_must_be_trained(photos, tmp_path, name):
    with pytest.raises(SystemExit, match="does not name its classes: give a checkpoint"):
        cli.main(["predict", str(photos), "--model", name])


def test_the_backbone_that_comes_along_is_one_that_can_be_judged(tmp_path):
    cli.main(["export", "robust-resnet", str(tmp_path / "plain.safetensors")])
    weights = safetensors.torch.load_file(tmp_path / "plain.safetensors")
    own = models.source("robust-resnet").build("abcdef").network.state_dict()
    assert sum(torch.equal(value, own.get(key, value + 1)) for key, value in weights.items()) > len(weights) / 2


class Blind(torch.nn.Module):
    """Classifies colours by their channel; gives NaN for dark pictures and equal logits for white pictures."""

    def forward(self, images):
        means = images.mean((2, 3))
        return torch.where(means.amax(1, keepdim=True) < 0.1, torch.nan, (10 * means).round())


def test_a_picture_without_a_prediction_gets_no_class(tmp_path, monkeypatch):
    colours = {"0": (200, 0, 0), "1": (0, 0, 0), "2": (255, 255, 255), "3": (0, 0, 200), "4": (200, 200, 0)}
    for name, colour in colours.items():
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{name}.png")
    model = SimpleNamespace(on_pixels=Blind(), preprocessing=Preprocessing((16, 16)), classes=("r", "g", "b"))
    monkeypatch.setattr(predict, "load_model", lambda path, trust_code: model)
    for name in ("p.csv", "p.json"):
        with pytest.warns(UserWarning, match="no prediction for 2 of 5 pictures"):
            cli.main(["predict", str(tmp_path), "--model", "blind", "--device", "cpu", "--out", str(tmp_path / name)])
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [row["class"] for row in rows] == ["r", "no prediction", "no prediction", "b", "r"]
    assert [row["probability"] == "" for row in rows] == [False, True, True, False, False]
    rows = json.loads((tmp_path / "p.json").read_text())
    assert [row["class"] for row in rows] == ["r", None, None, "b", "r"]


def test_one_picture_goes_to_the_terminal(photos, tuned, capsys):
    cli.main(["predict", str(photos / "red" / "0.jpg"), "--model", str(tuned / "model.safetensors")])
    header, row = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["picture", "class", "probability", *COLOURS, "error"]
    assert row[0].endswith("red/0.jpg")


@pytest.mark.parametrize(("name", "message"), [("absent.jpg", "no picture 'absent.jpg'"), (".", "no picture '.'")])
def test_no_pictures_are_an_error(tuned, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        cli.main(["predict", name, "--model", str(tuned / "model.safetensors")])


def test_the_export_is_plain_and_says_the_same(tuned, tmp_path):
    cli.main(["export", str(tuned / "model.safetensors"), str(tmp_path / "plain.safetensors")])
    network = resnet((3, 16, 16), 3, widths=(16, 16), blocks=1)
    network.load_state_dict(safetensors.torch.load_file(tmp_path / "plain.safetensors"))
    images = torch.rand(4, 3, 16, 16)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    ours = models.load(tuned / "model.safetensors").on_pixels.eval()
    torch.testing.assert_close(network.eval()((images - mean) / std), ours(images), rtol=1e-4, atol=1e-5)


def test_no_export_takes_a_checkpoint_s_place(tuned, tmp_path):
    """An export over a checkpoint would destroy it: a plain state dict is no checkpoint."""
    shutil.copy(tuned / "model.safetensors", tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match=r"is a checkpoint of fastadv.*choose another name"):
        cli.main(["export", str(tuned / "model.safetensors"), str(tmp_path / "model.safetensors")])
    assert (tmp_path / "model.safetensors").read_bytes() == before
    (tmp_path / "other.safetensors").write_bytes(b"no model")
    for _ in range(2):  # an export may be written again
        cli.main(["export", str(tuned / "model.safetensors"), str(tmp_path / "other.safetensors")])


def test_the_report_needs_no_other_file_and_says_what_the_log_says(tuned):
    text = (tuned / "report.html").read_text()
    final = json.loads((tuned / "log.jsonl").read_text().splitlines()[-1])
    for share in (final["clean_accuracy"], final["robust_accuracy"]):
        assert f"{100 * share:.1f} %" in text
    assert set(re.findall(r'(?:src|href)="([^"]{5})', text)) == {"data:"}
    model = models.load(tuned / "model.safetensors")
    photo = re.search(r"--data (\S+) ", text)[1]
    images, labels = data.load(photo, preprocessing=model.preprocessing).test
    assert text.count("data:image/png;base64,") == 1 + 3 * min(8, len(labels))  # the curves and three rows of pictures
    with torch.no_grad():
        says = model.on_pixels.eval()(to_float(images)).argmax(1)
    pairs = list(zip(labels.tolist(), says.tolist(), strict=True))
    assert final["confusion"]["clean"] == [[*pair, pairs.count(pair)] for pair in sorted(set(pairs))]
    assert re.search(r"<th>command</th><td>fastadv finetune --data \S+photos --model .* --epochs 12 ", text)
    for word in ("grün", "batch_size", torch.__version__, "Robust accuracy (PGD-10, eps 4/255)"):
        assert word in text


def test_the_parts_do_not_depend_on_the_seed_of_the_training(photos, backbone, tmp_path, capsys):
    for seed in (1, 2):
        finetune(photos, backbone, tmp_path / str(seed), "--seed", seed, "--epochs", "1")
    assert capsys.readouterr().out.count("chosen by seed 0") == 2
    finals = [json.loads((tmp_path / s / "log.jsonl").read_text().splitlines()[-1]) for s in "12"]
    model = models.load(tmp_path / "2" / "model.safetensors")
    test = data.load(photos, preprocessing=model.preprocessing).test
    with torch.no_grad():
        says = model.on_pixels.eval()(to_float(test[0])).argmax(1)
    assert finals[1]["clean_accuracy"] == pytest.approx((says == test[1]).float().mean().item())
    finetune(photos, backbone, tmp_path / "3", "--split-seed", "4", "--epochs", "1")
    assert "chosen by seed 4" in capsys.readouterr().out


def test_a_finished_run_can_be_asked_for_again(photos, backbone, tuned, capsys):
    weights, log = ((tuned / name).read_bytes() for name in ("model.safetensors", "log.jsonl"))
    finetune(photos, backbone, tuned, "--resume")
    assert (tuned / "model.safetensors").read_bytes() == weights
    assert (tuned / "log.jsonl").read_bytes() == log
    with pytest.raises(SystemExit, match="choose another --out, or --resume"):
        finetune(photos, backbone, tuned)


def test_pretraining_writes_a_backbone_and_its_card(tmp_path, monkeypatch):
    rng = np.random.default_rng()
    colours = [*COLOURS.values(), (200, 200, 40), (40, 200, 200), (200, 40, 200), (230, 230, 230)]
    labels = np.arange(140) % 7
    images = np.stack([np.asarray(picture(colours[label], rng, (32, 32))).transpose(2, 0, 1) for label in labels])
    arrays = {"x_train": images[:105], "y_train": labels[:105], "x_test": images[105:], "y_test": labels[105:]}
    np.savez(tmp_path / "colours.npz", **arrays)
    monkeypatch.setattr(pretrain, "NETWORK", "resnet?widths=[16,16]&blocks=1")
    monkeypatch.setitem(pretrain.RECIPE, "compile", False)
    monkeypatch.setitem(pretrain.RECIPE, "batch_size", 15)
    options = ("--data", tmp_path / "colours.npz", "--epochs", "3", "--limit", "12", "--device", "cpu")
    cli.main(["pretrain", *map(str, options), "--out", str(tmp_path / "out")])
    card = json.loads((tmp_path / "out" / "robust-resnet.json").read_text())
    model = models.load(tmp_path / "out" / "robust-resnet.safetensors")
    assert model.classes == tuple("012345")  # the last class is not used
    assert model.preprocessing.size == (32, 32)
    assert card["parameters"] == sum(p.numel() for p in model.network.parameters())
    assert card["test_images"] == 12
    assert card["robust_accuracy"] <= card["clean_accuracy"]
    assert "(90)" in card["data"]
    chosen = [i for i in range(105, 140) if labels[i] < 6][:12]
    with torch.no_grad():
        says = model.on_pixels.eval()(torch.from_numpy(images[chosen]) / 255).argmax(1).numpy()
    assert card["clean_accuracy"] == pytest.approx((says == labels[chosen]).mean(), abs=1 / 11)  # the card's is in bf16


@pytest.mark.parametrize(
    ("option", "number", "message"),
    [
        ("--limit", "0", "limit must be at least 1, got 0"),
        ("--epochs", "-4", "epochs must be at least 1"),
        ("--seed", str(2**64), "seed must be"),
    ],
)
def test_pretraining_refuses_wrong_numbers_before_it_reads(option, number, message, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "load_data", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(SystemExit, match=message):
        cli.main(["pretrain", "--data", "digits", option, number, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def judged(model, folder, out, *options):
    cli.main(["evaluate", "--data", str(folder), "--model", str(model), "--out", str(out), "--device", "cpu",
              "--attacks", "fgsm", *map(str, options)])  # fmt: skip
    return json.loads((out / "report.json").read_text())


def test_evaluate_judges_the_test_part_of_the_training_and_nothing_that_was_trained_on(
    photos, backbone, tmp_path, capsys
):
    finetune(photos, backbone, tmp_path / "run", "--split-seed", "7", "--epochs", "1")
    weights = tmp_path / "run" / "model.safetensors"
    model = models.load(weights)
    report = judged(weights, photos, tmp_path / "same")
    images, labels = data.load(photos, preprocessing=model.preprocessing, seed=7).test
    with torch.no_grad():
        says = model.on_pixels.eval()(to_float(images)).argmax(1)
    assert report["clean_correct"] == (says == labels).tolist()
    assert report["trained_on"] == 0
    assert "was trained on" not in capsys.readouterr().out

    with pytest.raises(SystemExit, match=r"trained on \d+ of the \d+ images that are to judge it.*--split-seed 7"):
        judged(weights, photos, tmp_path / "other", "--split-seed", "8")
    assert not (tmp_path / "other").exists()
    mine, other = (data.load(photos, preprocessing=model.preprocessing, seed=seed).digests for seed in (7, 8))
    shared = len(set(mine["train"].tolist()) & set(other["test"].tolist()))
    report = judged(weights, photos, tmp_path / "other", "--split-seed", "8", "--allow-overlap")
    assert report["trained_on"] == shared > 0
    assert f"the model was trained on {shared} of the {len(other['test'])} test images" in capsys.readouterr().out


def test_adversarial_images_do_not_become_a_class_of_the_data_set(photos, tuned):
    with pytest.raises(SystemExit, match=r"is within the data set .*photos, and would become images of that"):
        judged(tuned / "model.safetensors", photos, photos / "report", "--save-images")
    assert not (photos / "report").exists()


def test_a_folder_with_the_name_of_a_data_set_is_not_that(tuned, tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:  # the digits have other classes than the model
        judged(tuned / "model.safetensors", "digits", tmp_path / "digits" / "report", "--save-images")
    assert "is within the data set" not in str(error.value)


def test_weights_of_another_normalisation_are_told(photos, tuned, tmp_path):
    other = models.load(tuned / "model.safetensors")
    other.preprocessing = Preprocessing((16, 16), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop=0.9)
    models.save(other, tmp_path / "other.safetensors")
    with pytest.warns(UserWarning, match=r"trained on pixels with mean \(0\.5, 0\.4, 0\.3\) .* take the file itself"):
        finetune(photos, tmp_path / "other.safetensors", tmp_path / "run", "--init", tuned / "model.safetensors",
                 "--epochs", "1")  # fmt: skip


def test_training_pictures_are_found_under_other_names_and_in_other_folders(photos, tuned, tmp_path, capsys):
    model = models.load(tuned / "model.safetensors")
    trained = set(data.load(photos, preprocessing=model.preprocessing).digests["train"].tolist())
    rng = np.random.default_rng()
    for name, colour in COLOURS.items():
        for part, count in (("train", 3), ("test", 30)):
            (tmp_path / "new" / part / name).mkdir(parents=True)
            for i in range(count):
                picture(colour, rng).save(tmp_path / "new" / part / name / f"{i}.png")
    contents = [path.read_bytes() for path in (photos / "red").iterdir()]
    mine = [content for content in contents if digests([Picture("", content)]).item() in trained]
    for i, content in enumerate(mine[:4]):  # 4 of the 94 pictures are below the limit of 5 %
        (tmp_path / "new" / "test" / "red" / f"copy-{i}.jpg").write_bytes(content)
    report = judged(tuned / "model.safetensors", tmp_path / "new", tmp_path / "out")
    assert report["trained_on"] == 4
    assert "the model was trained on 4 of the" in capsys.readouterr().out


def test_a_second_training_remembers_the_first(photos, tuned, tmp_path, capsys):
    first = models.load(tuned / "model.safetensors").trained_on
    finetune(photos, tuned / "model.safetensors", tmp_path / "one", "--split-seed", "3", "--epochs", "1")
    assert re.search(r"the model was trained on \d+ of the \d+ test images", capsys.readouterr().out)
    init = ("--init", tuned / "model.safetensors", "--split-seed", "3", "--epochs", "1")
    finetune(photos, tuned / "model.safetensors", tmp_path / "two", *init)
    for name in ("one", "two"):
        records = models.load(tmp_path / name / "model.safetensors").trained_on
        assert records[: len(first)] == first
        assert records[-1].split.seed == 3


def test_a_file_without_a_record_says_that_it_has_none(photos, tuned, tmp_path, capsys):
    model = models.load(tuned / "model.safetensors")
    model.trained_on = ()
    models.save(model, tmp_path / "old.safetensors")
    assert judged(tmp_path / "old.safetensors", photos, tmp_path / "out")["trained_on"] is None
    assert "does not say which images it was trained on" in capsys.readouterr().out


def test_a_single_class_is_refused_before_anything_is_trained(photos, backbone, tmp_path):
    with pytest.raises(SystemExit, match="have a single class, red, and there is nothing to tell apart"):
        finetune(photos, backbone, tmp_path / "run", "--classes", "red")
    assert not (tmp_path / "run").exists()


def test_the_validation_share_and_the_split_seed_choose_the_parts_of_the_report(photos, backbone, tmp_path):
    for share, seed in ((0.4, 0), (0.1, 1)):
        out = tmp_path / f"{share}-{seed}"
        finetune(photos, backbone, out, "--validation", share, "--split-seed", seed, "--epochs", "1")
        expected = data.load(photos, preprocessing=Preprocessing((16, 16), crop=0.9), validation=share, seed=seed)
        text = re.sub(r"<[^>]*>|\s+", " ", (out / "report.html").read_text())
        for part, labels in (("training", expected.y_train), ("validation", expected.y_val), ("test", expected.y_test)):
            assert re.search(rf"{part} images\s+{len(labels)}\s", text), (part, share, seed)


def test_classes_are_trained_and_judged_in_the_order_asked_for(photos, backbone, tmp_path):
    names = ("red", "blue", "grün")
    order = ("--classes", ",".join(names))
    finetune(photos, backbone, tmp_path / "run", *order)
    weights = tmp_path / "run" / "model.safetensors"
    model = models.load(weights)
    assert model.classes == names
    report = judged(weights, photos, tmp_path / "right", *order)
    assert report["clean_accuracy"] > 0.8
    with torch.no_grad():
        red = to_float(data.load(photos, preprocessing=model.preprocessing, classes=["red"]).x_test)
        assert model.on_pixels.eval()(red).argmax(1).bincount(minlength=3).argmax() == 0
    for other in ((), ("--classes", "red,grün,blue")):
        again = judged(weights, photos, tmp_path / str(len(other)), *other)
        assert again["clean_correct"] == report["clean_correct"]
