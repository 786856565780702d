"""Segmentation of volumes: objects in slices merged to objects in 3D, and objects propagated through slices."""
