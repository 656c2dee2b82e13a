"""`python train.py --config=...` is `python -m esg_jax.train --config=...`; --help says more."""

import runpy

if __name__ == "__main__":
    runpy.run_module("esg_jax.train", run_name="__main__", alter_sys=True)
