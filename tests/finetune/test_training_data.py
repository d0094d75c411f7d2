"""What training is given: images varied and mixed, classes balanced, three parts kept apart."""

import pytest
import torch
from finetuning import draw_pictures, quick

from fastops import memory
from fastops.finetune import finetune
from fastops.finetune.augmentation import Augmented, Mixture, draw_mixture, training_transform
from fastops.finetune.cutting import CutNetwork
from fastops.finetune.data import InMemory, balancing_weights, draw_batches, iterate
from fastops.finetune.networks import SHIPPED_FORMAT, input_format
from fastops.finetune.trainer import Trainer


@pytest.mark.parametrize("level", ["light", "strong"])
@pytest.mark.parametrize(
    "format", [SHIPPED_FORMAT, input_format("resnet18", 32)], ids=["gray", "color"]
)
def test_an_image_is_varied_by_its_own_numbers(level, format):
    pixels = torch.randint(
        256, (4, format.channels, format.stored, format.stored), dtype=torch.uint8
    )
    images = InMemory(pixels, torch.arange(4))
    varied = Augmented(images, training_transform(level, format), seed=3)
    state = torch.get_rng_state()
    batch, labels = varied.__getitems__([(0, 10), (0, 11), (2, 12)])
    assert torch.equal(torch.get_rng_state(), state) and labels.tolist() == [0, 0, 2]
    assert (
        batch.shape == (3, format.channels, format.size, format.size) and batch.dtype == torch.uint8
    )
    assert not torch.equal(batch[0], batch[1])
    assert torch.equal(varied.__getitems__([(0, 11)])[0][0], batch[1])  # alone, or in a batch
    pairs = [[(0, 10), (0, 11)], [(2, 12)]]
    again = torch.cat(
        [part for part, _ in iterate(varied, pairs, workers=1)]
    )  # or by another process
    assert torch.equal(again, batch)
    other = Augmented(images, training_transform(level, format), seed=4)
    assert not torch.equal(other.__getitems__([(0, 10)])[0][0], batch[0])


def test_no_variation():
    assert training_transform("none", SHIPPED_FORMAT) is None


def test_mixtures():
    torch.manual_seed(0)
    images = torch.rand(6, 3, 16, 16)
    assert draw_mixture(0, 0, 6, 16) is None
    mixture = draw_mixture(0.4, 0, 6, 16)
    assert mixture.box is None
    expected = mixture.share * images + (1 - mixture.share) * images[mixture.others]
    assert torch.equal(mixture.mix(images), expected)
    for _ in range(20):
        pasted = draw_mixture(0, 1.0, 6, 16)
        mixed = pasted.mix(images)
        own = (mixed == images).all(1)  # of each pixel
        share = own[pasted.others != torch.arange(6)].double().mean().item()
        assert share == pytest.approx(pasted.share)
        assert 0 <= pasted.share <= 1
    kinds = {draw_mixture(0.4, 1.0, 6, 16).box is None for _ in range(40)}
    assert kinds == {True, False}
    edge = Mixture(1.0, torch.tensor([1, 0]), (slice(3, 3), slice(0, 5)))
    assert torch.equal(edge.mix(images[:2]), images[:2])


def test_classes_are_balanced():
    labels = torch.tensor([0] * 90 + [1] * 9 + [3])
    weights = balancing_weights(labels)
    assert weights[labels].mean() == pytest.approx(1)
    assert (
        weights[0] * 90 == pytest.approx(weights[1].item() * 9) == pytest.approx(weights[3].item())
    )
    batches = draw_batches(100, 10, 300, 0, weights[labels])
    counts = torch.bincount(labels[torch.tensor(batches).flatten()], minlength=4)
    assert counts[2] == 0 and counts[[0, 1, 3]].min() > 800
    assert batches == draw_batches(100, 10, 300, 0, weights[labels])


@pytest.mark.parametrize("backend", ["fastops", "torch"])
@pytest.mark.parametrize("options", [{}, {"mixup": 0.5}], ids=["plain", "mixup"])
def test_the_loss_is_weighted(tmp_path, monkeypatch, backend, options):
    """Weights of 1 give the loss without them; the classes' own another one."""
    draw_pictures(tmp_path / "data", ("cat", "dog"), count=5)
    draw_pictures(tmp_path / "data", ("owl",), count=12)
    options = {"data": tmp_path / "data", "modes": ("features",), "augment": "none", **options}
    options |= {"backend": backend, "steps": 2}
    plain = finetune(quick(tmp_path, **options)).runs[0].losses
    weighted = finetune(quick(tmp_path / "run", balance="loss", shots=0, **options)).runs[0].losses
    unweighted = finetune(quick(tmp_path / "run" / "run", shots=0, **options)).runs[0].losses
    assert weighted != unweighted
    monkeypatch.setattr("fastops.finetune.trainer.balancing_weights", lambda labels: torch.ones(3))
    ones = (
        finetune(quick(tmp_path / "run" / "run" / "run", balance="loss", **options)).runs[0].losses
    )
    assert ones == pytest.approx(plain, rel=1e-5)


def test_the_best_weights_on_validation_are_tested_once(tmp_path, monkeypatch):
    """Made-up predictions of the validation images: the third is the best; the fifth equals it but for its loss."""
    draw_pictures(tmp_path / "data", count=10)
    confidences = iter([0.1, 0.2, 0.9, 0.3, 0.8, 0.2, 0.1, 0.05])
    states, sizes = [], []
    predict = CutNetwork.predict

    def predicted(self, images, trained=None):
        sizes.append(len(images))
        found = predict(self, images, trained)
        if len(images) == 3:  # the validation images; six are tested
            states.append(self.trained.state_dict()["5.weight"].clone())
            own = next(confidences)
            found = torch.full((3, 3), (1 - own) / 2)
            found[range(3), images.labels] = own
        return found

    monkeypatch.setattr(CutNetwork, "predict", predicted)
    config = quick(tmp_path, data=tmp_path / "data", modes=("full",), steps=8, lr=0.1)
    result = finetune(config)
    assert sizes == [3] * 8 + [6]
    assert [accuracy for _, accuracy in result.runs[0].curve] == [0, 0, 1, 0, 1, 0, 0, 0]
    saved = torch.load(result.folder / "checkpoints" / "full.pt", weights_only=True)["model"]
    assert [torch.equal(saved["fc.weight"], state) for state in states].index(True) == 2


def test_the_head_learns_first(tmp_path, monkeypatch):
    draw_pictures(tmp_path / "data", count=6)
    seen = []
    step = Trainer.step

    def watched(self, *batch):
        pieces = self.network.pieces.items()
        seen.append([n for n, piece in pieces if any(p.requires_grad for p in piece.parameters())])
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "step", watched)
    finetune(quick(tmp_path, data=tmp_path / "data", modes=("full",), steps=10))
    assert [len(names) for names in seen] == [1, 1] + [5] * 8 and seen[0] == ["head"]


@pytest.mark.parametrize("backend", ["fastops", "torch"])
def test_memory_is_served_while_fastops_trains(tmp_path, small_test, monkeypatch, backend):
    served = []
    step = Trainer.step

    def watched(self, *batch):
        served.append(memory.pool_info().get("serves_torch", False))
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "step", watched)
    before = memory.pool_info().get("serves_torch", False)
    finetune(quick(tmp_path, modes=("full",), backend=backend))
    can = hasattr(memory, "serve_torch")
    assert served == [(backend == "fastops" and can) or before] * 3
    assert memory.pool_info().get("serves_torch", False) == before
