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
    from esg_jax.systems import SYSTEMS

    if weights.is_weights_file(path):
        config, facts = weights.read_info(path)
        for system in SYSTEMS:
            if system.config is type(config):  # otherwise it is a part, which leaves nothing out
                options["given"] = system.given(facts)
        return weights.load_model(path, **options)
    from esg_jax.interop.checkpoints import load_checkpoint

    return load_checkpoint(path, **options)[0]
