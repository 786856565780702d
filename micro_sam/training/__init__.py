"""Finetuning of SAM and the instance decoder on a user's own data.

The names are loaded when they are first used, so that importing this package is quick.
"""

from importlib import import_module

_HOMES = {
    "base_trainer": ("BaseTrainer",),
    "configurations": ("CONFIGURATIONS",),
    "convert": ("ConvertToSamInputs", "ConvertToSemanticSamInputs", "NoObjectsError"),
    "joint_sam_trainer": ("JointSamLogger", "JointSamTrainer"),
    # Not the function preflight: that name is the module's.
    "raw_transforms": ("identity",),
    "sam_trainer": ("SamLogger", "SamTrainer"),
    "semantic_sam_trainer": ("SemanticMapsSamTrainer", "SemanticSamTrainer"),
    "simple_sam_trainer": ("MedSAMTrainer", "SimpleSamTrainer"),
    "splits": ("split_data",),
    "training": (
        "default_sam_dataset", "default_sam_loader", "export_instance_segmentation_model",
        "train_instance_segmentation", "train_sam", "train_sam_for_configuration",
    ),
    "trainable_sam": ("TrainableSAM",),
    "util": ("get_trainable_sam_model",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *_HOME_OF})
