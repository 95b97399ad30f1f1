"""The training scripts through their command lines: what they leave, how processes share a batch."""

import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import PROJECTION, TINY_UNET, TOKENS
from diffusers import VQModel
from PIL import Image
from running import (
    LAUNCH_TWO,
    MAIN,
    ROOT,
    TINY_PRESET,
    assert_identical,
    command,
    curves,
    final_state,
    signal_once,
    write_preset,
)
from test_pipelines import run_without_the_package
from tiny import AUTOENCODERS, make_autoencoder, seeds
from transformers import ResNetConfig, ResNetModel

from hwdiffusion import cli, data, labels
from hwdiffusion.checkpoints import find_checkpoints, flaw_of
from hwdiffusion.config import parse
from hwdiffusion.data import load_data, to_model_range
from hwdiffusion.figures import read_metrics
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.train_scripts import train_classifier, train_ddpm, train_ldm, train_vqgan


# -- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_latent_diffusion_trains_both_stages_and_leaves_a_pipeline(preset, tmp_path):
    run = tmp_path / "run"
    assert train_ldm.main(["--preset", preset, "--output_dir", str(run), "--sample_steps", "7"]) == 0
    pipe = ClassConditionalPipeline.from_pretrained(run)
    assert pipe.id2label == {digit: str(digit) for digit in range(10)} and pipe.config.has_null_label
    assert pipe(labels=["3"]).images[0].size == (16, 16)

    # the same pictures by stock diffusers, where this package can't be imported
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    ours = pipe(labels=["3", 8], generator=generators, output_type="pt").images
    theirs = run_without_the_package(run, tmp_path / "again", tmp_path / "cache", labels=("3", 8))
    assert torch.equal(ours, theirs["images"])

    # the latents that the UNet learned have unit variance and no mean
    first_stage = VQModel.from_pretrained(run / "first-stage")
    torch.testing.assert_close(first_stage.config.scaling_factor, pipe.vqvae.config.scaling_factor, rtol=1e-4, atol=0)
    # what is saved are the averaged weights
    state = final_state(run)["models"]["unet"]
    saved = list(pipe.unet.parameters())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(saved, state["ema"]["shadow_params"]))

    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, 41))
    assert {path.name for path in (run / "samples").iterdir()} == {"step-7.png", "step-40.png"}
    assert Image.open(run / "samples.png").size[1] > 10 * 16  # ten rows
    assert Image.open(run / "loss.png").size[0] > 100
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-36", "checkpoint-40"}
    assert ClassConditionalPipeline.from_pretrained(run / "checkpoint-36").num_classes == 10
    assert yaml.safe_load((run / "config.yaml").read_text())["script"] == "train_ldm"


def test_a_given_autoencoder_is_taken_and_kept(preset, tmp_path):
    assert train_vqgan.main(["--preset", preset, "--output_dir", str(tmp_path / "vq"), "--max_train_steps", "8"]) == 0
    run = tmp_path / "run"
    argv = ["--preset", preset, "--vqvae", str(tmp_path / "vq"), "--output_dir", str(run), "--max_train_steps", "4"]
    assert train_ldm.main(argv) == 0
    assert not (run / "first-stage").exists()
    ours, theirs = VQModel.from_pretrained(run, subfolder="vqvae"), VQModel.from_pretrained(tmp_path / "vq")
    assert_identical(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize(
    "name, scaling", [*((name, "measured") for name in AUTOENCODERS), ("AutoencoderKL", "config")]
)
def test_every_kind_of_autoencoder_trains_a_unet_and_draws_without_the_package(name, scaling, preset, tmp_path):
    make_autoencoder(name).save_pretrained(tmp_path / "vae")
    run = tmp_path / "run"
    argv = ["--preset", preset, "--vae", str(tmp_path / "vae"), "--output_dir", str(run), "--max_train_steps", "6"]
    assert train_ldm.main([*argv, "--latent_scaling", scaling]) == 0
    pipe = ClassConditionalPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.vqvae).__name__ == name
    images = pipe(labels=[3, 8], generator=seeds(0, 1), output_type="pt").images
    assert images.shape == (2, 1, 16, 16)
    if scaling == "config":
        assert pipe.vqvae.config.scaling_factor == make_autoencoder(name).config.scaling_factor
        return
    # latents of the training pictures, as the pipeline sees them
    pictures = load_data(parse("train_ldm", argv).args).train.images
    latents = pipe.encode_images(to_model_range(pictures))
    assert latents.mean().abs() < 0.02 and latents.std().item() == pytest.approx(1, abs=0.02)
    if name == "AutoencoderKL":  # a VQModel's is tried above; to start another process takes its time
        theirs = run_without_the_package(run, tmp_path / "again", tmp_path / "cache", labels=("3", 8))
        assert torch.equal(theirs["images"], images)


