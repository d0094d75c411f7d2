"""Fine-tune a pretrained ResNet on pictures: what `python -m fastops finetune` does, in plain PyTorch to copy from.

    python finetune_resnet.py PHOTOS --weights resnet18.pth

PHOTOS holds train/, val/ and test/, each with a folder of pictures for every class. The best weights on val/ are
tested on test/, once. Without --weights torchvision downloads them.
"""

import argparse
import copy
import math
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2

import fastops
import fastops.functional as F
from fastops.optim import AdamW, param_groups

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--arch", default="resnet18", help="one of torchvision's ResNets")
    parser.add_argument("--weights", help="a state_dict of the network, with any last layer")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--lr", type=float, default=1e-3, help="of the head; the backbone's is a tenth"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-augment", dest="augment", action="store_false")
    return parser.parse_args()


def load(folder: Path, size: int, augment: bool) -> ImageFolder:
    """Pictures as uint8 tensors: cropped and flipped at random, or resized with the middle kept."""
    resized = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    varied = [v2.RandomResizedCrop(size, scale=(0.35, 1.0)), v2.RandomHorizontalFlip()]
    return ImageFolder(folder, v2.Compose([v2.PILToTensor(), *(varied if augment else resized)]))


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def batches(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """Full batches from one shuffle after another, so that BatchNorm never meets a single image."""
    generator, size = torch.Generator().manual_seed(seed), min(size, count)
    shuffles = [
        torch.randperm(count, generator=generator) for _ in range(-(-steps * size // count))
    ]
    return [batch.tolist() for batch in torch.cat(shuffles).split(size)[:steps]]


def pretrained(arch: str, weights: str | None, classes: int) -> torch.nn.Module:
    """The network with a new head."""
    model = get_model(arch, weights=None, num_classes=classes)
    state = (
        torch.load(weights, weights_only=True)
        if weights
        else get_model(arch, weights="DEFAULT").state_dict()
    )
    wrong = model.load_state_dict(
        {k: v for k, v in state.items() if not k.startswith("fc.")}, strict=False
    )
    assert set(wrong.missing_keys) == {"fc.weight", "fc.bias"} and not wrong.unexpected_keys, wrong
    return model.to(memory_format=torch.channels_last)


def rate(step: int, steps: int) -> float:
    """A tenth of the steps up, then down along a cosine."""
    rise = max(1, round(steps / 10))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: ImageFolder) -> float:
    model.eval()
    loader = torch.utils.data.DataLoader(images, batch_size=100)
    right = sum(int((model(normalize(x)).argmax(1) == y).sum()) for x, y in loader)
    model.train()
    return right / len(images)


def main() -> None:
    options = parse()
    train = load(options.data / "train", options.size, options.augment)
    val, test = (load(options.data / part, options.size, False) for part in ("val", "test"))

    torch.manual_seed(options.seed)
    model = pretrained(options.arch, options.weights, len(train.classes))
    fastops.patch(model)  # its activations, in place
    head = param_groups(model.fc, weight_decay=0.05)  # not on biases and norms
    body = [
        model.layer4,
        model.layer3,
        model.layer2,
        model.layer1,
        torch.nn.Sequential(model.conv1, model.bn1),
    ]
    groups = [{**group, "lr": options.lr} for group in head]
    groups += [
        {**g, "lr": options.lr / 10}
        for stage in body
        for g in param_groups(stage, weight_decay=0.05)
    ]
    optimizer = AdamW(groups, lr=options.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, options.steps))

    torch.manual_seed(options.seed)
    order = batches(len(train), options.batch_size, options.steps, options.seed)
    best, weights = -1.0, model.state_dict()
    model.train()
    for step, (pixels, labels) in enumerate(
        torch.utils.data.DataLoader(train, batch_sampler=order), 1
    ):
        loss = F.cross_entropy(model(normalize(pixels)), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        print(f"step {step}: loss {loss.item():.6f}")
        if step % max(1, options.steps // 8) == 0 or step == options.steps:
            reached = accuracy(model, val)
            print(f"step {step}: validation accuracy {reached:.4f}")
            if reached > best:
                best, weights = reached, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    print(f"test accuracy {accuracy(model, test):.4f}")
    torch.save({"classes": train.classes, "state_dict": model.state_dict()}, "finetuned.pth")


if __name__ == "__main__":
    main()
