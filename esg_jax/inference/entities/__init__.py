"""Entity masks of images of any size."""