def test_a_first_stage_reports_what_it_gives_back_and_warns_of_unused_codes(preset, tmp_path, capsys):
    argv = ["--preset", preset, "--max_train_steps", "8", "--vqvae.num_vq_embeddings", "64"]
    judge = [*argv[:4], "--output_dir", str(tmp_path / "judge"), "--pretext", "rotation"]
    assert train_classifier.main(judge) == 0
    run, flags = tmp_path / "run", ["--evaluation_steps", "4", "--evaluation_classifier", str(tmp_path / "judge")]
    assert train_vqgan.main([*argv, *flags, "--output_dir", str(run)]) == 0
    assert "warning" not in capsys.readouterr().out
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_psnr" in line] == [4, 8]
    assert {"eval_ssim", "eval_codebook_used", "eval_codebook_perplexity", "eval_frechet_distance"} <= lines[-1].keys()
    assert {"mse_loss", "l1_loss", "codebook_loss", "generator_loss", "discriminator_loss"} <= lines[-1].keys()
    assert sorted(path.stem for path in (run / "samples").iterdir()) == ["step-4", "step-8"]
    assert not (run / "best").exists()

    # codes so far away that none is chosen, which a restart would cure
    collapsing = ["--codebook_restart_steps", "0", "--commitment_beta", "0", "--learning_rate", "0.3"]
    assert train_vqgan.main([*argv, *collapsing, "--output_dir", str(tmp_path / "collapsed")]) == 0
    said = capsys.readouterr().out
    assert "warning: the validation pictures use" in said and "(--codebook_restart_steps 100)" in said
    figures = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("run", "collapsed")]
    used = [line["eval_codebook_used"] / line["eval_codebook_possible"] for line in figures]
    assert used[0] > 0.5 > used[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--codebook_init", "kmeans", "--codebook_update", "ema", "--rotation_trick", "true"],
        ["--entropy_weight", "0.1", "--discriminator_warmup", "0.5", "--adaptive_weight_max", "2"],
    ],
    ids=" ".join,
)
def test_every_way_to_train_a_codebook_lowers_the_error(flags, preset, tmp_path):
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run), "--max_train_steps", "80", "--learning_rate", "3e-3"]
    assert train_vqgan.main([*argv, *flags]) == 0
    lines = read_metrics(run / "metrics.jsonl")
    errors = [line["mse_loss"] for line in lines]
    assert np.mean(errors[-15:]) < 0.8 * np.mean(errors[:15])
    if "--entropy_weight" in flags:
        assert all(np.isfinite(line["entropy_loss"]) for line in lines)
        weights = [line["adaptive_weight"] for line in lines if "adaptive_weight" in line]
        assert len(weights) == 64 and weights[0] <= 0.5 * 2 / 41 and max(weights) <= 0.5 * 2  # weight, cap, warm-up


def test_gradient_checkpointing_trains_the_same_model(preset, tmp_path, monkeypatch):
    recomputed, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: recomputed.append(1) or checkpoint(*a, **k)
    )
    for name, flags in (("plain", []), ("checkpointed", ["--gradient_checkpointing", "true"])):
        argv = ["--preset", preset, "--output_dir", str(tmp_path / name), "--max_train_steps", "4"]
        assert train_ddpm.main([*argv, *flags]) == 0
        assert bool(recomputed) == bool(flags)
    assert_identical(final_state(tmp_path / "checkpointed")["models"], final_state(tmp_path / "plain")["models"])


def dtypes_in(state) -> set:
    if isinstance(state, torch.Tensor):
        return {state.dtype}
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return set().union(*map(dtypes_in, inner))


