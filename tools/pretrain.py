"""Makes fastops/finetune/assets again: python tools/pretrain.py

Reads the raw Fashion-MNIST files, writes the subset (fashion-mnist.png and .json) and a ResNet-14
(resnet14.pt) trained on five of the classes. The other five stay unseen: they are what
fine-tuning is shown on. Everything is drawn from fixed seeds; on one thread the same machine gives
the same bytes.

The network tells the class and how the image was turned (0, 90, 180 or 270 degrees), 20 answers in
all. Shirts and coats alone teach it little that trousers and bags need; the turns make it look at
shapes (Gidaris et al. 2018, "Unsupervised Representation Learning by Predicting Image Rotations").
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastops.finetune.data import InMemory, draw_batches, sample_per_class, take  # noqa: E402
from fastops.finetune.fashion_mnist import (  # noqa: E402
    FASHION_MNIST,
    NEW_CLASSES,
    PRETRAINING_CLASSES,
    RAW_FASHION_MNIST,
    keep_classes,
    read_raw_fashion_mnist,
)
from fastops.finetune.networks import SHIPPED_FORMAT, SmallResNet  # noqa: E402
from fastops.finetune.storage import complete_file  # noqa: E402

SEED = 20
BATCH_SIZE = 128
RATE = 0.2
TURNS = 4

TRAIN_PER_CLASS = 500
TEST_PER_CLASS = 400
OLD_TEST_PER_CLASS = 100


def make_subset(train: InMemory, test: InMemory) -> dict[str, InMemory]:
    """The images to ship: the new classes to train and test on, the old ones to check the
    checkpoint with."""
    new = torch.tensor(NEW_CLASSES)
    old = torch.tensor(PRETRAINING_CLASSES)

    def pick(images: InMemory, classes: torch.Tensor, amount: int) -> InMemory:
        members = torch.isin(images.labels, classes).nonzero()[:, 0]
        position = torch.searchsorted(classes, images.labels[members])
        return take(images, members[sample_per_class(position, amount, len(classes), SEED)])

    return {
        "train": pick(train, new, TRAIN_PER_CLASS),
        "test": pick(test, new, TEST_PER_CLASS),
        "pretraining-test": pick(test, old, OLD_TEST_PER_CLASS),
    }


def write_sheet(folder: Path, parts: dict[str, InMemory]) -> None:
    """Pack 28 x 28 gray images into one contact sheet, 100 a row, sorted by part and class.

    Args:
        folder: gets fashion-mnist.png, which any viewer shows, and fashion-mnist.json, which
            counts the images of each class of each part in the order they lie on the sheet.
        parts: images by the name of the part; labels are Fashion-MNIST's own 0..9.
    """
    tiles, counts = [], {}
    for name, part in parts.items():
        order = torch.argsort(part.labels, stable=True)
        tiles.append(part.images[order, 0])
        per_class = torch.bincount(part.labels, minlength=len(FASHION_MNIST))
        counts[name] = {FASHION_MNIST[c]: int(n) for c, n in enumerate(per_class) if n}
    images = torch.cat(tiles)
    rows = -(-len(images) // 100)
    images = torch.cat([images, images.new_zeros(rows * 100 - len(images), 28, 28)])
    sheet = images.view(rows, 100, 28, 28).transpose(1, 2).reshape(rows * 28, 2800)
    Image.fromarray(sheet.numpy()).save(folder / "fashion-mnist.png", optimize=True)
    (folder / "fashion-mnist.json").write_text(json.dumps(counts, indent=2) + "\n")


def distort(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (N, 1, 28, 28) shifted by up to two pixels, mirrored at random and turned; the number
    of quarter turns (N,)."""
    n, _, height, width = images.shape
    padded = F.pad(images, (2, 2, 2, 2))
    offsets = torch.randint(0, 5, (2, n, 1), generator=generator)
    rows = (offsets[0] + torch.arange(height)).unsqueeze(2)
    columns = (offsets[1] + torch.arange(width)).unsqueeze(1)
    images = padded[torch.arange(n).view(n, 1, 1), 0, rows, columns].unsqueeze(1)
    mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    turns = torch.randint(0, TURNS, (n,), generator=generator)
    turned = torch.stack([images.rot90(k, (2, 3)) for k in range(TURNS)])
    return turned[turns, torch.arange(n)], turns


def pretrain(images: InMemory, epochs: int) -> SmallResNet:
    """Train the network: SGD with Nesterov momentum, one cycle of the learning rate."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = SmallResNet(len(PRETRAINING_CLASSES) * TURNS).to(memory_format=torch.channels_last)
    steps = epochs * len(images) // BATCH_SIZE
    optimizer = torch.optim.SGD(
        model.parameters(), RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.2)
    progress = tqdm(draw_batches(len(images), BATCH_SIZE, steps, SEED), unit="step", disable=None)
    for batch in progress:
        pixels, turns = distort(images.images[batch], generator)
        target = images.labels[batch] * TURNS + turns
        inputs = SHIPPED_FORMAT.normalize(pixels).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(inputs), target, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def measure(model: SmallResNet, images: InMemory) -> float:
    """Share of upright images whose class is told rightly, whatever turn is told with it."""
    right = 0
    for start in range(0, len(images), 500):
        pixels, labels = images.images[start : start + 500], images.labels[start : start + 500]
        answers = model(SHIPPED_FORMAT.normalize(pixels)).softmax(1).view(len(labels), -1, TURNS)
        right += int((answers.sum(2).argmax(1) == labels).sum())
    return right / len(images)


def main() -> None:
    """Make the files and say how good the network is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--raw",
        type=Path,
        default=RAW_FASHION_MNIST,
        help="folder with the four gzipped files (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "fastops" / "finetune" / "assets",
        help="folder to write to (default: the package's assets)",
    )
    parser.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; another number than %(default)s gives slightly other weights",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)

    options.out.mkdir(parents=True, exist_ok=True)
    train = read_raw_fashion_mnist("train", options.raw)
    test = read_raw_fashion_mnist("t10k", options.raw)
    write_sheet(options.out, make_subset(train, test))

    started = time.perf_counter()
    model = pretrain(keep_classes(train, PRETRAINING_CLASSES), options.epochs)
    seconds = time.perf_counter() - started
    accuracy = measure(model, keep_classes(test, PRETRAINING_CLASSES))
    checkpoint = {
        "arch": "small",
        "classes": [FASHION_MNIST[c] for c in PRETRAINING_CLASSES],
        "turns": TURNS,
        "accuracy": accuracy,
        "model": model.state_dict(),
    }
    # Given a name instead of a file, torch.save would write that name into it.
    with complete_file(options.out / "resnet14.pt") as path, open(path, "wb") as file:
        torch.save(checkpoint, file)
    print(f"{accuracy:.4f} of the test images of its own classes right, {seconds:.0f} s")


if __name__ == "__main__":
    main()
