"""The same tour for Keras 3 on its torch back end: fastops activations, losses, dropout and optimizers in Keras models,
L1 and L2 regularisation, and transfer learning with a ResNet50 (frozen first, its last layers at a low rate after).

    python docs/examples/keras_primer.py [--pretrained]     # --pretrained downloads Keras's weights

Keras's losses and those of fastops.functional:

    mean_squared_error, mean_absolute_error     mse_loss, l1_loss
    binary_crossentropy                         binary_cross_entropy; of logits, binary_cross_entropy_with_logits
    categorical_crossentropy                    cross_entropy of logits with one-hot rows (or any probabilities)
    sparse_categorical_crossentropy             cross_entropy of logits with class indices

Keras takes probabilities unless it is told from_logits=True; cross_entropy takes logits, so that the last layer has no
softmax. Keras's regularizers.l2(a) adds a sum(w^2), which is weight_decay=2a; regularizers.l1(a) is l1=a.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from keras import layers

import fastops
import fastops.functional as F


def cross_entropy(y_true, y_pred):
    """A Keras loss of logits, against class indices or one-hot rows; Keras takes the mean."""
    classes = y_true.dim() == y_pred.dim() and y_true.shape == y_pred.shape
    return F.cross_entropy(y_pred, y_true if classes else y_true.flatten().long(), reduction="none")


class Dropout(layers.Layer):
    def __init__(self, rate, **options):
        super().__init__(**options)
        self.rate = rate

    def call(self, x, training=False):
        return F.dropout(x, self.rate, training=bool(training))


class FastModel(keras.Model):
    """A Keras model whose fit() steps an optimizer of fastops.optim, given as `fast` before fit()."""

    fast = None

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
        loss.backward()
        self.fast.step()
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}


def parameters(model):
    """The trainable weights of a Keras model as torch's parameters, kernels apart from the rest."""
    kernels, rest = [], []
    for weight in model.trainable_weights:
        (kernels if weight.name == "kernel" else rest).append(weight.value)
    return kernels, rest


def show_activations():
    x = keras.ops.convert_to_tensor([[-2.0, -0.5, 0.0, 1.0]])
    for name in ("relu", "sigmoid", "tanh", "softmax", "gelu", "mish", "silu", "elu", "selu"):
        ours, theirs = getattr(F, name), getattr(keras.activations, name)
        layer = layers.Activation((lambda t, f=ours: f(t, -1)) if name == "softmax" else ours)
        approximate = {"approximate": False} if name == "gelu" else {}
        torch.testing.assert_close(layer(x), theirs(x, **approximate))
        print(f"{name}: {[round(v, 4) for v in layer(x).flatten().tolist()]}")


def show_losses():
    torch.manual_seed(0)
    logits, classes = torch.randn(6, 4), torch.tensor([0, 3, 1, 2, 2, 0])
    one_hot, p = torch.eye(4)[classes], torch.rand(6, 1)
    y = torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0], [0.0]])
    pairs = {
        "mean_squared_error": (F.mse_loss(p, y), keras.losses.MeanSquaredError()(y, p)),
        "mean_absolute_error": (F.l1_loss(p, y), keras.losses.MeanAbsoluteError()(y, p)),
        "binary_crossentropy": (
            F.binary_cross_entropy(p, y),
            keras.losses.BinaryCrossentropy()(y, p),
        ),
        "categorical_crossentropy": (
            F.cross_entropy(logits, one_hot),
            keras.losses.CategoricalCrossentropy(from_logits=True)(one_hot, logits),
        ),
        "sparse_categorical_crossentropy": (
            F.cross_entropy(logits, classes),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True)(classes, logits),
        ),
    }
    for name, (ours, theirs) in pairs.items():
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        print(f"{name} {ours.item():.4f}, Keras {theirs.item():.4f}")


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 20, generator=generator)
    return x.numpy(), (x[:, :3].sum(1) > 0).long().numpy()


def make_model():
    inputs = keras.Input((20,))
    h = layers.Dense(32, activation=F.relu)(inputs)
    h = Dropout(0.1)(h)
    return FastModel(inputs, layers.Dense(2)(h))


