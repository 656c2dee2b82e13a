"""CLIP against transformers with the same random weights, and what the reference does not cover."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.models.language.clip import Clip, ClipConfig, ClipTextConfig, ClipVision, ClipVisionConfig

VISION = ClipVisionConfig.tiny()
TEXT = ClipTextConfig(
    vocab_size=50, max_length=9, width=24, num_layers=2, num_heads=3, ffn_dim=40, eos_id=48, projection_dim=20
)
IMAGE = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
# Ends at different places; what follows is padding, the largest id included.
IDS = np.array([[7, 3, 48, 49, 0, 48], [1, 2, 3, 4, 5, 48]])


@pytest.fixture(scope="module")
def model():
    return random_weights(Clip, ClipConfig(VISION, TEXT))


def random_weights(cls, config, **kwargs):
    """Weights of order one, so that no term of the network is negligible; nothing is compiled for them."""
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), **kwargs)))
    rng = np.random.default_rng(1)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), state))


@pytest.fixture(scope="module")
def reference(model):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = dict(num_hidden_layers="num_layers", num_attention_heads="num_heads")
    sizes |= dict(hidden_size="width", intermediate_size="ffn_dim")
    vision = {theirs: getattr(VISION, ours) for theirs, ours in sizes.items()}
    text = {theirs: getattr(TEXT, ours) for theirs, ours in sizes.items()}
    config = transformers.CLIPConfig(
        vision_config=vision | dict(image_size=VISION.image_size, patch_size=VISION.patch_size),
        text_config=text
        | dict(vocab_size=TEXT.vocab_size, max_position_embeddings=TEXT.max_length, eos_token_id=TEXT.eos_id),
        projection_dim=TEXT.projection_dim,
    )
    reference = transformers.CLIPModel(config).eval()
    reference.load_state_dict(torch_state(model))
    return reference


def torch_state(model):
    """Our weights under transformers' names."""
    import torch

    def block(prefix, blocks, index):
        parts = {
            "layer_norm1": blocks.attention_norm,
            "layer_norm2": blocks.mlp_norm,
            "mlp.fc1": blocks.fc1,
            "mlp.fc2": blocks.fc2,
            "self_attn.q_proj": blocks.attention.query,
            "self_attn.k_proj": blocks.attention.key,
            "self_attn.v_proj": blocks.attention.value,
            "self_attn.out_proj": blocks.attention.out,
        }
        for name, part in parts.items():
            weight = part.kernel[index].T if hasattr(part, "kernel") else part.scale[index]
            yield f"{prefix}.encoder.layers.{index}.{name}.weight", weight
            yield f"{prefix}.encoder.layers.{index}.{name}.bias", part.bias[index]

    vision, text = model.vision, model.text
    state = {
        "vision_model.embeddings.patch_embedding.weight": vision.patch_embed.kernel[...].transpose(3, 2, 0, 1),
        "vision_model.embeddings.class_embedding": vision.class_embed[...],
        "vision_model.embeddings.position_embedding.weight": vision.position_embed[...],
        "text_model.embeddings.token_embedding.weight": text.token_embed.embedding[...],
        "text_model.embeddings.position_embedding.weight": text.position_embed[...],
        "visual_projection.weight": model.visual_projection.kernel[...].T,
        "text_projection.weight": text.projection.kernel[...].T,
        "logit_scale": model.logit_scale[...],
    }
    norms = {"pre_layrnorm": vision.pre_norm, "post_layernorm": vision.post_norm}
    norms = {f"vision_model.{name}": norm for name, norm in norms.items()}
    for name, norm in (norms | {"text_model.final_layer_norm": text.final_norm}).items():
        state |= {f"{name}.weight": norm.scale[...], f"{name}.bias": norm.bias[...]}
    for prefix, side in (("vision_model", vision), ("text_model", text)):
        for index in range(side.config.num_layers):
            state.update(block(prefix, side.layers, index))
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}


