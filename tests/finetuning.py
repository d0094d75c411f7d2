"""What the tests of fine-tuning share: small data, short runs, and Ctrl-C at a chosen step."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastops.finetune import FineTuneConfig, fashion_mnist, trainer
from fastops.finetune.data import InMemory


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Batches of ten small images: threads gain nothing, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_test(monkeypatch):
    """Few test images, so that a run takes a moment."""
    whole = fashion_mnist.read_sheet

    def thinned(part):
        images = whole(part)
        step = 1 if part == "train" else 20
        return InMemory(images.images[::step], images.labels[::step])

    monkeypatch.setattr(fashion_mnist, "read_sheet", thinned)


def quick(tmp_path, **options):
    """A configuration of three steps; of pictures with the small network."""
    options = {"steps": 3, "seeds": 1, "shots": 4, "batch_size": 10, **options}
    if "data" in options:
        options = {"arch": "small", "threads": 1, "amp": "off", **options}
    return FineTuneConfig(out=tmp_path / "run", **options)


def draw_pictures(folder, classes=("cat", "dog", "owl"), count=4, size=(40, 30)):
    """Colored noise with a class's own brightness, one sub-folder a class."""
    numbers = np.random.default_rng(0)
    for level, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = numbers.integers(60 * level, 60 * level + 60, (size[1], size[0], 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


def interrupt(monkeypatch, at: int):
    """Ctrl-C at a training's step `at`; how many steps there have been is the result's .count."""
    step, taken = trainer.Trainer.step, SimpleNamespace(count=0)

    def interrupted(self, *batch):
        taken.count += 1
        if taken.count == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *batch)

    monkeypatch.setattr(trainer.Trainer, "step", interrupted)
    return taken
