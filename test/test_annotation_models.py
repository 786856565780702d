"""The choice of models, the check of requests for embeddings, and the values that panels start with; no screen."""

import inspect
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from micro_sam.annotation import model_choice
from micro_sam.annotation.defaults import panel_defaults
from micro_sam.annotation.model_choice import (
    EmbeddingRequest,
    check_request,
    default_entry,
    families,
    get_entry,
    model_entries,
    resolve,
)
from micro_sam.core.errors import UnknownModelError
from micro_sam.models import registry
from micro_sam.models.specs import MODEL_SETTINGS


@pytest.fixture
def own_model(tiny_checkpoint):
    registry.register_local_model("my_nuclei", tiny_checkpoint, "nuclei of our microscope")
    yield "my_nuclei"
    registry.get_local_models_file().unlink()


def _request(shape=(64, 64), **kwargs):
    layer = SimpleNamespace(data=np.zeros(shape, "uint8"), name="nuclei", rgb=kwargs.pop("rgb", False))
    return replace(EmbeddingRequest(layer, "vit_t_lite"), **kwargs)


def _fields(request, mode="2d", errors=True):
    return [problem.field for problem in check_request(request, mode) if problem.is_error is errors]


def test_these_modules_load_neither_torch_nor_qt():
    code = (
        "import sys, micro_sam.annotation.model_choice, micro_sam.annotation.defaults;"
        "print([m for m in ('torch', 'qtpy', 'napari') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_family_and_size_are_the_inverse_of_the_name_for_every_model(own_model):
    names = registry.list_models()
    assert own_model in names
    for name in names:
        entry = get_entry(name)
        assert entry.family in families()
        assert resolve(entry.family, entry.size) == name
    entries = model_entries()
    assert sorted(entry.name for entry in entries) == sorted(names)
    assert len({(entry.family, entry.size) for entry in entries}) == len(names)
    sizes = [entry.size for entry in entries if entry.family == "Natural Images (SAM)"]
    assert sizes == ["tiny", "base", "large", "huge"]
    assert entries[-1].name == own_model
    assert entries[-1].family == "My models"
    with pytest.raises(UnknownModelError, match="has no model of size 'huge'.*tiny, base, large"):
        resolve("Light Microscopy", "huge")
    with pytest.raises(UnknownModelError, match="Did you mean 'Light Microscopy'"):
        resolve("Light Microscopi", "base")


def test_entries_tell_what_is_on_disk_and_what_a_download_costs(own_model, tiny_checkpoint):
    lite, base, own = get_entry("vit_t_lite"), get_entry("vit_b_lm"), get_entry(own_model)
    assert lite.on_disk
    assert lite.megabytes == pytest.approx(22, abs=5)
    assert lite.family == "Included (offline)"
    assert not base.on_disk
    assert base.megabytes == 375 + 38
    assert own.on_disk
    assert own.megabytes == pytest.approx(tiny_checkpoint.stat().st_size / 1e6)
    assert own.has_decoder
    # Its decoder is only for the command line.
    assert get_entry("vit_b_medical_imaging").modes == ("amg",)
    assert get_entry("vit_b").modes == ("amg",)
    tiny_checkpoint.rename(tiny_checkpoint.with_suffix(".away"))
    try:
        assert get_entry(own_model).megabytes is None
        assert not get_entry(own_model).on_disk
    finally:
        tiny_checkpoint.with_suffix(".away").rename(tiny_checkpoint)


def test_the_default_is_that_of_the_library(monkeypatch, tmp_path):
    from micro_sam.segmentation.workflow import default_model

    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path))
    assert default_entry().name == default_model() == "vit_t_lite"
    folder = registry.get_models_directory()
    folder.mkdir(parents=True)
    for name in registry.find_spec("vit_b_lm").files:
        (folder / name).write_bytes(b"weights")
    assert default_entry().name == default_model() == "vit_b_lm"


def test_a_damaged_file_of_own_models_does_not_hide_the_others(monkeypatch, tmp_path):
    path = tmp_path / "models.toml"
    path.write_text("[[model]]\nname = 'a'\n")
    monkeypatch.setenv("MICROSAM_MODELS", str(path))
    assert [entry.name for entry in model_entries()][-1] == "vit_t_lite"
    assert "has no 'path'" in model_choice.local_models_problem()


