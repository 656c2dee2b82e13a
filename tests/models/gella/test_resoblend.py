"""ResoBlend: shapes of every wiring and ablation, and what each of them may depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.models.gella import resoblend
from esg_jax.models.gella.resoblend import ResoBlend, ResoBlendConfig

CONFIG = ResoBlendConfig(dim=32, num_heads=4, ffn_dim=48)
CHANNELS = (8, 12, 16, 20)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(2, 4, 6, 24)), jnp.float32)
    maps = tuple(
        jnp.asarray(rng.normal(size=(2, 64 // stride, 96 // stride, c)), jnp.float32)
        for stride, c in zip((4, 8, 16, 32), CHANNELS, strict=True)
    )
    return image, maps


def build(**changes):
    return ResoBlend(dataclasses.replace(CONFIG, **changes), 24, CHANNELS, rngs=nnx.Rngs(0))


SWITCHES = ["use_sa", "use_ca", "use_ff", "use_res", "use_conv"]


@pytest.mark.parametrize(
    "changes",
    [{"mode": mode} for mode in resoblend.MODES]
    + [{name: False} for name in SWITCHES]
    + [{"ca_residual": True, "conv_norm": True, "ca_kv_pool": 2}],
    ids=str,
)
def test_output_is_the_pyramid_with_common_width(inputs, changes):
    image, maps = inputs
    outputs = build(**changes)(image, maps)
    assert [x.shape for x in outputs] == [(*x.shape[:3], 32) for x in maps]
    assert all(np.isfinite(x).all() for x in outputs)


def test_only_the_skip_keeps_pixels(inputs):
    """In the literal wiring all detail passes the image grid; the skip adds the pixel itself."""
    image, maps = inputs
    moved = (maps[0].at[:, 3, 5].add(10.0), *maps[1:])

    def local_change(mode):
        model = build(mode=mode)
        change = np.abs(np.asarray(model(image, moved)[0] - model(image, maps)[0])).sum((0, 3))
        return change[3, 5] / np.median(change)

    assert local_change("paper_skip") > 5 * local_change("paper")


def test_without_cross_attention_no_image_enters(inputs):
    image, maps = inputs
    model = build(use_ca=False)
    for x, y in zip(model(image, maps), model(image + 1, maps), strict=True):
        np.testing.assert_array_equal(x, y)


def test_equations_14_and_15(inputs):
    """The wiring against the equations written out with the module's own parts."""
    image, maps = inputs
    model = build(mode="paper", ca_kv_pool=1)
    flat = model.image_proj(image.reshape(2, 24, 24))
    position = resoblend._grid_position((4, 6), 32)
    z = model.self_attention(flat, position)
    level = model.levels[1]
    lateral = level.lateral(maps[1])
    keys = lateral + resoblend._position(lateral).reshape(lateral.shape[1:]) + level.level_embed[...]
    mixed = level.cross(z + position, keys.reshape(2, -1, 32), lateral.reshape(2, -1, 32))
    grid = level.conv((level.ffn(mixed) + flat).reshape(2, 4, 6, 32))
    expected = jax.image.resize(grid, (2, *maps[1].shape[1:3], 32), "bilinear", antialias=False)
    np.testing.assert_allclose(model(image, maps)[1], expected, atol=1e-5)


def test_chunked_attention_is_exact(inputs, monkeypatch):
    image, maps = inputs
    model = build()
    whole = model(image, maps)
    monkeypatch.setattr(resoblend, "_MAX_LOGITS", 2000)
    for x, y in zip(model(image, maps), whole, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="resoblend.mode"):
        ResoBlendConfig(mode="other")
