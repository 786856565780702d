"""Public names of earlier versions: conversion to prompts, transforms of images and labels, model preparation."""

from .convert import ConvertToSamInputs, ConvertToSemanticSamInputs
from .model_setup import get_trainable_sam_model
from .raw_transforms import (
    ResizeLabelTrafo,
    ResizeRawTrafo,
    get_raw_transform,
    identity,
    normalize_to_8bit,
    require_8bit,
)

__all__ = [
    "ConvertToSamInputs", "ConvertToSemanticSamInputs", "ResizeLabelTrafo", "ResizeRawTrafo", "get_raw_transform",
    "get_trainable_sam_model", "identity", "normalize_to_8bit", "require_8bit",
]
