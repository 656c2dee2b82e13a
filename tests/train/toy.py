"""A model, task and data small enough that compiling a step takes a second."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esg_jax.train.state import ModelDef


class Frozen(nnx.Variable):
    """Stands for the statistics of a frozen batch norm."""


class Toy(nnx.Module):
    """Two linear layers with the parameter names that the rules look for."""

    def __init__(self, *, rngs):
        self.backbone = nnx.Linear(8, 16, rngs=rngs)
        self.mlp = nnx.List([nnx.Linear(16, 16, rngs=rngs)])
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.class_head = nnx.Linear(16, 4, rngs=rngs)
        self.scale = Frozen(jnp.full((), 2.0))

    def __call__(self, x):
        x = jax.nn.relu(self.backbone(x)) * self.scale[...]
        return self.class_head(self.norm(self.mlp[0](x)))


class ToyTask:
    """Weighted squared error with noise drawn per image; weights make the mean depend on the whole batch."""

    def __init__(self, whole_batch: bool = False):
        self.whole_batch = whole_batch

    def inputs(self, batch):
        return batch

    def normalizers(self, batch):
        return batch["weight"].sum()

    def loss(self, model, batch, keys, normalizers):
        noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
        error = jnp.mean((model(batch["image"]) - batch["target"] + 0.1 * noise) ** 2, axis=-1)
        loss = jnp.sum(error * batch["weight"]) / normalizers
        return loss, {"loss_toy": loss}


def toy_model():
    return ModelDef(lambda: Toy(rngs=nnx.Rngs(0)))


def toy_batch(index: int, batch_size: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(index)
    return {
        "image": rng.normal(size=(batch_size, 8)).astype(np.float32),
        "target": rng.normal(size=(batch_size, 4)).astype(np.float32),
        "weight": rng.uniform(0.5, 2.0, size=batch_size).astype(np.float32),
    }


def toy_batches(seed: int = 0):
    """A Grain iterator, so that checkpoints can hold its position."""
    return iter(grain.MapDataset.range(1000).seed(seed).shuffle().map(toy_batch).to_iter_dataset())
