"""`python eval.py --config=...` is `python -m esg_jax.evaluation --config=...`; --help says more."""

import runpy

if __name__ == "__main__":
    runpy.run_module("esg_jax.evaluation", run_name="__main__", alter_sys=True)
