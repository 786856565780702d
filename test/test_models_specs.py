"""The rows of the models, the names built from them, local models, and the report on the installation."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from micro_sam.core.errors import (
    InvalidInputError,
    MissingFileError,
    OutputExistsError,
    OutputWriteError,
    UnknownModelError,
)
from micro_sam.core.settings import get_cache_directory, get_device
from micro_sam.models import doctor, hashing, registry
from micro_sam.models.build_sam import ARCHITECTURES, build_sam, sam_model_registry
from micro_sam.models.specs import MODEL_SETTINGS, MODELS, get_spec, list_models, markdown_table

ENCODERS = [
    "vit_l", "vit_h", "vit_b", "vit_t", "vit_l_lm", "vit_b_lm", "vit_t_lm", "vit_l_em_organelles",
    "vit_b_em_organelles", "vit_t_em_organelles", "vit_b_histopathology", "vit_l_histopathology",
    "vit_h_histopathology", "vit_b_medical_imaging",
]
DOCUMENTED = Path(__file__).parents[1] / "doc" / "models.md"


@pytest.fixture
def local_file(tmp_path, monkeypatch):
    path = tmp_path / "own" / "models.toml"
    path.parent.mkdir()
    monkeypatch.setenv("MICROSAM_MODELS", str(path))
    return path


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)
def test_rows_are_consistent(spec):
    assert spec.architecture in ARCHITECTURES
    assert spec.name.startswith(spec.architecture)
    assert (spec.url is None) != (spec.resource is None)
    assert (spec.decoder_url is not None) == (spec.has_decoder and spec.resource is None)
    for url, digest in spec.files.values():
        assert re.fullmatch(r"https://\S+", url)
        assert re.fullmatch(r"xxh128:[0-9a-f]{32}", digest)
    assert set(spec.modes) <= {"ais", "apg", "amg"}
    assert ("apg" in spec.modes) == (spec.has_decoder and spec.has_prompts)


def test_rows_of_published_models():
    spec = get_spec("vit_l_histopathology")
    assert (spec.family, spec.size, spec.version) == ("Histopathology", "large", "v1")
    assert spec.url == "https://owncloud.gwdg.de/index.php/s/IZgnn1cpBq2PHod/download"
    versions = {s.name: s.version for s in MODELS}
    assert [versions[n] for n in ("vit_b_lm", "vit_t_lm", "vit_t_em_organelles")] == ["v4", "v3", "v2"]
    assert [versions[n] for n in ("vit_b", "vit_t", "vit_t_lite")] == [None] * 3
    assert [s.name for s in MODELS if not s.decoder_in_gui] == ["vit_b_medical_imaging"]
    assert get_spec("vit_t_lite").modes == ("ais", "apg", "amg")
    assert get_spec("vit_b_em_organelles").settings.nd == {
        "projection_mode": "single_point", "iou_threshold": 0.6, "box_extension": 0.025,
    }
    assert MODEL_SETTINGS["vit_h_lm"].ais["distance_smoothing"] == 1.4
    assert get_spec("vit_b").settings is None


def test_model_names_and_exact_list():
    decoders = [f"{name}_decoder" for name in ENCODERS[4:]]
    names = registry.get_model_names()
    assert names[:24] == ENCODERS + decoders
    assert names[24:] == ["vit_t_lite"]
    assert registry.list_models() == list_models() == [*ENCODERS, "vit_t_lite"]
    with pytest.raises(UnknownModelError, match="file of a decoder.*Did you mean 'vit_b_lm'"):
        registry.find_spec("vit_b_lm_decoder")
    with pytest.raises(UnknownModelError, match="Did you mean .*'vit_b_histopathology'"):
        get_spec("vit_b_histo")


def test_models_object_follows_the_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path))
    pooch = registry.models()
    assert list(pooch.registry) == registry.get_model_names()[:24]
    assert Path(pooch.path) == tmp_path / "models"
    assert pooch.registry["vit_b_lm_decoder"] == "xxh128:708b15ac620e235f90bb38612c4929ba"
    assert pooch.get_url("vit_b_lm") == pooch.urls["vit_b_lm"] == get_spec("vit_b_lm").url
    with pytest.raises(UnknownModelError, match="'vit_b_lm'"):
        pooch.fetch("vit_b_ml")


def test_cache_directory_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MICROSAM_CACHEDIR", "~/somewhere")
    assert get_cache_directory() == Path.home() / "somewhere"
    monkeypatch.setenv("MICROSAM_CACHEDIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert get_cache_directory() == tmp_path / "micro_sam"
    else:
        assert get_cache_directory().is_absolute()


def test_devices_by_indexed_name():
    assert get_device("cpu:0") == "cpu:0"
    assert get_device(torch.device("cpu")) == torch.device("cpu")


def test_specs_load_no_torch():
    code = "import sys, micro_sam.models.registry as r; r.list_models(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_documented_table_is_that_of_the_rows():
    match = re.search(r"<!-- table:.*?-->\n(.*?)\n<!-- end of table -->", DOCUMENTED.read_text("utf-8"), re.DOTALL)
    assert match.group(1) == markdown_table()


def test_register_local_model(local_file, tmp_path):
    checkpoint = tmp_path / 'my "best".pt'
    checkpoint.write_bytes(b"x")
    local_file.write_text('# ours\n[[model]]\nname = "first"\npath = "a.pt"\n')
    description = "grün, \\ \U0001f9ec \x7f\n"
    returned = registry.register_local_model("my_nuclei", checkpoint, description, image_size=512)
    assert local_file.read_text("utf-8").startswith("# ours\n")
    assert registry.list_models()[-2:] == ["first", "my_nuclei"]
    assert registry.get_model_names()[-1] == "my_nuclei"
    spec = registry.find_spec("my_nuclei")
    assert spec == returned
    assert (spec.path, spec.purpose, spec.image_size, spec.family) == (str(checkpoint), description, 512, "Local")
    assert registry.find_spec("first").path == str(local_file.parent / "a.pt")

    with pytest.raises(OutputExistsError, match="my_nuclei"):
        registry.register_local_model("my_nuclei", checkpoint)
    registry.register_local_model("first", checkpoint, has_decoder=False, replace=True)
    assert registry.list_models()[-2:] == ["my_nuclei", "first"]
    assert registry.find_spec("first").modes == ("amg",)
    assert registry.find_spec("my_nuclei") == spec
    assert sorted(p.name for p in local_file.parent.iterdir()) == ["models.toml"]


def test_register_local_model_refuses(local_file, tmp_path, monkeypatch):
    checkpoint = tmp_path / "best.pt"
    with pytest.raises(MissingFileError, match="best.pt"):
        registry.register_local_model("mine", checkpoint)
    checkpoint.write_bytes(b"x")
    for name, reason in (("vit_b_lm", "published"), ("vit_b_lm_decoder", "published"), ("a b", "letters")):
        with pytest.raises(InvalidInputError, match=reason):
            registry.register_local_model(name, checkpoint)
    with pytest.raises(InvalidInputError, match="multiple of 16"):
        registry.register_local_model("mine", checkpoint, image_size=100)
    assert not local_file.exists()
    monkeypatch.setenv("MICROSAM_MODELS", str(checkpoint / "models.toml"))
    with pytest.raises((OutputWriteError, InvalidInputError), match="models.toml"):
        registry.register_local_model("mine", checkpoint)


@pytest.mark.parametrize(("text", "line", "problem"), [
    ('[[model]]\nname = "a\n', "line 2", "not valid TOML"),
    ('[[model]]\nname = "a"\npath = "p"\n\n[[model]]\nname = "b"\n', "line 5", "has no 'path'"),
    ('[[model]]\nname = "a"\npath = "p"\nsize = 3\n', "line 1", "unknown field 'size'. Did you mean 'image_size'"),
    ('[[model]]\nname = "a"\npath = 3\n', "line 1", "should be of type str"),
    ('\n[[model]]\nname = "a"\npath = "p"\nhash = "md5:1"\n', "line 2", "32 hexadecimal"),
    ('[[model]]\nname = "a"\npath = "p"\n[[model]]\nname = "a"\npath = "q"\n', "line 4", "second time"),
    ('[models]\nname = "a"\n', "models", "sections"),
])
def test_mistakes_in_the_file_of_local_models(local_file, text, line, problem):
    local_file.write_text(text)
    with pytest.raises(InvalidInputError) as error:
        registry.find_spec("a")
    for part in (str(local_file), line, problem):
        assert part in str(error.value)
    assert registry.find_spec("vit_b_lm").name == "vit_b_lm"  # published models need not wait for the correction
    assert any(problem in entry["problem"] for entry in doctor.collect_info()["problems"])


def test_parameters_and_names_of_the_networks():
    with torch.device("meta"):
        sams = {name: build_sam(name) for name in ("vit_t", "vit_b")}
    for name, total, encoder in (("vit_t", 10_130_348, 6_065_532), ("vit_b", 93_735_728, 89_670_912)):
        buffer = sams[name].prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        assert sum(p.numel() for p in sams[name].parameters()) + buffer.numel() == total
        assert sum(p.numel() for p in sams[name].image_encoder.parameters()) == encoder
    assert len(sams["vit_t"].state_dict()) == 439
    assert set(sam_model_registry) == {"default", "vit_h", "vit_l", "vit_b"}


def test_networks_equal_those_of_segment_anything():
    import segment_anything
    with torch.device("meta"):
        own, reference = build_sam("vit_b"), segment_anything.sam_model_registry["vit_b"]()
    shapes = [{k: v.shape for k, v in sam.state_dict().items()} for sam in (own, reference)]
    assert shapes[0] == shapes[1]
    blocks = [[b.window_size for b in sam.image_encoder.blocks] for sam in (own, reference)]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize(("arguments", "match"), [
    (("vit_x", {}), "Did you mean"), (("vit_t", {"image_size": 100}), "multiple of 16"),
    (("vit_t", {"num_multimask_outputs": 0}), "at least 1"),
])
def test_build_sam_refuses(arguments, match):
    with pytest.raises(InvalidInputError, match=match):
        build_sam(arguments[0], **arguments[1])


def test_any_image_size():
    sam = build_sam("vit_t", image_size=96, num_multimask_outputs=2)
    with torch.no_grad():
        output = sam([{
            "image": torch.rand(3, 96, 60) * 255, "original_size": (192, 120),
            "point_coords": torch.tensor([[[30.0, 40.0]]]), "point_labels": torch.tensor([[1]]),
        }], multimask_output=True)[0]
    assert output["masks"].shape == (1, 2, 192, 120)


def test_info_reports_models_and_cache(tmp_path, monkeypatch, local_file):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models"
    folder.mkdir(parents=True)
    (folder / "vit_b_lm").write_bytes(b"not these weights")
    (folder / "vit_t").write_bytes(b"tiny")
    spec = get_spec("vit_t")
    monkeypatch.setattr(doctor, "file_hash", lambda path: spec.hash if path.name == "vit_t" else "xxh128:0")
    local_file.write_text('[[model]]\nname = "mine"\npath = "gone.pt"\n')
    info = doctor.collect_info()
    json.dumps(info)
    states = {row["name"]: row["state"] for row in info["models"]}
    assert (states["vit_b_lm"], states["vit_t"], states["vit_l"], states["mine"]) == (
        "damaged", "ready", "absent", "absent",
    )
    assert [row["name"] for row in info["models"]] == registry.list_models()
    assert info["cache"]["size_bytes"] == info["cache"]["parts_bytes"]["models"] == 21
    assert {entry["problem"] for entry in info["problems"]} >= {
        "The model vit_b_lm is damaged.", "The model mine is absent.",
    }
    text = doctor.format_info(info)
    assert "micro_sam.info --download vit_l\n" in text
    assert str(tmp_path / "cache") in text
    assert "device cpu" in text
    unchecked = {row["name"]: row["files"] for row in doctor.collect_info(verify=False)["models"]}
    assert unchecked["vit_t"][0]["hash_ok"] is None


def test_download_models_checks_names_first(monkeypatch):
    asked = []

    def fake_download(name, progress=None):
        asked.append(name)
        return f"/{name}", "xxh128:0", f"/{name}_decoder"

    monkeypatch.setattr(doctor, "download_sam_model", fake_download)
    with pytest.raises(UnknownModelError, match="'vit_b_lm'"):
        doctor.download_models(["vit_t_lm", "vit_b_ml"])
    assert asked == []
    assert doctor.download_models(["vit_b_lm"]) == {
        "vit_b_lm": {"checkpoint": "/vit_b_lm", "decoder": "/vit_b_lm_decoder"}
    }
    assert list(doctor.download_models()) == ENCODERS
    assert doctor.download_models(["vit_t_lite"])["vit_t_lite"]["checkpoint"].endswith("vit_t_lite.pt")


def test_hash_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "_SETTLE_SECONDS", -1)
    reads = []
    compute = hashing.compute_hash
    monkeypatch.setattr(hashing, "compute_hash", lambda path: reads.append(path) or compute(path))
    path = tmp_path / "weights"
    path.write_bytes(b"")
    assert hashing.file_hash(path) == "xxh128:99aa06d3014798d86001c324468d497f"  # of the empty input
    assert hashing.file_hash(path) == "xxh128:99aa06d3014798d86001c324468d497f"
    assert len(reads) == 1
    path.write_bytes(b"more")
    assert hashing.remembered_hash(path) is None
    assert hashing.file_hash(path) != "xxh128:99aa06d3014798d86001c324468d497f"
    (tmp_path / "cache" / "file_hashes.json").write_text("{ damaged")
    assert hashing.file_hash(path) == compute(path)