def test_adam_of_8_bits_trains_and_continues_where_it_was(preset, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    argv = ["--preset", preset, "--use_8bit_adam", "true", "--max_train_steps", "12", "--learning_rate", "3e-3"]
    wide = ["--vqvae.num_vq_embeddings", "4096", "--codebook_restart_steps", "3"]  # few parameters stay in 32 bits
    for name in ("whole", "parts"):
        assert train_vqgan.main([*argv, *wide, "--output_dir", str(tmp_path / name)]) == 0
    assert torch.uint8 in dtypes_in(final_state(tmp_path / "whole")["models"]["vqvae"]["optimizer"])
    errors = curves(tmp_path / "whole" / "metrics.jsonl")
    assert errors[-3:].mean() < errors[:3].mean()
    shutil.rmtree(tmp_path / "parts" / "checkpoint-12")
    assert train_vqgan.main([*argv, *wide, "--output_dir", str(tmp_path / "parts")]) == 0  # from step 8
    np.testing.assert_allclose(curves(tmp_path / "parts" / "metrics.jsonl"), errors, rtol=1e-5)
    argv[argv.index("true")] = "false"
    again = [*argv, *wide, "--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", "latest"]
    assert train_vqgan.main(again) == 2
    assert "trained with --use_8bit_adam true" in capsys.readouterr().err


def test_a_run_with_a_codebook_of_averages_continues_to_the_bit(preset, tmp_path):
    argv = ["--preset", preset, "--max_train_steps", "12", "--codebook_update", "ema", "--rotation_trick", "true"]
    argv += ["--codebook_restart_steps", "5", "--entropy_weight", "0.1"]
    for name in ("whole", "parts"):
        assert train_vqgan.main([*argv, "--output_dir", str(tmp_path / name)]) == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoint-12")
    assert train_vqgan.main([*argv, "--output_dir", str(tmp_path / "parts")]) == 0  # from step 8
    assert_identical(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


def test_a_step_that_is_not_finite_leaves_a_codebook_of_averages_as_it_was(preset, tmp_path, monkeypatch):
    flips = iter(range(10**6))

    def broken(images, chosen):
        return images * (float("nan") if next(flips) == 3 else 1.0)

    monkeypatch.setattr(data, "flip", broken)
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--max_train_steps", "8"]
    argv += ["--skip_nonfinite_steps", "true", "--codebook_update", "ema", "--discriminator_weight", "0"]
    assert train_vqgan.main(argv) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "skipped" in line] == [4]
    assert all("mse_loss" in line for line in lines if line["step"] != 4)
    assert final_state(tmp_path / "run")["states"]["codebook"]["ema_sums"].isfinite().all()


def test_rare_classes_are_shown_more_often(tmp_path, monkeypatch):
    for index in range(48):
        path = tmp_path / "pictures" / ("cat" if index % 8 else "dog") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (16, 16), dtype=np.uint8)).save(path)
    preset = write_preset(tmp_path / "p.yaml", {**TINY_PRESET, "label_dropout": 0.0, "guidance_scale": 1.0})
    seen = []
    monkeypatch.setattr(labels, "drop_labels", lambda tokens, *_: seen.append(tokens[:, 0, 1].mean()) or tokens)
    for balance in ("0", "1"):
        argv = ["--preset", preset, "--train_data_dir", str(tmp_path / "pictures"), "--class_balance", balance]
        assert train_ddpm.main([*argv, "--output_dir", str(tmp_path / balance), "--max_train_steps", "24"]) == 0
    plain, balanced = (np.mean(seen[start : start + 24]) for start in (0, 24))
    assert plain < 0.2 and balanced == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("conditioning", ["projection", "tokens", "unconditional"])
def test_a_pixel_diffusion_trains_with_every_conditioning(conditioning, tmp_path):
    unet = {"projection": {**TINY_UNET, **PROJECTION}, "tokens": {**TINY_UNET, **TOKENS}, "unconditional": TINY_UNET}
    preset = write_preset(tmp_path / "p.yaml", {**TINY_PRESET, "resolution": 8, "unet": unet[conditioning]})
    run = tmp_path / "run"
    assert train_ddpm.main(["--preset", preset, "--output_dir", str(run), "--max_train_steps", "4"]) == 0
    pipe = ClassConditionalPipeline.from_pretrained(run)
    assert pipe.num_classes == (0 if conditioning == "unconditional" else 10)
    assert pipe(labels=None if conditioning == "unconditional" else [3]).images[0].size == (8, 8)