@pytest.mark.torch
def test_image_side_matches_transformers(model, reference):
    import torch

    with torch.no_grad():
        wanted = reference.vision_model(torch.from_numpy(IMAGE.transpose(0, 3, 1, 2)), output_hidden_states=True)
    states = nnx.jit(ClipVision.hidden_states, static_argnums=2)(model.vision, IMAGE, (0, 1, 2, 3))
    for index, state in enumerate(states):
        np.testing.assert_allclose(state, wanted.hidden_states[index].numpy(), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(model.vision.pooled(IMAGE), wanted.pooler_output.numpy(), atol=1e-4, rtol=1e-4)
    patches = wanted.hidden_states[-2][:, 1:].numpy().reshape(2, 4, 4, -1)
    np.testing.assert_allclose(model.vision(IMAGE), patches, atol=1e-4, rtol=1e-4)


@pytest.mark.torch
def test_text_side_matches_transformers(model, reference):
    import torch

    with torch.no_grad():
        wanted = reference.text_model(torch.from_numpy(IDS))
        embedding = reference.text_projection(wanted.pooler_output)
    states, projected = jax.jit(lambda model, ids: model(ids))(model.text, IDS)
    np.testing.assert_allclose(states, wanted.last_hidden_state.numpy(), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(projected, embedding.numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.torch
def test_similarity_matches_transformers(model, reference):
    import torch

    with torch.no_grad():
        wanted = reference(torch.from_numpy(IDS), torch.from_numpy(IMAGE.transpose(0, 3, 1, 2)))
    similarity = jax.jit(lambda model: model(IMAGE, IDS))(model)
    np.testing.assert_allclose(similarity, wanted.logits_per_image.numpy(), atol=1e-4, rtol=1e-4)


def test_blocks_behind_the_selected_one_are_not_computed(model):
    cost = {
        layer: jax.jit(lambda model, image, layer=layer: model(image, layer))
        .lower(model.vision, IMAGE)
        .as_text()
        .count("stablehlo.constant dense<3>")
        for layer in (-2, -1)
    }
    assert cost[-2] == 0 and cost[-1] > 0  # length of the loop over the blocks
    broken = nnx.clone(model.vision)
    broken.layers.fc1.kernel[...] = broken.layers.fc1.kernel[...].at[-1].set(jnp.nan)
    np.testing.assert_array_equal(broken(IMAGE), model.vision(IMAGE))
    assert np.isnan(broken(IMAGE, -1)).all()


def test_remat_changes_no_gradient(model):
    grad = jax.jit(jax.grad(lambda vision: jnp.mean(jnp.square(vision(IMAGE, -1)))))
    wanted = grad(model.vision)
    again = nnx.clone(model.vision)
    again.remat = True
    a, b = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (grad(again), wanted))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_bfloat16(model):
    half = random_weights(ClipVision, VISION, dtype=jnp.bfloat16)
    nnx.update(half, nnx.state(model.vision))
    tokens, wanted = jax.jit(ClipVision.__call__)(half, IMAGE), model.vision(IMAGE)
    assert tokens.dtype == jnp.bfloat16
    assert jnp.abs(tokens - wanted).max() < 0.05 * jnp.abs(wanted).max()


@pytest.mark.parametrize(
    ("config", "tokens"), [(ClipVisionConfig.large_336(), 577), (ClipVisionConfig.large_224(), 257)]
)
def test_large(config, tokens):
    vision = nnx.eval_shape(lambda: ClipVision(config, rngs=nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(vision)))
    assert count == 303_507_456 - (577 - tokens) * 1024
    assert vision.position_embed.shape == (tokens, 1024)


def test_bad_input(model):
    with pytest.raises(ValueError, match=r"\(32, 32, 3\), not \(32, 40, 3\)"):
        model.vision(jnp.zeros((1, 32, 40, 3)))
    with pytest.raises(ValueError, match=r"select_layers \(4,\) must be within \[-4, 3\]"):
        model.vision(IMAGE, 4)
    with pytest.raises(ValueError, match="10 tokens are more than CLIP's 9 positions"):
        model.text(jnp.zeros((1, 10), jnp.int32))
    with pytest.raises(ValueError, match="multiple of patch_size"):
        ClipVisionConfig(image_size=30, patch_size=8)
    with pytest.raises(ValueError, match="projection_dim is None"):
        ClipConfig(VISION, dataclasses.replace(TEXT, projection_dim=None))
