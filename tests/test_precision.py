"""bf16 where a device multiplies in it."""

import pytest
import torch

from hwdiffusion.precision import multiplies_bf16, precision_on


CPU = torch.device("cpu")


@pytest.mark.parametrize(("has", "pays"), [({"avx512_f": True, "avx512_bf16": False}, False), ({}, False),
                                           ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)])  # fmt: skip
def test_auto_is_bf16_where_the_cpu_has_instructions_for_it(monkeypatch, has, pays):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert multiplies_bf16(CPU) is pays
    assert precision_on(CPU, "auto") == ("bf16" if pays else "no")


def test_what_is_asked_for_is_kept():
    assert [precision_on(CPU, asked) for asked in ("no", "fp16", "bf16")] == ["no", "fp16", "bf16"]
    assert precision_on(torch.device("meta"), "auto") == "no"