def test_sets_of_labels_train_and_their_order_does_not_matter(tmp_path):
    unet = {**TINY_UNET, **TOKENS}
    preset = write_preset(tmp_path / "p.yaml", {**TINY_PRESET, "dataset_name": "shapes", "image_mode": "RGB",
                                                "max_train_steps": 6, "unet": unet})  # fmt: skip
    run = tmp_path / "run"
    assert train_ddpm.main(["--preset", preset, "--output_dir", str(run)]) == 0
    pipe = ClassConditionalPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.num_classes == 24 and pipe.config.max_labels == 3
    drawn = [
        pipe(labels=[order], generator=seeds(0), guidance_scale=2.0, output_type="pt").images
        for order in (["red sphere", "cyan cube"], ["cyan cube", "red sphere"], ["cyan cube", "gray cube"])
    ]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-4)
    assert not torch.allclose(drawn[0], drawn[2], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="unknown label 'red spher'; the nearest known one is 'red sphere'"):
        pipe(labels=[["red spher"]])
    with pytest.raises(ValueError, match="holds 4 labels, but this model takes at most 3"):
        pipe(labels=[["red cube", "blue cube", "gray cube", "cyan cube"]])


@pytest.mark.parametrize("script", ["train_ddpm", "train_ldm"])
def test_a_flow_trains_and_leaves_a_pipeline_that_draws(script, tmp_path):
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    preset = write_preset(tmp_path / "flow.yaml", {**TINY_PRESET, "noise_scheduler": flow})
    run = tmp_path / "run"
    flags = ["--timestep_sampling", "logit_normal", "--snr_gamma", "5"] if script == "train_ddpm" else []
    assert MAIN[script](["--preset", preset, "--output_dir", str(run), *flags]) == 0
    pipe = ClassConditionalPipeline.from_pretrained(run)
    assert pipe.config.prediction_type == "flow_prediction"
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipe(labels=["3"], output_type="pt").images.isfinite().all()
    loss = curves(run / "metrics.jsonl")
    assert loss[-10:].mean() < loss[:10].mean()


def test_the_loss_falls(preset, tmp_path):
    for script, key in (("train_vqgan", "mse_loss"), ("train_ddpm", "loss")):
        argv = ["--preset", preset, "--output_dir", str(tmp_path / script), "--max_train_steps", "80"]
        assert MAIN[script]([*argv, "--learning_rate", "3e-3"]) == 0
        losses = [line[key] for line in read_metrics(tmp_path / script / "metrics.jsonl")]
        assert np.mean(losses[-15:]) < 0.8 * np.mean(losses[:15])


def test_grids_are_drawn_after_the_epochs_and_steps_asked_for(preset, tmp_path):
    run = tmp_path / "run"  # 100 training pictures, 25 a step
    argv = ["--preset", preset, "--output_dir", str(run), "--train_batch_size", "25", "--num_train_epochs", "2"]
    settings = ["--sample_epochs", "1", "2", "--sample_steps", "3", "--lr_scheduler", "cosine", "--snr_gamma", "5"]
    assert train_ddpm.main([*argv, *settings]) == 0
    assert sorted(path.stem for path in (run / "samples").iterdir()) == ["step-3", "step-4", "step-8"]
    assert Image.open(run / "samples.png").tobytes() == Image.open(run / "samples" / "step-8.png").tobytes()


def test_a_perceptual_loss_is_trained_on_with_and_without_a_model(preset, tmp_path, capsys):
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    argv = ["--preset", preset, "--max_train_steps", "2", "--perceptual_weight", "1"]
    first = {}
    for name, flags in {"pyramid": [], "model": ["--perceptual_model", str(tmp_path / "resnet")]}.items():
        assert train_vqgan.main([*argv, "--output_dir", str(tmp_path / name), *flags]) == 0
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        assert all(line["perceptual_loss"] > 0 for line in lines)
        first[name] = lines[0]["perceptual_loss"]
    assert first["pyramid"] != first["model"]
    missing = ["--perceptual_model", str(tmp_path / "none"), "--output_dir", str(tmp_path / "c")]
    assert train_vqgan.main([*argv, *missing]) == 2
    assert "can't be loaded" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_a_tracker_gets_the_losses_and_the_pictures(preset, tmp_path):
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run), "--max_train_steps", "4", "--report_to", "tensorboard"]
    assert train_ddpm.main(argv) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in run.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    logged = [event.value for event in events.Scalars("loss")]
    written = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    np.testing.assert_allclose(logged, written, rtol=1e-6)
    assert events.Tags()["images"] == ["samples"]


