"""Images to train and attack on: CIFAR-10 where there is a copy, else scikit-learn's digits, enlarged."""

import os

from torch.nn.functional import interpolate

from fastadv.data import load


def cifar10(folder, train, test):
    """The first `train` training and `test` test images of CIFAR-10: uint8 (N, 3, 32, 32), with their labels."""
    data = load("cifar10", folder=folder, validation=0)
    return (data.x_train[:train], data.y_train[:train]), (data.x_test[:test], data.y_test[:test])


def digits(train, test):
    """The first `train` training and `test` test images of the digits, enlarged: floats (N, 3, 32, 32), with labels."""
    data = load("digits", validation=0)
    parts = ((data.x_train[:train], data.y_train[:train]), (data.x_test[:test], data.y_test[:test]))
    return tuple((interpolate(images, (32, 32)).repeat(1, 3, 1, 1), labels) for images, labels in parts)


def found(train, test):
    """(name, eps, training images with labels, test images with labels); FASTADV_CIFAR10 names CIFAR-10's folder.

    At these budgets a network can be made robust, but not for every image.
    """
    folder = os.environ.get("FASTADV_CIFAR10")
    if folder:
        return "CIFAR-10", 8 / 255, *cifar10(folder, train, test)
    return "digits", 64 / 255, *digits(train, test)
