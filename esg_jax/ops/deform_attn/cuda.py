"""Multi-scale deformable attention on NVIDIA GPUs: our own CUDA kernels, called through `jax.ffi`.

Built once, on demand, by nvcc; never at import:

    python -m esg_jax.ops.deform_attn.build_cuda

The library goes to `$XDG_CACHE_HOME/esg_jax` (default ~/.cache/esg_jax), named by a hash of sources, CUDA
architectures and jaxlib version, so that a stale one is never loaded. Without it the dispatcher uses XLA.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib
import numpy as np
from jax import numpy as jnp

from esg_jax.ops.deform_attn.xla import Shapes

SOURCES = Path(__file__).with_name("cuda")
# A100, H100/H200; newer ones compile the PTX of the last at load time.
ARCHITECTURES = (80, 90)
_BUILD_COMMAND = "python -m esg_jax.ops.deform_attn.build_cuda"
_MAX_LEVELS = 8


def unsupported(values_shape, values_dtype, shapes: Shapes) -> str | None:
    """Why these arguments do not fit the kernels, or None."""
    lanes = {jnp.dtype(jnp.float32): 4, jnp.dtype(jnp.bfloat16): 8, jnp.dtype(jnp.float16): 8}
    pack = lanes.get(jnp.dtype(values_dtype))
    if pack is None:
        return f"values are {values_dtype}, but the CUDA kernel takes float32, bfloat16 or float16"
    _, rows, heads, channels = values_shape
    if channels not in [pack * group for group in (1, 2, 4, 8, 16)]:
        return f"{channels} channels per head, but a power of two from {pack} to {16 * pack} is needed"
    if len(shapes) > _MAX_LEVELS:
        return f"{len(shapes)} levels, more than {_MAX_LEVELS}"
    if rows * heads * channels >= 2**31:
        return "a value map of 2**31 elements or more"
    return None


def library_path() -> Path:
    """Where the library for these sources, the default architectures and the installed jaxlib is cached."""
    digest = hashlib.sha256(f"{ARCHITECTURES} {jaxlib.__version__}".encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "esg_jax" / f"deform_attn-{digest.hexdigest()[:16]}.so"


def build(path: Path | None = None, architectures=ARCHITECTURES) -> Path:
    """Compiles the kernels with nvcc and returns the library's path.

    Raises:
      FileNotFoundError: nvcc is not installed.
      RuntimeError: nvcc failed; its output is in the message.
    """
    path = path or library_path()
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise FileNotFoundError("nvcc was not found: install the CUDA toolkit (12 or newer) or put nvcc on PATH")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-I", jax.ffi.include_dir()]
    # jaxlib's headers, not ours: missing return after exhaustive switches, ignored inline attributes.
    command += ["-Xcudafe", "--diag_suppress=940", "-Xcudafe", "--diag_suppress=2473"]
    for arch in architectures:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-gencode", f"arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"]
    # Built beside its place and renamed: concurrent builds and readers never see half a file.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        result = subprocess.run([*command, "-o", built, SOURCES / "deform_attn.cu"], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"nvcc failed with exit status {result.returncode}:\n{result.stdout}{result.stderr}")
        os.replace(built, path)
    return path


@functools.cache
def available() -> bool:
    """Whether the built library was found; loads and registers it on the first call."""
    path = library_path()
    if not path.exists():
        if jax.default_backend() == "gpu":
            logging.getLogger(__name__).warning(
                "deformable attention runs in XLA on this GPU: the CUDA kernels are not built (run `%s`)",
                _BUILD_COMMAND,
            )
        return False
    library = ctypes.cdll.LoadLibrary(str(path))
    for target, symbol in (
        ("esg_deform_attn_forward", library.EsgDeformAttnForward),
        ("esg_deform_attn_backward", library.EsgDeformAttnBackward),
    ):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(symbol), platform="CUDA")
    return True


def missing() -> str | None:
    """What the user must do before `implementation="cuda"` works, or None."""
    return None if available() else f"the kernels are not built: run `{_BUILD_COMMAND}`"


def forward(values_bshd, shapes: Shapes, locations_bqhlp2, weights_bqhlp):
    """Output (B, Q, H*D) in the dtype of the values."""
    batch, queries, heads = locations_bqhlp2.shape[:3]
    out = jax.ShapeDtypeStruct((batch, queries, heads * values_bshd.shape[3]), values_bshd.dtype)
    return _call("esg_deform_attn_forward", out, shapes, values_bshd, locations_bqhlp2, weights_bqhlp)


def backward(values_bshd, shapes: Shapes, locations_bqhlp2, weights_bqhlp, grad_out):
    """Gradients (values, locations, weights), all float32, for the gradient (B, Q, H*D) of the output.

    The gradient of the values is summed by atomics: its last bits differ from run to run.
    """
    arrays = values_bshd, locations_bqhlp2, weights_bqhlp
    grads = tuple(jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in arrays)
    return _call("esg_deform_attn_backward", grads, shapes, *arrays, grad_out.astype(values_bshd.dtype))


def _call(target, result, shapes, *arrays):
    call = jax.ffi.ffi_call(target, result, vmap_method="broadcast_all")
    return call(*arrays, shapes=np.array(shapes, np.int64).reshape(-1))
