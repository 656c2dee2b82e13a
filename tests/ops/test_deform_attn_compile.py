"""What can be checked of the accelerator kernels without an accelerator: real compilers, emulation, lowering."""

import ctypes
import os
import shutil
import subprocess
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from esg_jax.ops.deform_attn import cuda, deform_attn, pallas_gpu

LEVELS = ((25, 42), (50, 84), (100, 167))
LEVELS4 = ((13, 21), *LEVELS)
# The two cores of a v4 are one device by default on real machines, as those of a v5p.
TOPOLOGIES = {
    "v4": ("v4:2x2x1", dict(chip_config_name="megacore")),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:2x2", {}),
}


def tpu_mesh(generation):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    # Compiling needs no device, so it need not be the machine's only user of libtpu.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name, options = TOPOLOGIES[generation]
    devices = topologies.get_topology_desc(name, "tpu", **options).devices
    return jax.sharding.Mesh(np.array(devices[:1]), ("data",))


def abstract_arguments(levels, queries, dtype, sharding, batch=1, heads=8, channels=32, points=4):
    area = sum(height * width for height, width in levels)
    samples = (batch, queries or area, heads, len(levels), points)
    return (
        jax.ShapeDtypeStruct((batch, area, heads, channels), dtype, sharding=sharding),
        jax.ShapeDtypeStruct((*samples, 2), jnp.float32, sharding=sharding),
        jax.ShapeDtypeStruct(samples, jnp.float32, sharding=sharding),
    )


def compile_gradient(generation, levels, queries=None, dtype=jnp.bfloat16):
    mesh = tpu_mesh(generation)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def forward_backward(*args):
        out, pull = jax.vjp(lambda values, *rest: deform_attn(values, levels, *rest), *args)
        return out, pull(out)

    with jax.set_mesh(mesh):
        return jax.jit(forward_backward).lower(*abstract_arguments(levels, queries, dtype, sharding)).compile()


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_tpu_compiles_encoder(generation):
    """The dispatcher's choice for TPU at the true shape is the Pallas kernels, in little memory."""
    compiled = compile_gradient(generation, LEVELS)
    # A forward and a backward kernel per level; a plain four-corner gather needs 3.2 GB here.
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2 * len(LEVELS)
    assert compiled.memory_analysis().peak_memory_in_bytes < 0.25 * 3.2e9


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("generation", "levels", "queries", "dtype"),
    [
        ("v4", LEVELS, None, jnp.float32),
        ("v4", LEVELS4, None, jnp.bfloat16),
        ("v4", LEVELS, 300, jnp.bfloat16),
        ("v5e", LEVELS, 300, jnp.bfloat16),
        ("v5p", LEVELS, 900, jnp.bfloat16),
        ("v6e", LEVELS4, 900, jnp.float32),
    ],
)
def test_tpu_compiles_other_shapes(generation, levels, queries, dtype):
    text = compile_gradient(generation, levels, queries, dtype).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2 * len(levels)


def test_cpu_memory_is_bounded():
    """Training on five views of 800x1333: gathering all corners at once takes 12 GB here."""

    def forward_backward(*args):
        out, pull = jax.vjp(lambda values, *rest: deform_attn(values, LEVELS, *rest, implementation="xla"), *args)
        return out, pull(out)

    compiled = jax.jit(forward_backward).lower(*abstract_arguments(LEVELS, None, jnp.float32, None, batch=5)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1e9


def test_tpu_falls_back_where_a_level_is_too_large():
    """A 400x400 level does not fit in VMEM: XLA's packed gather takes over, and forcing the kernel is an error."""
    levels = ((400, 400),)
    args = abstract_arguments(levels, 10, jnp.float32, None)
    text = jax.jit(deform_attn, static_argnums=1).trace(args[0], levels, *args[1:]).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" not in text.as_text()
    with pytest.raises(ValueError, match="VMEM"):
        jax.eval_shape(lambda *a: deform_attn(a[0], levels, *a[1:], implementation="pallas_tpu"), *args)


def test_cuda_lowering(monkeypatch):
    """Once built, the CUDA kernels are what a GPU gets, in both directions; before that, XLA."""
    args = abstract_arguments(LEVELS, 300, jnp.bfloat16, None)

    def lowered():
        def loss(values, *rest):
            return (deform_attn(values, LEVELS, *rest).astype(jnp.float32) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2))).trace(*args).lower(lowering_platforms=("cuda",)).as_text()

    monkeypatch.setattr(cuda, "available", lambda: True)
    text = lowered()
    assert "esg_deform_attn_forward" in text and "esg_deform_attn_backward" in text
    monkeypatch.setattr(cuda, "available", lambda: False)
    assert "esg_deform_attn" not in lowered()
    with pytest.raises(ValueError, match="build_cuda"):
        jax.eval_shape(lambda *a: deform_attn(a[0], LEVELS, *a[1:], implementation="cuda"), *args)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="nvcc is missing")
def test_cuda_compiles_for_sm_80_and_sm_90(tmp_path):
    library = cuda.build(tmp_path / "deform_attn.so")
    for arch in (b"sm_80", b"sm_90"):
        assert arch in library.read_bytes()
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    assert "EsgDeformAttnForward" in symbols and "EsgDeformAttnBackward" in symbols


