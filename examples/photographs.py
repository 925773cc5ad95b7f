"""Photographs from installed Python packages. Reading them downloads nothing, and none is redistributed here."""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

INSTALL = 'pip install -e ".[real-features]"'
# import name, distribution, folder, and files with the first digits of their SHA-256
PACKAGES = (
    (
        "foolbox",
        "foolbox",
        "data",
        {
            "imagenet_00_243.jpg": "28b7b933c8028c6e",
            "imagenet_01_559.jpg": "5f03b0c74dff01b5",
            "imagenet_02_438.jpg": "ccef0734c1a65549",
            "imagenet_03_990.jpg": "c7f0b2f1e9ee39d8",
            "imagenet_04_949.jpg": "a7f62f3c1d214de4",
            "imagenet_05_853.jpg": "8a449436c61da867",
            "imagenet_06_609.jpg": "fb061102a4e58b3e",
            "imagenet_07_609.jpg": "2c297ad1e5c4804a",
            "imagenet_08_915.jpg": "c6a3411a3987799f",
            "imagenet_09_455.jpg": "ace3716b60ac5843",
            "imagenet_10_541.jpg": "f325c71d9f4290ee",
            "imagenet_11_630.jpg": "892dff58fc528fe6",
            "imagenet_12_741.jpg": "6c256e17545b25bb",
            "imagenet_13_471.jpg": "52ed0e738b90d27a",
            "imagenet_14_129.jpg": "ad9371d813bf24b0",
            "imagenet_15_99.jpg": "4b588649cd835d4c",
            "imagenet_16_251.jpg": "ce3440a3b7beb6ca",
            "imagenet_17_22.jpg": "b432341845620e9c",
            "imagenet_18_317.jpg": "b9412f92f0b1c3fa",
            "imagenet_19_305.jpg": "e1f58f00e2e47ce9",
        },
    ),
    (
        "sporco",
        "sporco",
        "data",
        {
            "barbara.png": "61ce3bead097f17d",
            "kodim23.png": "34d8f029d2eae3ed",
            "monarch.png": "c2435a5e37c04658",
            "sail.png": "7b8a3b23c79bf83b",
            "tulips.png": "6f7fa671ce446f85",
        },
    ),
    (
        "skimage",
        "scikit-image",
        "data",
        {
            "astronaut.png": "88431cd9653ccd53",
            "brick.png": "7966caf324f6ba84",
            "camera.png": "b0793d2adda0fa6a",
            "chelsea.png": "596aa1e7cb875eb7",
            "coffee.png": "cc02f8ca188b167c",
            "coins.png": "f8d773fc9cfa6f4d",
            "grass.png": "b6b6022426b38936",
            "gravel.png": "c48615b451bf1e60",
            "hubble_deep_field.jpg": "3a19c5dd8a927a93",
            "ihc.png": "f8dd1aa387ddd1f4",
            "moon.png": "78739619d11f7eb9",
            "motorcycle_left.png": "db18e9c415761740",
            "retina.jpg": "38a07f36f27f095e",
            "rocket.jpg": "c2dd0de7c538df8d",
        },
    ),
    (
        "sklearn",
        "scikit-learn",
        "datasets/images",
        {
            "china.jpg": "8378025ad2519d64",
            "flower.jpg": "a77f6ec41e353afd",
        },
    ),
    (
        "matplotlib",
        "matplotlib",
        "mpl-data/sample_data",
        {
            "grace_hopper.jpg": "a8ca6d734765703b",
        },
    ),
)


class Photograph(NamedTuple):
    """A picture and its source.

    Attributes:
        name: package and file.
        digest: the first digits of the file's SHA-256.
        picture: (3, H, W), uint8; gray pictures have three equal channels.
    """

    name: str
    digest: str
    picture: Tensor


class Split(NamedTuple):
    """Photographs to train on, and others to score on."""

    train: list[Photograph]
    test: list[Photograph]


def load_photographs() -> list[Photograph]:
    """Read the 42 photographs without importing their packages.

    Raises:
        ImportError: if a package is missing; the message names it and has the install command.
        ValueError: if a file has changed, as the clips would differ, too.
    """
    folders = {package: folder for package, *_ in PACKAGES if (folder := _folder(package)) is not None}
    missing = [distribution for package, distribution, _, _ in PACKAGES if package not in folders]
    if missing:
        raise ImportError(f"the photographs of {', '.join(missing)} are missing: {INSTALL}.")
    return [
        _read(folders[package] / within / file, f"{distribution}/{file}", digest)
        for package, distribution, within, files in PACKAGES
        for file, digest in files.items()
    ]


def split(photographs: Sequence[Photograph], fold: int = 0) -> Split:
    """Hold out every third photograph for the test. The three folds hold out different photographs."""
    if fold not in (0, 1, 2):
        raise ValueError(f"`fold` must be 0, 1 or 2; got {fold!r}.")
    kept = list(photographs[fold::3])
    return Split([one for place, one in enumerate(photographs) if place % 3 != fold], kept)


def _folder(package: str) -> Path | None:
    found = importlib.util.find_spec(package)
    places = None if found is None else found.submodule_search_locations
    return Path(places[0]) if places else None


def _read(path: Path, name: str, digest: str) -> Photograph:
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
    if not found.startswith(digest):
        raise ValueError(f"{name} must have a SHA-256 that begins with {digest}; got {found[:16]} in {path}.")
    with Image.open(path) as image:
        colors = np.array(image.convert("RGB"))
    return Photograph(name, digest, torch.from_numpy(colors).movedim(-1, 0))
