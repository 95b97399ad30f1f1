"""`--torch_compile`: the same training, compiled."""

import pytest
import torch
from running import assert_identical, final_state
from tiny import make_pipeline
from torch._dynamo.utils import counters

from hwdiffusion import InputError, compilation
from hwdiffusion.compilation import compile_in_place, eager
from hwdiffusion.config import parse
from hwdiffusion.pipelines import unet_conditioning
from hwdiffusion.train_scripts import train_ddpm


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()
    torch._dynamo.config.suppress_errors = False


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


def test_drawing_in_the_midst_of_training_compiles_nothing(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    pipe = make_pipeline("pixel")
    assert compile_in_place(pipe.unet, "full", CPU)
    with eager(compiled=True):
        pipe(labels=[1], num_inference_steps=2)
    assert graphs() == 0
    pipe(labels=[1], num_inference_steps=2)
    assert graphs() > 0


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


def test_without_a_compiler_a_warning_says_so_and_the_model_stays_as_it_is(monkeypatch, caplog):
    monkeypatch.setattr(compilation, "has_cpp_compiler", lambda: False)
    unet = make_pipeline("pixel").unet
    assert not compile_in_place(unet, "full", CPU)
    assert "needs a C++ compiler" in caplog.text and unet._compiled_call_impl is None
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
def test_by_the_real_compiler_a_run_learns_the_same(preset, tmp_path):
    argv = ["--preset", preset, "--mixed_precision", "no", "--max_train_steps", "8"]
    for how in ("no", "regional", "full"):
        torch._dynamo.reset()
        assert train_ddpm.main([*argv, "--torch_compile", how, "--output_dir", str(tmp_path / how)]) == 0
    plain = final_state(tmp_path / "no")["models"]["unet"]["model"]
    for how in ("regional", "full"):
        compiled = final_state(tmp_path / how)["models"]["unet"]["model"]
        for name, weight in plain.items():
            torch.testing.assert_close(compiled[name], weight, rtol=1e-3, atol=1e-4)
