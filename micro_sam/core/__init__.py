"""Errors, progress, settings, tiling, image input, masks and labels. Loads no torch at import."""
