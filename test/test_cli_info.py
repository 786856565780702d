"""The command micro_sam.info: the doctor, and downloads."""

import json

import pytest

from micro_sam import util
from micro_sam._version import __version__
from micro_sam.cli.info import main
from micro_sam.models import doctor
from micro_sam.models.specs import MODELS


def test_text_and_json(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    assert main([]) == 0
    text = capsys.readouterr().out
    for expected in (__version__, str(tmp_path / "cache"), "vit_b_lm", "vit_t_lite", "torch"):
        assert expected in text
    assert main(["--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["micro_sam"] == __version__
    assert {m["name"] for m in info["models"]} >= {spec.name for spec in MODELS}
    util.micro_sam_info()
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "asked_for"),
    [
        (["vit_b_lm", "vit_t"], ["vit_b_lm", "vit_t"]),
        (["models", "vit_b_lm"], ["vit_b_lm"]),
        (["models"], [spec.name for spec in MODELS if spec.files]),
    ],
)
def test_download(capsys, monkeypatch, names, asked_for):
    got = []
    monkeypatch.setattr(doctor, "download_models", lambda n, bar: got.extend(n) or {
        name: {"checkpoint": f"/models/{name}", "decoder": None} for name in n
    })
    assert main(["--download", *names]) == 0
    assert got == asked_for
    assert f"{asked_for[0]}: ready (/models/{asked_for[0]})" in capsys.readouterr().out


def test_unknown_name_downloads_nothing(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "download_models", lambda *a: pytest.fail("downloaded"))
    assert main(["--download", "vit_t", "vit_b_ml"]) == 2
    assert "Did you mean 'vit_b_lm'" in capsys.readouterr().err


def test_failed_download_is_reported_and_others_go_on(capsys, monkeypatch):
    from micro_sam.core.errors import DownloadError

    def download(names, bar):
        if names == ["vit_t"]:
            raise DownloadError("no network")
        return {names[0]: {"checkpoint": "/m", "decoder": None}}

    monkeypatch.setattr(doctor, "download_models", download)
    assert main(["--download", "vit_t", "vit_b", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "models": {"vit_b": {"checkpoint": "/m", "decoder": None}}, "errors": {"vit_t": "no network"},
    }
    assert "error: vit_t: no network" in err
