"""Evaluation of predictions and models: metrics, interactive and automatic inference, grid searches, reports.

The names are loaded when they are first used, so that importing this package is quick.
"""

from importlib import import_module

_HOMES = {
    "benchmark_datasets": ("run_benchmark_evaluations",),
    "evaluation": ("run_evaluation", "run_evaluation_for_iterative_prompting"),
    "experiments": ("default_experiment_settings", "full_experiment_settings", "get_experiment_setting_name"),
    "inference": (
        "precompute_all_embeddings", "precompute_all_prompts", "run_amg", "run_apg",
        "run_inference_with_iterative_prompting", "run_inference_with_prompts",
        "run_instance_segmentation_with_decoder",
    ),
    "instance_segmentation": (
        "default_grid_search_values_amg", "default_grid_search_values_apg",
        "default_grid_search_values_instance_segmentation_with_decoder", "evaluate_instance_segmentation_grid_search",
        "run_instance_segmentation_grid_search", "run_instance_segmentation_grid_search_and_inference",
        "run_instance_segmentation_inference", "save_grid_search_best_params",
    ),
    "metrics": ("dice_per_class", "dice_score", "segmentation_scores", "volume_scores"),
    # Not the function model_comparison: that name is the module's.
    "model_comparison": ("generate_data_for_model_comparison", "model_comparison_with_napari"),
    "model_evaluation": ("evaluate_model",),
    "multi_dimensional_segmentation": (
        "default_grid_search_values_multi_dimensional_segmentation", "run_multi_dimensional_segmentation_grid_search",
        "segment_slices_from_ground_truth",
    ),
    "report": ("write_report",),
    "tracking_metrics": ("tracking_scores",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *_HOME_OF})