@pytest.mark.parametrize(
    ("shape", "dtype", "shapes", "reason"),
    [
        ((1, 6, 2, 12), jnp.float32, ((2, 3),), "12 channels"),
        ((1, 6, 2, 8), jnp.int32, ((2, 3),), "int32"),
        ((1, 9, 2, 8), jnp.float32, ((1, 1),) * 9, "9 levels"),
        ((1, 6, 2, 32), jnp.float32, ((2, 3),), None),
    ],
)
def test_cuda_limits(shape, dtype, shapes, reason):
    refusal = cuda.unsupported(shape, dtype, shapes)
    assert (reason is None and refusal is None) or reason in refusal


def test_pallas_gpu_lowering(monkeypatch):
    """Mosaic GPU takes the forward kernel under vmap and grad; nobody gets it without asking, and no other platform."""
    levels = ((7, 5), (3, 3))
    args = abstract_arguments(levels, 300, jnp.bfloat16, None, batch=2)
    monkeypatch.setattr(cuda, "available", lambda: False)

    def lowered(implementation, platform="cuda"):
        def loss(*arrays):
            out = deform_attn(arrays[0], levels, *arrays[1:], implementation=implementation)
            return (out.astype(jnp.float32) ** 2).sum()

        batched = [jax.ShapeDtypeStruct((2, *a.shape), a.dtype) for a in args]
        function = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))
        return function.trace(*batched).lower(lowering_platforms=(platform,)).as_text()

    assert "@mosaic_gpu_v2" in lowered("pallas_gpu")
    assert "mosaic" not in lowered(None)
    with pytest.raises(Exception, match="cpu|CPU"):
        lowered("pallas_gpu", "cpu")


@pytest.mark.parametrize(
    ("shape", "dtype", "shapes", "reason"),
    [
        ((1, 6, 2, 48), jnp.float32, ((2, 3),), "48 channels"),
        ((1, 6, 2, 32), jnp.int32, ((2, 3),), "int32"),
        ((1, 2**20, 64, 32), jnp.float32, ((1024, 1024),), "2**31"),
        ((1, 6, 2, 128), jnp.float16, ((2, 3),), None),
    ],
)
def test_pallas_gpu_limits(shape, dtype, shapes, reason):
    refusal = pallas_gpu.unsupported(shape, dtype, shapes, (1, 5, shape[2], len(shapes), 4))
    assert (reason is None and refusal is None) or reason in refusal


def test_pallas_gpu_refuses_old_gpus(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="8.0")])
    args = abstract_arguments(((2, 3),), 5, jnp.float32, None)
    with pytest.raises(ValueError, match="compute capability 9.0"):
        deform_attn(args[0], ((2, 3),), *args[1:], implementation="pallas_gpu")


@pytest.fixture(scope="session")
def cuda_emulation(tmp_path_factory):
    """The CUDA kernels' source compiled for the CPU."""
    if not shutil.which("g++"):
        pytest.skip("g++ is missing")
    library = tmp_path_factory.mktemp("cuda") / "emulation.so"
    source = Path(__file__).with_name("cuda_emulation.cpp")
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-I", cuda.SOURCES]
    subprocess.run([*command, "-o", library, source], check=True)
    return ctypes.CDLL(str(library)).emulate


@pytest.mark.parametrize(("channels", "kind"), [(32, "random"), (4, "random"), (16, "edges"), (8, "huge")])
def test_cuda_kernels_emulated_on_cpu(cuda_emulation, channels, kind):
    """Arithmetic, shuffles and bounds of the CUDA source equal XLA's; more samples than lanes and fewer."""
    shapes = ((3, 5), (1, 1), (7, 4))
    batch, queries, heads, points = 2, 3, 3, 3
    rng = np.random.default_rng(0)
    sizes = np.float32([(w, h) for h, w in shapes])[:, None]
    locations = np.float32(rng.uniform(-0.3, 1.3, (batch, queries, heads, 3, points, 2)))
    if kind == "edges":
        locations = np.float32(np.round(2 * locations * sizes) / 2 / sizes)
    if kind == "huge":
        locations = np.float32((locations - 0.5) * 1e30)
    values = rng.standard_normal((batch, 44, heads, channels), np.float32)
    weights = rng.random((batch, queries, heads, 3, points), np.float32)
    grad_out = rng.standard_normal((batch, queries, heads * channels), np.float32)
    got = [np.full(grad_out.shape, np.nan, np.float32), np.zeros_like(values)]
    got += [np.full(locations.shape, np.nan, np.float32), np.full(weights.shape, np.nan, np.float32)]
    arrays = [values, locations, weights, grad_out, *got]
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (np.array(shapes, np.int32), *arrays)]
    cuda_emulation(batch, queries, heads, channels, len(shapes), points, *pointers)
    out, pull = jax.vjp(lambda *args: deform_attn(args[0], shapes, *args[1:]), values, locations, weights)
    for actual, expected in zip(got, (out, *pull(grad_out)), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)
