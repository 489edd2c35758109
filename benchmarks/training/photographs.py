"""Makes a folder of pictures as users have them, from photographs in scikit-learn and matplotlib.

    python benchmarks/training/photographs.py photos
    fastadv finetune --data photos --out run

Each of four pictures is a class (the fourth is a grey map of heights). Crops of them go to photos/train/CLASS and
photos/test/CLASS. Test crops are from the right part of a picture, which no training crop touches. Half of the files
are JPEG and half PNG. Some are grey; some are stored turned, and their EXIF data say so. A file's name is the place of
its crop: 12-40.png begins at row 12 and column 40.
"""

import argparse
import random
from pathlib import Path

import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image
from sklearn.datasets import load_sample_images

SIDE = 96
TRAIN_SHARE = 0.7  # of each picture's width
ORIENTATION, TURN_RIGHT = 0x0112, 6  # EXIF's tag, and its value for a picture to be turned clockwise


def pictures():
    """{name of the class: picture}."""
    china, flower = load_sample_images().images
    heights = np.load(get_sample_data("jacksboro_fault_dem.npz", asfileobj=False))["elevation"].astype(float)
    grey = 255 * (heights - heights.min()) / np.ptp(heights)
    return {
        "china": Image.fromarray(china),
        "flower": Image.fromarray(flower),
        "portrait": Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"),
        "relief": Image.fromarray(grey.astype(np.uint8)),
    }


def places(size, part, count, rng):
    """The first row and column of each of `count` different crops of a part of a picture."""
    width, height = size
    cut = int(TRAIN_SHARE * width)
    first, last = (0, cut) if part == "train" else (cut, width)
    columns = last - first - SIDE + 1
    chosen = rng.sample(range((height - SIDE + 1) * columns), count)
    return [(place // columns, first + place % columns) for place in chosen]


def store(crop, stem, number):
    """Write a crop as a JPEG file, and every second crop as PNG."""
    if number % 5 == 0:
        crop = crop.convert("L")
    if number % 2:
        crop.save(stem.with_suffix(".png"))
    elif number % 3 == 0:
        exif = Image.Exif()
        exif[ORIENTATION] = TURN_RIGHT
        crop.transpose(Image.Transpose.ROTATE_90).save(stem.with_suffix(".jpg"), quality=90, exif=exif)
    else:
        crop.save(stem.with_suffix(".jpg"), quality=90)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=100, help="crops of each class (100)")
    parser.add_argument("--test", type=int, default=40, help="crops of each class (40)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    for name, picture in pictures().items():
        for part in ("train", "test"):
            folder = args.out / part / name
            folder.mkdir(parents=True)
            for number, (y, x) in enumerate(places(picture.size, part, getattr(args, part), rng)):
                store(picture.crop((x, y, x + SIDE, y + SIDE)), folder / f"{y}-{x}", number)


if __name__ == "__main__":
    main()
