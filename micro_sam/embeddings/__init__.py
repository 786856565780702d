"""Image embeddings: computing them for images, stacks and tiles, and the zarr layout that stores them."""
