"""Segmentation of images and volumes of any size, block by block, with bounded memory; resumable and distributable.

Blocks with halo are segmented independently, by any engine (this process, or workers of a cluster). What was cut by the
border of a block is joined by the overlap in the halos, and slices of volumes are merged to objects.
"""
