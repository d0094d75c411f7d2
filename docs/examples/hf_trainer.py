"""transformers.Trainer with fastops: patch() on the model, optimizer_cls_and_kwargs for the optimizer. A small BERT from
a config learns which of two words comes first; nothing is downloaded.

    python docs/examples/hf_trainer.py

The same training is run with torch's own classes, for comparison.
"""

import sys
import tempfile

import torch

import fastops

try:
    import accelerate  # noqa: F401  the Trainer needs it
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
except ModuleNotFoundError as error:
    print(
        f"hf_trainer.py needs transformers and accelerate ({error}): pip install 'transformers[torch]'",
        file=sys.stderr,
    )
    sys.exit(2)

STEPS, WORDS, LENGTH = 12, 16, 8


def make_data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, WORDS, (64, LENGTH), generator=generator)
    labels = torch.arange(64) % 2
    rows[:, 0] = labels  # the word 0 or the word 1 comes first
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def train(fast: bool) -> list[float]:
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,  # fastops's dropout draws other masks than torch's
            attention_probs_dropout_prob=0.0,
        )
    )
    if fast:
        print(fastops.patch(model, functional=True))  # the activations of transformers too
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            weight_decay=0.01,  # the Trainer makes the two groups of parameters
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        optimizer = fastops.optim.AdamW if fast else torch.optim.AdamW
        trainer = Trainer(
            model,
            arguments,
            train_dataset=make_data(),
            optimizer_cls_and_kwargs=(optimizer, {"lr": arguments.learning_rate}),
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    losses, native = train(fast=True), train(fast=False)
    print("fastops", *(f"{float(value):.6f}" for value in losses))
    print("torch", *(f"{float(value):.6f}" for value in native))


if __name__ == "__main__":
    main()
