"""`--torch_compile`: the same training, compiled."""

import contextlib
import shutil

import pytest
import torch
from running import assert_identical, final_state
from tiny import make_pipeline
from torch._dynamo.utils import counters

from hwdiffusion import InputError, compilation, trainer
from hwdiffusion.compilation import compile_in_place, eager
from hwdiffusion.config import parse
from hwdiffusion.models import build_unet
from hwdiffusion.pipelines import class_conditional, unet_conditioning
from hwdiffusion.train_scripts import train_ddpm


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    clear()
    with torch._dynamo.config.patch(suppress_errors=False):  # what is set within is undone
        yield
    clear()


def clear():
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("how", ["regional", "full"])
def test_a_run_goes_on_compiled_and_ends_as_one_that_is_not(how, preset, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # what is captured runs as it is, so to the same bit
    argv = ["--preset", preset, "--mixed_precision", "no", "--lr_scheduler", "constant", "--use_ema", "true"]
    plain, parts = ([*argv, "--output_dir", str(tmp_path / name)] for name in ("plain", "parts"))
    assert train_ddpm.main([*plain, "--torch_compile", "no", "--max_train_steps", "8"]) == 0
    assert train_ddpm.main([*parts, "--torch_compile", "no", "--max_train_steps", "4"]) == 0
    assert graphs() == 0
    assert train_ddpm.main([*parts, "--torch_compile", how, "--max_train_steps", "8", "--sample_steps", "6"]) == 0
    assert graphs() > 0
    assert_identical(final_state(tmp_path / "parts")["models"], final_state(tmp_path / "plain")["models"])


def test_drawing_in_the_midst_of_training_compiles_nothing(preset, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    pipe = make_pipeline("pixel")
    assert compile_in_place(pipe.unet, "full", CPU)
    with eager(compiled=True):
        pipe(labels=[1], num_inference_steps=2)
    assert graphs() == 0
    pipe(labels=[1], num_inference_steps=2)
    assert graphs() > 0

    argv = ["--preset", preset, "--torch_compile", "full", "--max_train_steps", "2", "--output_dir"]
    compiled = []
    for name in ("eager", "not"):
        clear()
        if name == "not":
            monkeypatch.setattr(trainer, "eager", lambda compiled: contextlib.nullcontext())
        assert train_ddpm.main([*argv, str(tmp_path / name)]) == 0
        compiled.append(graphs())
    assert 0 < compiled[0] < compiled[1]


def test_every_block_is_compiled_however_many_shapes_they_have(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    channels = {"block_out_channels": [8, 16, 24, 32], "down_block_types": ["DownBlock2D"] * 4}
    section = {**channels, "up_block_types": ["UpBlock2D"] * 4, "layers_per_block": 2, "norm_num_groups": 4}
    unet = build_unet({**section, "mid_block_type": "UNetMidBlock2D"}, (1, 16, 16), 0)
    blocks = [block for block in unet.modules() if isinstance(block, compilation.REPEATED)]
    ran = []
    for block in blocks:
        block.register_forward_hook(lambda block, inputs, output: ran.append((block.in_channels, *output.shape)))
    inputs = {"sample": torch.randn(2, 1, 16, 16), "timestep": torch.tensor(3), **unet_conditioning(unet.config, None)}
    unet(**inputs)
    shapes = len(set(ran))
    assert shapes > torch._dynamo.config.recompile_limit
    unet = build_unet({**section, "mid_block_type": "UNetMidBlock2D"}, (1, 16, 16), 0)
    assert compile_in_place(unet, "regional", CPU)
    unet(**inputs)
    assert graphs() >= shapes


def test_a_backend_that_is_not_there_is_refused_before_anything_is_trained(preset, tmp_path, monkeypatch, capsys):
    argv = ["--preset", preset, "--max_train_steps", "1", "--output_dir"]
    for backend in ("OFI", "INDUCTRO"):  # accelerate's choice, which torch hasn't; nobody's
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        assert train_ddpm.main([*argv, str(tmp_path / backend)]) != 0
        assert f"--dynamo_backend {backend.lower()} is none of torch's backends" in capsys.readouterr().err
        assert not (tmp_path / backend).exists()
        assert train_ddpm.main([*argv, str(tmp_path / backend), "--torch_compile", "no"]) == 0


def test_what_the_launcher_was_told_is_the_default(preset, tmp_path, monkeypatch):
    argv = ["--preset", preset, "--output_dir", str(tmp_path)]

    def chosen(*flags):
        return parse("train_ddpm", [*argv, *flags]).args.torch_compile

    assert chosen() == "no"
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert (chosen(), chosen("--torch_compile", "no")) == ("full", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "True")
    assert chosen() == "regional"
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert (chosen(), chosen("--torch_compile", "full")) == ("no", "full")
    with pytest.raises(InputError, match="--torch_compile must be one of no, regional, full, not all"):
        chosen("--torch_compile", "all")


def test_without_a_compiler_a_warning_says_so_and_the_model_stays_as_it_is(monkeypatch):
    said = []
    monkeypatch.setattr(class_conditional.shutil, "which", lambda name: None)
    monkeypatch.setattr(class_conditional.logger, "warning", said.append)
    unet = make_pipeline("pixel").unet
    assert not compile_in_place(unet, "full", CPU)
    assert "needs a C++ compiler" in said[0] and unet._compiled_call_impl is None
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")  # which needs none
    assert compile_in_place(unet, "full", CPU)


@pytest.mark.parametrize("how", ["regional", "full"])
def test_what_fails_to_compile_runs_as_it_is(how, monkeypatch):
    failures = []

    def failing(graph, inputs):
        failures.append(graph)
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compilation.TorchDynamoPlugin, "to_kwargs", lambda self: {"backend": failing})
    unet = make_pipeline("unconditional").unet
    inputs = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor(3), **unet_conditioning(unet.config, None)}
    plain = unet(**inputs).sample
    assert compile_in_place(unet, how, CPU)
    assert torch.equal(unet(**inputs).sample, plain)
    assert failures


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_by_the_real_compiler_a_run_learns_the_same(preset, tmp_path):
    argv = ["--preset", preset, "--mixed_precision", "no", "--max_train_steps", "8"]
    for how in ("no", "regional", "full"):
        clear()
        assert train_ddpm.main([*argv, "--torch_compile", how, "--output_dir", str(tmp_path / how)]) == 0
        assert (graphs() > 0) == (how != "no") and not counters["inductor_errors"]
    plain = final_state(tmp_path / "no")["models"]["unet"]["model"]
    for how in ("regional", "full"):
        compiled = final_state(tmp_path / how)["models"]["unet"]["model"]
        for name, weight in plain.items():
            torch.testing.assert_close(compiled[name], weight, rtol=1e-3, atol=1e-4)
