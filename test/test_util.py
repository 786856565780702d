"""The public names of `micro_sam.util`, all of which scripts import."""

import pytest
from segment_anything import SamPredictor

from micro_sam import util

NAMES = [
    "ImageEmbeddings", "SamPredictor", "VIT_T_SUPPORT", "_DEFAULT_MODEL", "_MODEL_TYPES", "_compute_data_signature",
    "_load_checkpoint", "_to_image", "apply_nms", "compute_iou", "export_custom_qlora_model",
    "export_custom_sam_model", "get_block_shape", "get_cache_directory", "get_centers_and_bounding_boxes",
    "get_device", "get_model_names", "get_sam_model", "handle_pbar", "load_image_data", "mask_data_to_segmentation",
    "micro_sam_info", "microsam_cachedir", "models", "precompute_image_embeddings", "segmentation_to_one_hot",
    "set_precomputed",
]


@pytest.mark.parametrize("name", NAMES)
def test_name_is_there(name):
    assert getattr(util, name) is not None
    assert name in dir(util)


def test_values():
    assert util._DEFAULT_MODEL == "vit_b_lm"
    assert set(util._MODEL_TYPES) == {"vit_t", "vit_b", "vit_l", "vit_h"}
    assert util.VIT_T_SUPPORT is True
    assert util.SamPredictor is SamPredictor
    assert "vit_b_lm" in util.models().registry
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = util.no_such_name
    from micro_sam.util import get_model_names, models  # noqa: F401


def test_directories_agree(monkeypatch, tmp_path):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path))
    assert util.get_cache_directory() == util.microsam_cachedir() == tmp_path
