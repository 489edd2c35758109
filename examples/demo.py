"""Robust transfer learning in small: `make demo`.

The robust backbone that comes with fastadv, trained on six classes of CIFAR-10, is fine-tuned adversarially to
scikit-learn's digits (resized to 32x32, three channels: classes that it has never seen), with FGSM and with PGD-7, the
whole network and the head alone; beside them the same network learns the digits from scratch. The numbers are measured
as it runs.
"""

import argparse
import json
import platform
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

import fastadv
from fastadv import data, models
from fastadv.attacks import PGD, create_attack
from fastadv.training import Trainer

EPS = 16 / 255
EPOCHS = 6
SETTINGS = {
    "from scratch": ("full", 2e-3),
    "full fine-tuning": ("full", 1e-3),
    "linear probing": ("linear", 1e-2),
}
ATTACKS = {"FGSM": "fgsm", "PGD-7": "pgd"}
COLOURS = {"FGSM": "#d1495b", "PGD-7": "#00798c"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    backbone = models.source("robust-resnet")
    digits = data.load("digits", preprocessing=backbone.preprocessing)
    print(f"digits, eps {255 * EPS:g}/255, {EPOCHS} epochs; six runs of a quarter of a minute to a minute ...")
    runs = {}
    for setting, (method, lr) in SETTINGS.items():
        for attack, preset in ATTACKS.items():
            torch.manual_seed(0)
            model = backbone.build(digits.classes)
            if setting == "from scratch":
                model.network = models.construct(model.architecture, len(digits.classes))
            records = train(model.on_pixels, digits, preset, method, lr)
            models.save(model, out / f"{setting.replace(' ', '-')}-{preset}.safetensors")
            runs[setting, attack] = model.on_pixels, records
            final = records[-1]
            print(f"  {setting}, {attack}: {final['pma_accuracy']:.1%} under PMA, {final['train_s']:.0f} s")
    table = table_of({key: records for key, (_, records) in runs.items()})
    print_table(table)
    write_json(out / "results.json", table, {key: records for key, (_, records) in runs.items()})
    draw(out / "figure.png", digits, runs)
    print(f"\nfigure: {out / 'figure.png'}   numbers: {out / 'results.json'}   models: {out}/*.safetensors")


def train(model: torch.nn.Module, digits: data.Data, preset: str, method: str, lr: float) -> list[dict]:
    settings = {"method": method, "epochs": EPOCHS, "lr": lr, "warmup": 20, "precision": "bf16", "channels_last": True}
    trainer = Trainer(model, EPS, attack=preset, eval_attack=pgd10(model), measure_backbone=False, probe=64, **settings)
    return trainer.fit(digits.train, digits.val, digits.test)


def pgd10(model: torch.nn.Module) -> PGD:
    return create_attack("pgd-10", model, EPS, autocast=torch.bfloat16, memory_format=torch.channels_last)


def table_of(runs: dict[tuple[str, str], list[dict]]) -> list[dict]:
    return [row(*key, records, runs[key[0], "PGD-7"]) for key, records in runs.items()]


def row(setting: str, attack: str, records: list[dict], pgd_records: list[dict]) -> dict:
    final = records[-1]
    measured = {key: final[key] for key in ("clean_accuracy", "robust_accuracy", "pma_accuracy", "train_s")}
    ratio = final["train_s"] / pgd_records[-1]["train_s"]
    return {"setting": setting, "attack": attack, **measured, "time_to_pgd": ratio}


def print_table(table: list[dict]) -> None:
    print(f"\n{'':20}{'attack':8}{'clean':>8}{'PGD-10':>8}{'PMA':>8}{'seconds':>9}{'time / PGD':>12}")
    for r in table:
        print(
            f"{r['setting']:20}{r['attack']:8}{r['clean_accuracy']:8.1%}{r['robust_accuracy']:8.1%}"
            f"{r['pma_accuracy']:8.1%}{r['train_s']:9.1f}{r['time_to_pgd']:12.2f}"
        )


def write_json(path: Path, table: list[dict], runs: dict[tuple[str, str], list[dict]]) -> None:
    versions = {
        "fastadv": fastadv.info()["version"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "matplotlib": mpl.__version__,
    }
    results = {
        "eps": EPS,
        "epochs": EPOCHS,
        "versions": versions,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "table": table,
        "epochs_of": {f"{setting}, {attack}": records for (setting, attack), records in runs.items()},
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def draw(path: Path, target: data.Data, runs: dict) -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25), wspace=0.04)
    draw_images(left, target, {key: runs[key][0] for key in (("linear probing", "FGSM"), ("full fine-tuning", "FGSM"))})
    draw_curves(right, {key: records for key, (_, records) in runs.items()})
    figure.savefig(path, dpi=160)


def draw_images(figure, target: data.Data, attacked: dict[tuple[str, str], torch.nn.Module]) -> None:
    """The first test image of each class, and what PGD-10 makes of it against two of the models."""
    figure.suptitle(f"a   PGD-10 at eps {255 * EPS:g}/255, and what the model says", x=0.02, ha="left", weight="bold")
    first = [int((target.y_test == label).nonzero()[0]) for label in range(len(target.classes))]
    images, labels = fastadv.to_float(target.x_test[first]), target.y_test[first]
    axes = figure.subplots(1 + 2 * len(attacked), len(first))
    show(axes[0], images, "image", "gray", (0, 1))
    for label, axis in zip(labels, axes[0], strict=True):
        axis.set_title(target.classes[label], pad=3)
    for i, ((setting, attack), model) in enumerate(attacked.items()):
        perturbation_axes, image_axes = axes[1 + 2 * i], axes[2 + 2 * i]
        adversarial = pgd10(model)(images, labels, seed=0)
        show(perturbation_axes, adversarial - images, "perturbation", "RdBu_r", (-EPS, EPS))
        show(image_axes, adversarial, f"{attack},\n{setting}", "gray", (0, 1))
        with torch.no_grad():
            predictions = model.eval()(adversarial).argmax(dim=1)
        for prediction, label, axis in zip(predictions, labels, image_axes, strict=True):
            right = bool(prediction == label)
            says = f"{target.classes[prediction]} {'✓' if right else '✗'}"
            axis.set_title(says, pad=3, color="#2e7d32" if right else "#c62828", weight="bold")


def show(axes, images: torch.Tensor, label: str, colours: str, limits: tuple[float, float]) -> None:
    for image, axis in zip(images, axes, strict=True):
        axis.imshow(image.mean(0), cmap=colours, vmin=limits[0], vmax=limits[1])
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6)


def draw_curves(figure, runs: dict[tuple[str, str], list[dict]]) -> None:
    title = "b   Robust accuracy (PGD-10) on validation images over the epochs"
    figure.suptitle(title, x=0.02, ha="left", weight="bold")
    axes = figure.subplots(1, len(SETTINGS), sharey=True)
    for axis, setting in zip(axes, SETTINGS, strict=True):
        for attack, colour in COLOURS.items():
            records = [r for r in runs[setting, attack] if "epoch" in r and "robust_accuracy" in r]
            epochs = [r["epoch"] + 1 for r in records]
            robust = [100 * r["robust_accuracy"] for r in records]
            axis.plot(epochs, robust, color=colour, linewidth=2)
            axis.annotate(
                f"{attack} {robust[-1]:.0f} %",
                (epochs[-1], robust[-1]),
                xytext=(0, -34 if attack == "PGD-7" else -50),
                textcoords="offset points",
                color=colour,
                ha="right",
                va="center",
                weight="bold",
            )
        axis.set(title=setting, xlabel="epoch", xlim=(0, EPOCHS), ylim=(0, 100))
        axis.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes[0].set_ylabel("correct under PGD-10, %")


if __name__ == "__main__":
    main()
