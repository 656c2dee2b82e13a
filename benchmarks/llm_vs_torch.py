"""The packaged language model beside transformers' in one run: the same weights, prompts and greedy tokens.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.llm_vs_torch
    python -m benchmarks.llm_vs_torch --prompt 512 --new 64

Prints processor seconds of this process (and wall seconds) for a prompt's logits and for the tokens after it, and the
ratio to PyTorch; above 1 is faster. float32, one row. Fails if the tokens differ.
"""

import argparse
import time

import jax
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from esg_jax.inference.grounding.decoding import DecodingConfig, generate
from esg_jax.interop.convert import from_ours
from esg_jax.interop.families.llama import LLAMA, llama_json
from esg_jax.interop.gguf import load_llama, packaged_smollm2
from esg_jax.text.tokenizers import GgufTokenizer
from esg_jax.weights import named_arrays

_TEXT = "A photograph shows a street in the rain, with two parked cars, a bus, and people who carry umbrellas. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    path = packaged_smollm2()
    tokenizer, ours = GgufTokenizer(path), load_llama(path)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_json(ours.config))).eval()
    weights = {name: torch.from_numpy(np.array(value)) for name, value in from_ours(named_arrays(ours), LLAMA).items()}
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    ids = (tokenizer.encode(_TEXT) * (arguments.prompt // 16 + 1))[: arguments.prompt]
    row, lengths = np.array([ids]), np.array([len(ids)])
    # No token ends the text, so that both write all of them.
    config = DecodingConfig(eos_id=-1, pad_id=tokenizer.pad_id, max_new_tokens=arguments.new)

    read = jax.jit(lambda model, ids: model.logits(model(model.embed(ids))[0][:, -1]))
    write = jax.jit(generate, static_argnames="config")

    def torch_write():
        options = dict(do_sample=False, eos_token_id=None, pad_token_id=tokenizer.pad_id)
        new = theirs.generate(torch.tensor(row), max_new_tokens=arguments.new, **options)
        return new[0, len(ids) :].tolist()

    runs = {
        "prompt": (
            lambda: jax.block_until_ready(read(ours, row)),
            lambda: theirs(torch.tensor(row), logits_to_keep=1).logits,
        ),
        "prompt and answer": (
            lambda: np.asarray(write(ours, ours.embed(row), lengths, config).ids)[0].tolist(),
            torch_write,
        ),
    }
    with torch.no_grad():
        first = [run() for run in runs["prompt and answer"]]  # also compiles
        runs["prompt"][0]()
        if first[0] != first[1]:
            raise SystemExit("the greedy tokens differ")
        table = Table("", "ours, CPU s (wall)", "PyTorch, CPU s (wall)", "ratio of CPU s", "tokens/s, ours (wall)")
        spent = {name: [time_both(pair) for _ in range(arguments.rounds)] for name, pair in runs.items()}
    medians = {name: np.median(np.array(rounds), axis=0) for name, rounds in spent.items()}
    medians["answer"] = medians["prompt and answer"] - medians["prompt"]
    for name, count in (("prompt", len(ids)), ("answer", arguments.new)):
        (cpu, wall), (torch_cpu, torch_wall) = medians[name]
        cells = [f"{cpu:.2f} ({wall:.2f})", f"{torch_cpu:.2f} ({torch_wall:.2f})", f"{torch_cpu / cpu:.2f}"]
        table.add_row(f"{name}, {count} tokens", *cells, f"{count / wall:.1f}")
    Console().print(table)
    print(f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}; median of "
          f"{arguments.rounds}, {len(first[0])} tokens equal")  # fmt: skip


def time_both(pair) -> list[tuple[float, float]]:
    """(processor, wall) seconds of both, one after the other."""
    out = []
    for run in pair:
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        out.append((time.process_time() - cpu, time.perf_counter() - wall))
    return out


if __name__ == "__main__":
    main()