def test_a_good_request_has_no_problems_and_gives_the_arguments_of_the_task(tmp_path):
    assert check_request(_request(), "2d") == []
    assert check_request(_request((4, 64, 64)), "3d") == []
    assert check_request(_request((64, 64, 3), rgb=True), "2d") == []
    new = tmp_path / "not" / "yet" / "there.zarr"
    request = _request((900, 900), save_path=new, tile_shape=(384, 256), halo=(64, 32))
    assert check_request(request, "2d") == []
    assert request.options == {
        "model_type": "vit_t_lite", "checkpoint": None, "device": "auto", "mode": "auto", "save_path": str(new),
        "tile_shape": (384, 256), "halo": (64, 32),
    }
    assert _request().options["save_path"] == "auto"


def test_the_arguments_are_those_of_the_task():
    from micro_sam.annotation.tasks import open_model

    assert set(_request().options) <= set(inspect.signature(open_model).parameters)


def test_mistakes_are_found_before_any_work(tmp_path):
    assert _fields(replace(_request(), image=None)) == ["image"]
    assert _fields(_request((4, 64, 64)), "2d") == ["image"]
    assert _fields(_request((64, 64)), "tracking") == ["image"]
    assert _fields(_request(), None) == []
    assert _fields(_request(checkpoint=tmp_path / "none.pt")) == ["checkpoint"]
    assert _fields(_request(checkpoint=tmp_path)) == ["checkpoint"]
    assert _fields(_request(model=None)) == ["model"]
    assert _fields(_request(model="vit_b_ml")) == ["model"]
    assert _fields(_request(model="vit_b", mode="ais")) == ["mode"]
    assert _fields(_request(model="vit_b_medical_imaging", mode="apg")) == ["mode"]
    assert _fields(_request(mode="agm")) == ["mode"]
    assert _fields(_request((900, 900), tile_shape=(256, 256), halo=(256, 0))) == ["halo"]
    file = tmp_path / "file"
    file.write_text("")
    assert _fields(_request(save_path=file)) == ["save_path"]
    assert _fields(_request(save_path=tmp_path)) == ["save_path"]
    (tmp_path / ".zgroup").write_text("{}")
    assert _fields(_request(save_path=tmp_path)) == []


def test_advice_on_tiles():
    assert _fields(_request((2000, 300)), errors=False) == ["tile_shape"]
    assert _fields(_request((2000, 300), tile_shape=(384, 384), halo=(64, 64)), errors=False) == []
    assert _fields(_request((300, 300), tile_shape=(384, 384), halo=(64, 64)), errors=False) == ["tile_shape"]


def test_general_values_are_those_of_the_library_where_it_has_the_option():
    from micro_sam.segmentation.settings import generate_options
    from micro_sam.volume.propagate import propagate_objects_steps

    general, differs = panel_defaults(), {("ais", "min_size")}
    for mode in ("ais", "apg", "amg"):
        known = generate_options(mode, is_tiled=False)
        for name, value in general.automatic(mode).items():
            if (mode, name) not in differs and name != "min_object_size":
                assert value == known[name].default, (mode, name)
    parameters = inspect.signature(propagate_objects_steps).parameters
    assert {name for name in general.nd if name not in parameters} == set()
    assert dict(general.nd) == {"projection": "single_point", "iou_threshold": 0.5, "box_extension": 0.05}


@pytest.mark.parametrize("name", list(MODEL_SETTINGS))
def test_values_of_a_model_replace_the_general_ones(name):
    settings, values, general = MODEL_SETTINGS[name], panel_defaults(name), panel_defaults()
    assert values.ais["center_distance_threshold"] == settings.center_distance_thresh
    assert values.ais["boundary_distance_threshold"] == settings.boundary_distance_thresh
    assert values.ais["distance_smoothing"] == settings.distance_smoothing
    assert values.ais["min_size"] == settings.min_size
    assert values.amg["box_nms_thresh"] == general.amg["box_nms_thresh"]
    for mode in ("ais", "apg", "amg"):
        assert set(values.automatic(mode)) == set(general.automatic(mode))
    assert values.nd["projection"] == (settings.projection_mode or general.nd["projection"])
    assert values.nd["box_extension"] == (settings.box_extension or general.nd["box_extension"])


def test_values_of_other_models_are_the_general_ones():
    assert panel_defaults("vit_b") == panel_defaults("vit_b_histopathology") == panel_defaults("my_nuclei")
    with pytest.raises(TypeError):
        panel_defaults().ais["min_size"] = 3
