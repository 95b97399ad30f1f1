"""Muon and AdamW as one optimizer: what each trains, by their equations, and that its state is whole."""

import copy
import json

import pytest
import torch
from tiny import make_pipeline
from torch import nn

from hwdiffusion.optimizers import MuonWithAdamW, build_optimizer, inner_matrices
from hwdiffusion.train_scripts import train_ddpm


SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 3), nn.Flatten())


def train(model, optimizer, steps: range):
    for step in steps:
        inputs = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_a_first_step_of_a_kernel_is_orthogonal_and_as_long_as_one_of_adamw():
    model = small()
    optimizer = build_optimizer(model, muon_learning_rate=0.01, **{**SETTINGS, "weight_decay": 0.0})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, optimizer, range(1))
    kernel = (before["2.weight"] - model[2].weight).detach().flatten(1)  # (4, 54)
    values = torch.linalg.svdvals(kernel) / (0.01 * 0.2 * 54**0.5)
    assert values.min() > 0.5 and values.max() < 1.5  # as near as five iterations of Newton and Schulz come
    # a root mean square of 0.2 learning rates for a square matrix, less by what rows are missing
    assert kernel.square().mean().sqrt() == pytest.approx(0.01 * 0.2, rel=0.3)
    bias = (before["2.bias"] - model[2].bias).detach()
    torch.testing.assert_close(bias.abs(), torch.full_like(bias, 1e-3), rtol=1e-3, atol=0)  # AdamW's first step


def test_the_rest_learns_as_by_adamw_alone():
    both, alone = small(), small()
    for model in (both, alone):
        for layer in (model[0], model[2]):
            layer.weight.requires_grad_(False)
    idle = nn.Parameter(torch.ones(2, 2))
    train(both, MuonWithAdamW([idle], [p for p in both.parameters() if p.requires_grad], 0.01, **SETTINGS), range(4))
    train(alone, build_optimizer(alone, **SETTINGS), range(4))
    assert torch.equal(state_of(both), state_of(alone)) and torch.equal(idle, torch.ones(2, 2))


def test_it_goes_on_from_its_state_and_settings():
    whole, parts = small(), small()
    train(whole, build_optimizer(whole, muon_learning_rate=0.01, **SETTINGS), range(6))
    optimizer = build_optimizer(parts, muon_learning_rate=0.01, **SETTINGS)
    train(parts, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    train(parts := copy.deepcopy(parts), again := build_optimizer(parts, muon_learning_rate=0.5, **SETTINGS), range(0))
    again.load_state_dict(saved)
    train(parts, again, range(3, 6))
    assert torch.equal(state_of(whole), state_of(parts))


def test_a_state_without_steps_is_one():
    """What a run in small, by which the time of a step is measured, leaves behind."""
    once, twice = small(), small()
    start = copy.deepcopy(twice.state_dict())
    optimizer = build_optimizer(twice, muon_learning_rate=0.01, **SETTINGS)
    fresh = copy.deepcopy(optimizer.state_dict())
    train(twice, optimizer, range(7, 9))
    twice.load_state_dict(start)
    optimizer.load_state_dict(fresh)
    train(twice, optimizer, range(3))
    train(once, build_optimizer(once, muon_learning_rate=0.01, **SETTINGS), range(3))
    assert torch.equal(state_of(once), state_of(twice))


def test_a_unets_matrices_are_what_lies_within():
    unet = make_pipeline("tokens").unet
    names = {id(parameter): name for name, parameter in unet.named_parameters()}
    inner = [names[id(parameter)] for parameter in inner_matrices(unet)]
    assert all(name.endswith(".weight") and not name.startswith("conv_") for name in inner)
    assert {"mid_block.resnets.0.conv1.weight", "time_embedding.linear_1.weight"} <= set(inner)
    left = {name for name, parameter in unet.named_parameters() if parameter.ndim > 1} - set(inner)
    assert left >= {"conv_in.weight", "conv_out.weight"}
    assert not [name for name in left if ".resnets." in name or ".attentions." in name]


def test_a_run_by_muon_continues_to_the_bit_and_by_no_other(tmp_path, preset, capsys):
    argv = ["--preset", preset, "--max_train_steps", "6", "--checkpointing_steps", "3", "--logging_steps", "1"]
    argv += ["--checkpoints_total_limit", "9"]
    muon = ["--muon_learning_rate", "6e-3"]
    for name in ("whole", "parts"):
        assert train_ddpm.main([*argv, *muon, "--output_dir", str(tmp_path / name)]) == 0
    weights = [tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors" for name in ("whole", "parts")]
    folder = tmp_path / "parts" / "checkpoint-6"
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    assert train_ddpm.main([*argv, *muon, "--output_dir", str(tmp_path / "parts")]) == 0
    assert weights[0].read_bytes() == weights[1].read_bytes()
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "whole" / "metrics.jsonl").open()]
    assert max(rates) <= 1e-3 + 1e-9  # AdamW's, which the run's flag says
    capsys.readouterr()
    adamw = [*argv, "--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", "latest"]
    assert train_ddpm.main([*adamw, "--max_train_steps", "9"]) == 2
    said = capsys.readouterr().err
    assert "it was trained by Muon (--muon_learning_rate), and this run is by AdamW" in said
