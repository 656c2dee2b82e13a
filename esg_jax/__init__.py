"""Entity segmentation and grounding in JAX/Flax."""

from esg_jax.version import __version__ as __version__


def load(path, **options):
    """A model from any checkpoint: weights of ours, or PyTorch's in one of the formats of `esg convert`.

    Args:
        path: a file or folder; what it is shows in its content, not in its name.
        options: `dtype`, `param_dtype`; for PyTorch's also the other options of
            `esg_jax.interop.checkpoints.load_checkpoint`.

    Returns:
        An `esg_jax.models.cropformer.CropFormer`, or another model of `esg_jax.models`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown, damaged or unsafe file, or names and shapes that do not fit together.
    """
    from esg_jax import weights

    if weights.is_weights_file(path):
        language_model = weights.read_info(path)[1].get("llm_weights")
        if language_model:  # the file leaves it out: it was not trained
            from esg_jax.interop.gguf import load_llama, packaged_smollm2

            source = packaged_smollm2() if language_model == "smollm2" else language_model
            arrays = weights.named_arrays(load_llama(source))
            options["given"] = {f"llm.{name}": value for name, value in arrays.items()}
        return weights.load_model(path, **options)
    from esg_jax.interop.checkpoints import load_checkpoint

    return load_checkpoint(path, **options)[0]
