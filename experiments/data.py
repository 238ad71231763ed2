"""Data of the test problems, as tensors: a training, a validation and a test set.

Files are looked for in one folder, given by ``--data`` or the environment variable ``BACKPACK_DATA``.
Scikit-learn's digits need none.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

FOLDER_VARIABLE = "BACKPACK_DATA"


class Part(NamedTuple):
    """Inputs ``[N, ...]`` and targets ``[N]``, or ``[N, T]`` where every position has one."""

    x: Tensor
    y: Tensor


class Data(NamedTuple):
    """The three sets of a problem.

    Args:
        train: what is trained on.
        validation: what hyper-parameters are chosen by.
        test: what is looked at once they are.
        classes: number of classes, or of distinct characters.
        note: how the sets differ from the usual ones.
    """

    train: Part
    validation: Part
    test: Part
    classes: int
    note: str = ""

    def to(self, device: str) -> Data:
        """The same on a device."""
        parts = (Part(part.x.to(device), part.y.to(device)) for part in self[:3])
        return _data(parts, self.classes, self.note)

    def first(self, samples: int | None) -> Data:
        """The same with the first ``samples`` of each set only."""
        parts = (Part(part.x[:samples], part.y[:samples]) for part in self[:3])
        return _data(parts, self.classes, self.note)


def _data(parts: Iterable[Part], classes: int, note: str = "") -> Data:
    train, validation, test = parts
    return Data(train, validation, test, classes, note)


def split(part: Part, *fractions: float) -> list[Part]:
    """Disjoint parts of the given fractions; the last one gets the rest.

    In an order drawn once and for all: neighbours in a file may come from one writer.
    """
    count = len(part.y)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    bounds = [round(count * sum(fractions[:j])) for j in range(1, len(fractions))]
    return [Part(part.x[index], part.y[index]) for index in torch.tensor_split(order, bounds)]


def digits(folder: Path | None) -> Data:
    """Scikit-learn's handwritten digits, ``[N, 1, 8, 8]`` in [0, 1]; no files are needed."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return _data(split(Part(x, torch.tensor(labels)), 0.6, 0.2, 0.2), 10)


# --------------------------------------------------------------------------------------
# IDX files: MNIST, Fashion-MNIST


