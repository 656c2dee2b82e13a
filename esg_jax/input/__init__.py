"""Images and entity masks from disk to fixed-shape numpy batches: readers, transforms, Grain pipelines."""