def show_optimizers():
    """Every optimizer, and L1 and L2 on the kernels alone, through Keras's own fit()."""
    x, y = problem()
    recipes = {
        "SGD": lambda groups: fastops.optim.SGD(groups, lr=0.1, momentum=0.9),
        "Adam": lambda groups: fastops.optim.Adam(groups, lr=0.01),
        "RMSprop": lambda groups: fastops.optim.RMSprop(groups, lr=0.005),
        "AdamW, L1 and L2": lambda groups: fastops.optim.AdamW(
            [{**groups[0], "l1": 1e-3, "weight_decay": 2e-2}, {**groups[1], "weight_decay": 0.0}],
            lr=0.01,
        ),
    }
    for name, make in recipes.items():
        keras.utils.set_random_seed(1)
        model = make_model()
        model.compile(loss=cross_entropy, metrics=[keras.metrics.SparseCategoricalAccuracy()])
        kernels, rest = parameters(model)
        model.fast = make([{"params": kernels}, {"params": rest}])
        history = model.fit(x, y, batch_size=64, epochs=8, verbose=0).history
        print(
            f"{name}: loss {history['loss'][0]:.3f} -> {history['loss'][-1]:.3f}, "
            f"accuracy {history['sparse_categorical_accuracy'][-1]:.3f}"
        )


def show_regularisation():
    """One step from the same weights: Keras's regularizers in the loss, and the optimizer's own."""
    x, y = (torch.as_tensor(v) for v in problem())
    stepped = []
    for regularizer in (keras.regularizers.L1L2(0.01, 0.02), None):
        keras.utils.set_random_seed(2)
        inputs = keras.Input((20,))
        outputs = layers.Dense(2, kernel_regularizer=regularizer)(inputs)
        model = keras.Model(inputs, outputs)
        kernels, rest = parameters(model)
        penalty = {} if regularizer else {"l1": 0.01, "weight_decay": 2 * 0.02}
        groups = [{"params": kernels, **penalty}, {"params": rest}]
        optimizer = fastops.optim.SGD(groups, lr=0.1)
        loss = F.cross_entropy(model(x), y) + sum(model.losses)
        loss.backward()
        optimizer.step()
        stepped.append(kernels[0].detach().clone())
    torch.testing.assert_close(*stepped)
    print("L1 and L2 by the optimizer: the step that Keras's regularizers give")


def fine_tune(pretrained):
    """A ResNet50 without its head, frozen, under a new one; then its last ten layers too, at a low rate."""
    keras.utils.set_random_seed(3)
    shape = (224, 224, 3) if pretrained else (64, 64, 3)
    base = keras.applications.ResNet50(
        weights="imagenet" if pretrained else None, include_top=False, input_shape=shape
    )
    base.trainable = False
    inputs = keras.Input(shape)
    h = layers.GlobalAveragePooling2D()(base(inputs, training=False))
    model = FastModel(inputs, layers.Dense(10)(h))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(16, *shape, generator=generator).numpy()
    labels = torch.randint(0, 10, (16,), generator=generator).numpy()
    frozen = [w.value.detach().clone() for w in base.weights]

    def fit(lr, epochs):
        model.compile(loss=cross_entropy)
        kernels, rest = parameters(model)
        model.fast = fastops.optim.Adam(kernels + rest, lr=lr)
        return model.fit(images, labels, batch_size=16, epochs=epochs, verbose=0).history["loss"]

    first = fit(1e-3, 6)
    assert all(torch.equal(a, w.value) for a, w in zip(frozen, base.weights, strict=True))
    print(f"feature extraction: loss {first[0]:.4f} -> {first[-1]:.4f}, backbone unchanged")
    base.trainable = True
    for k, layer in enumerate(reversed(base.layers)):
        # BatchNormalization keeps its statistics: Keras would else take those of the batch.
        layer.trainable = k < 10 and not isinstance(layer, layers.BatchNormalization)
    last = fit(1e-5, 2)
    moved = sum(not torch.equal(a, w.value) for a, w in zip(frozen, base.weights, strict=True))
    print(f"last ten layers at a low rate: loss {last[-1]:.4f}, {moved} of its weights moved")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", action="store_true", help="download Keras's weights")
    pretrained = parser.parse_args().pretrained
    show_activations()
    show_losses()
    show_optimizers()
    show_regularisation()
    fine_tune(pretrained)


if __name__ == "__main__":
    main()