def read_idx(path: Path) -> Tensor:
    """A tensor of unsigned bytes from an IDX file, compressed (``.gz``) or not.

    Raises:
        ValueError: if the file is none, or is cut short.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        raw = file.read()
    if raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    start = 4 + 4 * raw[3]
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    if len(raw) != start + prod(shape):
        raise ValueError(
            f"{path} has {len(raw) - start} bytes where its head announces {prod(shape)}; "
            "it seems to be damaged, get it again"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).copy()).reshape(shape)


def _idx_part(folder: Path, prefix: str) -> Part | None:
    """One pair of files, images ``[N, 1, 28, 28]`` in [0, 1] and labels; nothing if it is not there."""
    found = []
    for kind in ("images-idx3", "labels-idx1"):
        names = (f"{prefix}-{kind}-ubyte{end}" for end in ("", ".gz"))
        found += [path for name in names if (path := folder / name).is_file()][:1]
    if len(found) < 2:
        return None
    x, y = read_idx(found[0]), read_idx(found[1])
    if x.dim() != 3 or y.dim() != 1 or len(x) != len(y):
        raise ValueError(f"{found[0]} {list(x.shape)} and {found[1]} {list(y.shape)} do not match")
    return Part(x[:, None].float() / 255, y.long())


def _idx(title: str, name: str, folders: tuple[str, ...], folder: Path | None) -> Data:
    base = _given(folder, title)
    for place in folders:
        train, test = (_idx_part(base / place, prefix) for prefix in ("train", "t10k"))
        if test is not None and train is not None:
            return _data([*split(train, 5 / 6, 1 / 6), test], 10)
        if test is not None:
            parts = split(test, 0.7, 0.1, 0.2)
            sizes = " / ".join(f"{len(part.y):,}" for part in parts)
            note = f"no training files: the {len(test.y):,} t10k images, split {sizes}"
            return _data(parts, 10, note)
    places = " or ".join(str(base / place) for place in folders)
    raise FileNotFoundError(
        f"{title}: no t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (.gz or not) in {places}; "
        f"torchvision.datasets.{name}({str(base)!r}, download=True) puts them there, "
        "training files included"
    )


def mnist(folder: Path | None) -> Data:
    """MNIST: 50,000 / 10,000 / 10,000, or the t10k files alone, 7,000 / 1,000 / 2,000."""
    return _idx("MNIST", "MNIST", ("", "MNIST/raw"), folder)


def fashion_mnist(folder: Path | None) -> Data:
    """Fashion-MNIST, as :func:`mnist`; its files have the same names, and so a folder of their own."""
    return _idx("Fashion-MNIST", "FashionMNIST", ("FashionMNIST/raw",), folder)


# --------------------------------------------------------------------------------------
# Colour images, by torchvision


def _colour(name: str, folder: Path | None, classes: int, *which: dict[str, Any]) -> Data:
    """Colour images ``[N, 3, 32, 32]``; each channel has mean 0 and variance 1 on the training set."""
    base = _given(folder, name)
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"{name} is read by torchvision: pip install torchvision") from error
    raw = []
    for each in which:
        try:
            found = getattr(datasets, name)(str(base), **each)
        except RuntimeError as error:
            call = f"torchvision.datasets.{name}({str(base)!r}, download=True, ...)"
            raise FileNotFoundError(f"{name} is not in {base}, or damaged; {call} gets it") from error
        labels = found.labels if name == "SVHN" else found.targets
        x = torch.as_tensor(found.data)
        x = x if name == "SVHN" else x.permute(0, 3, 1, 2)
        raw.append(Part(x, torch.as_tensor(labels).long()))
    train, validation = split(raw[0], 1 - 10_000 / len(raw[0].y), 0)
    floats = [part.x.float() / 255 for part in (train, validation, raw[1])]
    mean = floats[0].mean((0, 2, 3), keepdim=True)
    deviation = floats[0].std((0, 2, 3), keepdim=True)
    targets = (train.y, validation.y, raw[1].y)
    parts = (Part((x - mean) / deviation, y) for x, y in zip(floats, targets, strict=True))
    return _data(parts, classes)


def cifar10(folder: Path | None) -> Data:
    """CIFAR-10: 40,000 / 10,000 / 10,000."""
    return _colour("CIFAR10", folder, 10, {"train": True}, {"train": False})


def cifar100(folder: Path | None) -> Data:
    """CIFAR-100: 40,000 / 10,000 / 10,000."""
    return _colour("CIFAR100", folder, 100, {"train": True}, {"train": False})


def svhn(folder: Path | None) -> Data:
    """SVHN: 63,257 / 10,000 / 26,032."""
    return _colour("SVHN", folder, 10, {"split": "train"}, {"split": "test"})


# --------------------------------------------------------------------------------------
# Text


def war_and_peace(folder: Path | None, steps: int = 50) -> Data:
    """Tolstoy's text as windows of ``steps`` characters; targets are the next characters.

    The first 80 % are the training set, the next 10 % the validation set: windows do not overlap, and
    neighbouring ones must not end up in different sets.
    """
    path = _given(folder, "War and Peace") / "war_and_peace.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"War and Peace: there is no {path}; save the plain text (gutenberg.org/ebooks/2600) there"
        )
    # The byte-order mark, if there is one, stays: the benchmark counts it among its 83 characters.
    characters = path.read_text(encoding="utf-8")
    number = {each: j for j, each in enumerate(sorted(set(characters)))}
    ids = torch.tensor([number[each] for each in characters])
    count = (len(ids) - 1) // steps
    if count < 10:
        raise ValueError(f"{path} has {len(ids)} characters; ten windows of {steps} are the least")
    x, y = (ids[j : j + count * steps].view(count, steps) for j in range(2))
    bounds = [round(0.8 * count), round(0.9 * count)]
    pieces = zip(x.tensor_split(bounds), y.tensor_split(bounds), strict=True)
    return _data((Part(*each) for each in pieces), len(number))


def _given(folder: Path | None, title: str) -> Path:
    if folder is None:
        raise FileNotFoundError(
            f"{title} needs files: name their folder by --data or by the variable {FOLDER_VARIABLE}"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"{title}: there is no folder {folder}")
    return folder
