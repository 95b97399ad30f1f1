"""bf16 where a device multiplies in it."""

import pytest
import torch
import yaml

from hwdiffusion.config import parse
from hwdiffusion.precision import multiplies_bf16


@pytest.fixture(params=[{"avx512_f": True, "avx512_bf16": False}, {}, {"avx512_bf16": True}, {"amx_bf16": True}])
def has(request, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: request.param, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return request.param


def test_auto_is_resolved_before_a_run_and_kept_in_its_configuration(has, tmp_path):
    pays = any(value for name, value in has.items() if "bf16" in name)
    assert multiplies_bf16(torch.device("cpu")) is pays
    config = parse("train_ldm", ["--mixed_precision", "auto", "--output_dir", str(tmp_path)])
    assert config.args.mixed_precision == ("bf16" if pays else "no")
    assert config.first_stage(tmp_path / "first-stage").args.mixed_precision == config.args.mixed_precision
    config.save(tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["train_ldm"]["mixed_precision"] == config.args.mixed_precision
    other = "no" if pays else "bf16"  # continued where the device has another opinion
    assert any(
        "mixed_precision" in change for change in parse("train_ldm", ["--mixed_precision", other]).changes(saved)
    )


@pytest.mark.parametrize("asked", ["no", "fp16", "bf16"])
def test_what_is_asked_for_is_kept(has, asked):
    assert parse("train_ldm", ["--mixed_precision", asked]).args.mixed_precision == asked
