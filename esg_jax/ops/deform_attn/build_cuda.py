"""Builds the CUDA kernels of deformable attention: `python -m esg_jax.ops.deform_attn.build_cuda`."""

from esg_jax.ops.deform_attn import cuda


def main():
    print(f"built {cuda.build()}")


if __name__ == "__main__":
    main()
