"""The optimizers in the hands of libraries that know torch.optim: distributed checkpoints, accelerate, Hugging Face's
Trainer, Lightning. `make integrations` installs them and runs these."""

import pytest
import torch
from torch import nn

import fastops.optim

OURS = {
    "Adam": {"amsgrad": True},
    "AdamW": {"ema_decay": 0.9, "state_dtype": torch.bfloat16, "rounding": "stochastic"},
    "SGD": {"lr": 0.05, "momentum": 0.9, "max_grad_norm": 1.0, "l1": 1e-3},
    "RMSprop": {"centered": True, "eps": 1e-3},
}
every = pytest.mark.parametrize("name", OURS)


def make(name, model):
    return getattr(fastops.optim, name)(model.parameters(), **OURS[name])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=generator)
    return x, x.sum(1, keepdim=True)


def train(model, optimizer, steps, start=0, backward=torch.Tensor.backward):
    for step in range(start, start + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()


def assert_equal(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


# ------------------------------------------------------------------------------------------------ torch itself


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")  # fmt: skip
@every
def test_distributed_checkpoint(name, tmp_path):
    """Saved and loaded by torch.distributed.checkpoint, in one process; resumed to the bit."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = network()
    optimizer = make(name, model)
    train(model, optimizer, 3)
    values, states = get_state_dict(model, optimizer)
    dcp.save({"model": values, "optimizer": states}, checkpoint_id=tmp_path)
    train(model, optimizer, 3, start=3)

    torch.manual_seed(1)
    other = network()
    resumed = make(name, other)
    values, states = get_state_dict(
        other, resumed
    )  # steps once with a learning rate of 0 to have states
    loaded = {"model": values, "optimizer": states}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])  # fmt: skip
    train(other, resumed, 3, start=3)
    assert_equal(model, other)


@every
def test_step_within_backward(name):
    """optimizer.step() from within backward, a parameter at a time (register_post_accumulate_grad_hook)."""
    models = [network(), network()]
    whole = getattr(fastops.optim, name)(models[0].parameters(), lr=0.01)
    train(models[0], whole, 3)
    single = {p: getattr(fastops.optim, name)([p], lr=0.01) for p in models[1].parameters()}

    def step(p):
        single[p].step()
        single[p].zero_grad()

    for p in models[1].parameters():
        p.register_post_accumulate_grad_hook(step)
    for k in range(3):
        x, y = batch(k)
        nn.functional.mse_loss(models[1](x), y).backward()
    assert_equal(*models)


# ------------------------------------------------------------------------------------------------ others


@pytest.mark.integration("accelerate")
@every
def test_accelerate(name, tmp_path):
    """Accelerator.prepare, accumulation, clip_grad_norm_ and save_state/load_state."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = network()
    optimizer = make(name, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    train(model, optimizer, 3, backward=accelerator.backward)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    accelerator.save_state(str(tmp_path))
    train(model, optimizer, 2, start=3, backward=accelerator.backward)
    expected = [p.detach().clone() for p in model.parameters()]
    accelerator.load_state(str(tmp_path))
    train(model, optimizer, 2, start=3, backward=accelerator.backward)
    assert all(map(torch.equal, expected, model.parameters()))
    if "rounding" not in OURS[name]:  # whose seed another optimizer draws anew
        plain = network()
        train(plain, make(name, plain), 5)
        assert all(map(torch.equal, expected, plain.parameters()))


@pytest.mark.integration("transformers", "accelerate")
@every
def test_hugging_face_trainer(name, tmp_path):
    """Trainer(optimizer_cls_and_kwargs=...): groups with and without weight decay, a schedule, and a resumed run that
    ends where the whole one does."""
    from transformers import Trainer, TrainingArguments

    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, labels):
            y = self.net(x)
            return {"loss": nn.functional.mse_loss(y, labels), "logits": y}

    data = [{"x": x, "labels": y} for x, y in zip(*batch(0), strict=True)]

    def run(folder, **more):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=6, save_steps=3, per_device_train_batch_size=4, report_to=[],
            weight_decay=0.01, lr_scheduler_type="linear", use_cpu=True, disable_tqdm=True, seed=0, learning_rate=0.01,
        )  # fmt: skip
        options = {"lr": 0.01, **OURS[name]}
        trainer = Trainer(
            Regression(), arguments, train_dataset=data, optimizer_cls_and_kwargs=(getattr(fastops.optim, name), options)
        )  # fmt: skip
        trainer.train(**more)
        assert type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__module__.startswith("fastops")  # fmt: skip
        return trainer.model

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_equal(whole, resumed)


@pytest.mark.integration("lightning")
@every
def test_lightning(name, tmp_path):
    """Trainer.fit with a scheduler, its own clipping and a checkpoint."""
    import lightning.pytorch as lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, given, _):
            x, y = given
            return nn.functional.mse_loss(self.net(x), y)

        def configure_optimizers(self):
            optimizer = make(name, self)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    loader = torch.utils.data.DataLoader([(x, y) for x, y in zip(*batch(0), strict=True)], batch_size=4)  # fmt: skip
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "gradient_clip_val": 1.0, "default_root_dir": tmp_path}  # fmt: skip
    torch.manual_seed(0)
    whole = Module()
    trainer = lightning.Trainer(max_epochs=1, **options)
    trainer.fit(whole, loader)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Module()
    again = lightning.Trainer(max_epochs=2, **options)
    again.fit(resumed, loader, ckpt_path=tmp_path / "one.ckpt", weights_only=False)
    torch.manual_seed(0)
    straight = Module()
    lightning.Trainer(max_epochs=2, **options).fit(straight, loader)
    assert_equal(straight, resumed)
