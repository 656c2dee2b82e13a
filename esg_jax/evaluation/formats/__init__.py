"""Official file formats to metrics: what `esg evaluate` runs. No module here needs JAX."""
