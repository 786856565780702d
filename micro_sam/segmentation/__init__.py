"""The automatic segmenters: AMG, AIS and APG, plain and tiled."""
