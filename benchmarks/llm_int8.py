"""What int8 kernels cost the language model in accuracy: `python -m benchmarks.llm_int8 TEXT_FILE...`

Scores the text of the files with the packaged SmolLM2-135M-Instruct in float32, bfloat16 and with int8 kernels, in
windows of `--window` tokens, and prints perplexity, how often the most probable token agrees with float32's, and the
mean Kullback-Leibler divergence from float32's distribution.
"""

import argparse
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from esg_jax.interop.gguf import load_llama, packaged_smollm2
from esg_jax.models.language.quantized import quantize
from esg_jax.text.tokenizers import GgufTokenizer


@jax.jit
def log_probabilities(model, ids_bt):
    hidden, _ = model(model.embed(ids_bt))
    return jax.nn.log_softmax(model.logits(hidden), axis=-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4, help="how many windows to score at most")
    args = parser.parse_args()

    path = packaged_smollm2()
    ids = GgufTokenizer(path).encode("\n".join(file.read_text() for file in args.files))
    count = min(len(ids) // args.window, args.windows)
    if not count:
        parser.error(f"the text has {len(ids)} tokens, fewer than one window of {args.window}")
    windows = np.reshape(ids[: count * args.window], (count, args.window))

    model = load_llama(path)
    variants = {
        "float32": lambda: model,
        "bfloat16": lambda: load_llama(path, dtype=jnp.bfloat16),
        "int8, float32": lambda: quantize(model),
        "int8, bfloat16": lambda: quantize(load_llama(path, dtype=jnp.bfloat16)),
    }
    table = Table("kernels, compute", "perplexity", "same best token", "mean KL", "weights, MB")
    exact = None
    for name, build in variants.items():
        variant = build()
        scores = np.concatenate([np.asarray(log_probabilities(variant, row[None])) for row in windows])
        exact = scores if exact is None else exact
        loss = -np.take_along_axis(scores[:, :-1], windows[:, 1:, None], axis=-1).mean()
        same = np.mean(scores.argmax(-1) == exact.argmax(-1))
        divergence = np.mean(np.sum(np.exp(exact) * (exact - scores), axis=-1))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variant)) / 1e6
        table.add_row(name, f"{math.exp(loss):.3f}", f"{same:.1%}", f"{divergence:.5f}", f"{size:.0f}")
    Console().print(f"{count * (args.window - 1)} predicted tokens")
    Console().print(table)


if __name__ == "__main__":
    main()