def test_a_dry_run_reports_and_writes_nothing(preset, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_ldm.main(["--preset", preset, "--output_dir", str(run), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert not run.exists()
    assert "s a step" in said and "parameters" in said and "learning_rate" in said


def test_pictures_read_lazily_by_workers_train_as_those_in_memory(tmp_path):
    for index in range(30):
        path = tmp_path / "pictures" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (16, 16), dtype=np.uint8)).save(path)
    preset = write_preset(tmp_path / "p.yaml", {**TINY_PRESET, "max_train_steps": 4})
    for name, gigabytes in (("memory", "1"), ("lazy", "0")):
        argv = ["--preset", preset, "--train_data_dir", str(tmp_path / "pictures"), "--image_memory_gb", gigabytes]
        assert train_ddpm.main([*argv, "--output_dir", str(tmp_path / name)]) == 0
    assert_identical(final_state(tmp_path / "lazy"), final_state(tmp_path / "memory"))
    assert not multiprocessing.active_children()  # for which the process would wait at its end


def test_bfloat16_trains_in_both_stages(preset, tmp_path):
    """In a process of its own: a process has one precision."""
    steps = ["--max_train_steps", "8", "--train_vqgan.max_train_steps", "8"]
    argv = command("train_ldm", "--preset", preset, "--output_dir", tmp_path / "run", *steps)
    done = subprocess.run([*argv, "--mixed_precision", "bf16"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(np.isfinite(line["loss"]) for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path / "run")
    assert pipe.unet.dtype == torch.float32 and len(pipe(labels=[1]).images) == 1


def odd_picture(index: int) -> bytes:
    """A picture of a mode that isn't simply RGB: palette, with alpha, CMYK, 16-bit gray, turned by its EXIF."""
    values = np.random.default_rng(index).integers(0, 255, (20, 30, 4), dtype=np.uint8)
    kind, options = index % 5, {}
    if kind == 0:
        image, suffix = Image.fromarray(values[..., :3]).quantize(16), "png"
    elif kind == 1:
        image, suffix = Image.fromarray(values, "RGBA"), "png"
    elif kind == 2:
        image, suffix = Image.fromarray(values, "CMYK"), "jpeg"
    elif kind == 3:
        image, suffix = Image.fromarray(values[..., 0].astype(np.uint16) * 257), "png"
    else:
        image, suffix = Image.fromarray(values[..., :3]), "jpeg"
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif}
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def test_odd_pictures_pass_every_stage_at_a_resolution_that_is_no_square(tmp_path, capsys):
    """Classifier, both stages with an evaluation in between, samples, evaluation; one picture in a hundred is bad."""
    for index in range(100):
        path = tmp_path / "pictures" / "ab"[index // 5 % 2] / f"{index}.{'jpg' if index % 5 in (2, 4) else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(odd_picture(index)[: 30 if index == 50 else None])
    preset = write_preset(tmp_path / "p.yaml", {**TINY_PRESET, "max_train_samples": None, "max_train_steps": 4})
    argv = ["--preset", preset, "--train_data_dir", str(tmp_path / "pictures"), "--resolution", "16", "24"]
    argv += ["--image_mode", "RGB", "--skip_bad_images"]
    judge, run = str(tmp_path / "judge"), str(tmp_path / "run")
    small = {"validation_fraction": "0.4"}
    argv += [word for key, value in small.items() for word in (f"--{key}", value)]
    assert train_classifier.main([*argv, "--output_dir", judge]) == 0
    assert "skipped 1 unreadable picture" in capsys.readouterr().out
    judging = ["--evaluation_steps", "2", "--evaluation_classifier", judge, "--evaluation_samples", "30"]
    assert train_ldm.main([*argv, "--output_dir", run, *judging]) == 0
    assert ClassConditionalPipeline.from_pretrained(run)(labels=["b"]).images[0].size == (24, 16)
    assert "eval_frechet_distance" in read_metrics(tmp_path / "run" / "metrics.jsonl")[1]
    evaluation = ["evaluate", run, "--num_samples", "30", "--classifier", judge, "--skip_bad_images"]
    assert cli.main(evaluation) == 0
    assert (tmp_path / "run" / "evaluation.json").is_file()


# -- a batch shared by micro-batches and processes --------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train_vqgan", "train_ddpm"])
def test_accumulated_micro_batches_train_as_one_batch(script, preset, tmp_path):
    # without a discriminator: its adaptive weight is a ratio of gradients of a micro-batch, not a mean over them
    options = ["--preset", preset, "--max_train_steps", "10"]
    options += ["--discriminator_weight", "0"] if script == "train_vqgan" else []
    for name, batch in (("one", ["--train_batch_size", "16"]), ("two", ["--train_batch_size", "8"])):
        argv = [*options, *batch, "--output_dir", str(tmp_path / name)]
        assert MAIN[script]([*argv, "--gradient_accumulation_steps", "1" if name == "one" else "2"]) == 0
    one, two = (curves(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=2e-3)


def test_two_processes_train_as_one_with_the_same_global_batch(preset, tmp_path):
    """Both stages with two real processes."""
    options = ["--preset", preset, "--train_vqgan.max_train_steps", "12", "--max_train_steps", "12"]
    two = [str(ROOT / "train_scripts" / "train_ldm.py"), *options, "--output_dir", str(tmp_path / "two")]
    two += ["--train_batch_size", "8", "--train_vqgan.train_batch_size", "8"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*LAUNCH_TWO, *two], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train_vqgan: 12 steps of 16 pictures on 2 processes" in done.stdout
    assert "train_ldm: 12 steps of 16 pictures on 2 processes" in done.stdout

    one = ["--train_batch_size", "16", "--train_vqgan.train_batch_size", "16", "--output_dir", str(tmp_path / "one")]
    assert train_ldm.main([*options, *one]) == 0
    for stage, tolerance in (("first-stage", 2e-3), (".", 2e-3)):
        one, two = (curves(tmp_path / name / stage / "metrics.jsonl") for name in ("one", "two"))
        assert len(one) == 12
        np.testing.assert_allclose(one, two, rtol=tolerance)
    # the averaged weights too, and the grid, of which each process has drawn its share
    weights = [ClassConditionalPipeline.from_pretrained(tmp_path / name).unet for name in ("one", "two")]
    for ours, theirs in zip(*(model.parameters() for model in weights)):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-4)
    one, two = (np.asarray(Image.open(tmp_path / name / "samples.png")).astype(float) for name in ("one", "two"))
    assert one.shape == two.shape and np.abs(one - two).mean() < 3


@pytest.mark.slow
def test_two_processes_share_a_moving_average_codebook_and_measure_as_one(preset, tmp_path):
    options = ["--preset", preset, "--max_train_steps", "12", "--evaluation_steps", "6", "--codebook_update", "ema"]
    options += ["--codebook_init", "kmeans", "--codebook_ema_decay", "0.9", "--discriminator_weight", "0"]
    two = [str(ROOT / "train_scripts" / "train_vqgan.py"), *options, "--train_batch_size", "8"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    argv = [*LAUNCH_TWO, *two, "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one = ["--train_batch_size", "16", "--output_dir", str(tmp_path / "one")]
    assert train_vqgan.main([*options, *one]) == 0
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert "eval_psnr" in lines[0][5] and len(lines[0]) == len(lines[1]) == 12
    for ours, theirs in zip(*lines):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if name.startswith(("eval_codebook", "codebook_usage", "codebook_perplexity", "codebook_restarted")):
                assert theirs[name] == pytest.approx(ours[name], rel=0.1, abs=1), name  # a near code or another
            elif name.endswith(("psnr", "ssim", "mse_loss")):
                assert theirs[name] == pytest.approx(ours[name], rel=5e-3), name
    states = [final_state(tmp_path / name)["states"]["codebook"] for name in ("one", "two")]
    assert states[1]["ema_counts"].sum().item() == pytest.approx(states[0]["ema_counts"].sum().item(), rel=1e-3)


@pytest.mark.slow
def test_two_processes_told_to_stop_save_together_and_stop(preset, tmp_path):
    run = tmp_path / "run"
    script = [str(ROOT / "train_scripts" / "train_ddpm.py"), "--preset", preset, "--output_dir", str(run)]
    argv = [*LAUNCH_TWO, *script, "--train_batch_size", "8", "--max_train_steps", "5000", "--logging_steps", "1"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    launched = (run / "checkpoint-4").exists
    code, said = signal_once(launched, argv, signal.SIGTERM, then_wait=0.5, env=environment)
    assert code != 0 and said.count("stopped by SIGTERM after step") == 1
    newest = find_checkpoints(run)[0]
    assert flaw_of(newest) is None and f"{newest} is saved" in said


# -- from another folder, from a wheel --------------------------------------------------------------------------------


def test_without_flags_the_embedded_digits_are_trained_from_inside_the_folder_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "train_ldm.py", "--dry_run", "--output_dir", str(tmp_path / "run")],
        cwd=ROOT / "train_scripts",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "dataset_name: digits" in done.stdout and "num_vq_embeddings: 256" in done.stdout
