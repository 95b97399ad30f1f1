"""Every wrong input gets one sentence and exit code 2 from the scripts, before any work, and leaves nothing behind."""

import numpy as np
import pytest
import torch
from conftest import PROJECTION, TINY_UNET, TINY_VQVAE, TOKENS
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from running import MAIN, TINY_PRESET, write_preset
from tiny import make_autoencoder

from hwdiffusion.models import build_vqvae


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16), dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes of six pictures each."""
    for index in range(12):
        picture(tmp_path / "pictures" / ("cat", "dog")[index % 2] / f"{index}.png", index)
    return tmp_path / "pictures"


@pytest.fixture
def fails(tmp_path, capsys, monkeypatch):
    """Run a script on the tiny preset, changed as told; it must fail as promised. Its sentence is returned."""
    from hwdiffusion.trainer import Trainer

    def no_step(*_):
        raise AssertionError("training began")

    monkeypatch.setattr(Trainer, "update", no_step)

    def run(script, *argv, preset=None) -> str:
        path = write_preset(tmp_path / "preset.yaml", {**TINY_PRESET, **(preset or {})})
        output_dir = tmp_path / "output"
        before = sorted(output_dir.rglob("*"))
        argv = ["--preset", path, "--output_dir", str(output_dir), *map(str, argv)]
        assert MAIN[script](argv) == 2
        said = capsys.readouterr()
        (line,) = said.err.strip().splitlines()[-1:]
        assert line.startswith(f"{script}.py: error: ") and "Traceback" not in said.err
        assert sorted(output_dir.rglob("*")) == before, "something was written"
        return line

    return run


every_script = pytest.mark.parametrize("script", sorted(MAIN))


@every_script
def test_no_images(script, fails, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    assert f"no images found in {tmp_path / 'empty'}" in fails(script, "--train_data_dir", tmp_path / "empty")
    assert "is not a folder" in fails(script, "--train_data_dir", tmp_path / "nowhere")


@every_script
def test_an_empty_class_folder(script, fails, folder):
    (folder / "wild").mkdir()
    assert f"class folder {folder / 'wild'} holds no images" in fails(script, "--train_data_dir", folder)


@every_script
def test_a_truncated_picture_is_named(script, fails, folder):
    whole = (folder / "cat" / "0.png").read_bytes()
    (folder / "cat" / "0.png").write_bytes(whole[: len(whole) // 2])
    said = fails(script, "--train_data_dir", folder)
    assert str(folder / "cat" / "0.png") in said and "--skip_bad_images" in said


@every_script
def test_a_bad_picture_among_lazily_read_ones(script, fails, folder):
    (folder / "dog" / "1.png").write_bytes(b"no picture")
    assert str(folder / "dog" / "1.png") in fails(script, "--train_data_dir", folder, "--image_memory_gb", "0")


def test_a_class_named_train(fails, folder):
    (folder / "cat").rename(folder / "train")
    assert "if train is a class, rename it" in fails("train_ddpm", "--train_data_dir", folder)


@every_script
def test_a_precision_that_the_device_does_not_have(script, fails):
    if not torch.cuda.is_available():
        assert "fp16 needs a GPU" in fails(script, "--mixed_precision", "fp16")
    assert "one of auto, no, fp16, bf16" in fails(script, "--mixed_precision", "int8")


def test_contradicting_flags(fails):
    assert "give one of them" in fails("train_ddpm", "--overwrite_output_dir", "--resume_from_checkpoint", "latest")
    assert "--hub_model_id" in fails("train_ddpm", "--push_to_hub")


def test_a_generator_that_would_never_be_trained(fails):
    said = fails("train_wgan", "--max_train_steps", "4", "--critic_steps", "5")
    assert "--max_train_steps must be at least --critic_steps, 5" in said


def test_a_hub_that_can_not_be_pushed_to(fails, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("hwdiffusion.run_folder.get_token", lambda: None)
    for name in ("a b/c", "name"):
        assert "--hub_model_id must be USER/NAME" in fails("train_ldm", "--push_to_hub", "--hub_model_id", name)
    for script in ("train_ldm", "train_vqgan"):
        assert "logged in to the Hub" in fails(script, "--push_to_hub", "--hub_model_id", "user/name")


def test_counts_that_are_none(fails):
    for key in ("vqvae.latent_channels", "noise_scheduler.num_train_timesteps", "unet.layers_per_block"):
        for wrong in ("0", "four"):
            said = fails("train_ldm", f"--{key}", wrong)
            assert f"{key.split('.')[1]} in section {key.split('.')[0]} must be a positive whole number" in said


@pytest.mark.parametrize("script", ["train_ddpm", "train_ldm"])
def test_steps_that_the_pipeline_could_not_sample_in(script, fails):
    assert "--num_inference_steps must be at most num_train_timesteps, 1000" in fails(
        script, "--num_inference_steps", "5000"
    )
    zero_snr = ["--noise_scheduler.rescale_betas_zero_snr", "true"]
    assert "must divide num_train_timesteps, 1000" in fails(script, *zero_snr, "--num_inference_steps", "30")


def test_a_preset_of_another_script_or_a_flag_of_both_stages(fails, tmp_path):
    assert MAIN["train_ldm"](["--preset", "mnist-ddpm", "--output_dir", str(tmp_path / "output")]) == 2
    assert "can't differ between the stages" in fails("train_ldm", "--train_vqgan.resolution", "32")
    assert "belongs to no flag" in fails("train_ldm", "stray")


def test_an_output_folder_that_can_not_be_made(tmp_path, capsys):
    preset = write_preset(tmp_path / "p.yaml", TINY_PRESET)
    for script, main in MAIN.items():
        assert main(["--preset", preset, "--output_dir", "/proc/nowhere/run"]) == 2, script
        assert "can't be made" in capsys.readouterr().err


def test_bad_pictures_are_skipped_and_counted_on_demand(folder, tmp_path, capsys):
    (folder / "cat" / "0.png").write_bytes(b"no picture")
    preset = write_preset(tmp_path / "preset.yaml", {**TINY_PRESET, "max_train_steps": 2})
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--train_data_dir", str(folder)]
    assert MAIN["train_ddpm"]([*argv, "--skip_bad_images", "--validation_fraction", "0.3"]) == 0
    assert "skipped 1 unreadable picture" in capsys.readouterr().out


@every_script
def test_a_column_that_is_not_there(script, fails, folder, tmp_path):
    features = Features({"picture": ImageFeature(), "kind": ClassLabel(names=["cat", "dog"]), "note": Value("string")})
    rows = {"picture": sorted(map(str, folder.rglob("*.png"))), "kind": [0, 1] * 6, "note": ["x"] * 12}
    (tmp_path / "parquet").mkdir()
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "parquet" / "train.parquet")
    for flag in ("--label_column", "--image_column"):
        said = fails(script, "--train_data_dir", tmp_path / "parquet", flag, "label")
        assert "'label'" in said and "picture, kind, note" in said
    assert "column 'label' can't be chosen" in fails(script, "--train_data_dir", folder, "--label_column", "label")


@pytest.mark.parametrize("script", ["train_vqgan", "train_ldm"])
def test_a_resolution_that_the_factor_does_not_divide(script, fails):
    said = fails(script, "--resolution", "15")
    assert "not divisible by the autoencoder's factor 2; use 14 14 or 16 16" in said
    assert "use 16 14 or 18 16" in fails(script, "--resolution", "16", "15")


@pytest.mark.parametrize("script", ["train_vqgan", "train_ddpm", "train_ldm"])
def test_channels_that_the_norm_groups_do_not_divide(script, fails):
    section = "vqvae" if script == "train_vqgan" else "unet"
    said = fails(script, f"--{section}.block_out_channels", "[8, 18]")
    assert f"section {section}" in said and "norm_num_groups (4)" in said and "18" in said


def test_an_autoencoder_and_a_unet_that_do_not_fit(fails, tmp_path):
    said = fails("train_ldm", "--unet.in_channels", "3")
    assert "in_channels in section unet is 3, but the data and the other stage make it 2" in said
    assert "sample_size in section unet is 16" in fails("train_ldm", "--unet.sample_size", "16")
    build_vqvae(TINY_VQVAE, 3, (16, 16)).save_pretrained(tmp_path / "rgb")
    assert "3 channels" in fails("train_ldm", "--vqvae", tmp_path / "rgb")
    build_vqvae(TINY_VQVAE, 1, (16, 16)).save_pretrained(tmp_path / "gray")
    assert "not divisible" in fails("train_ldm", "--vqvae", tmp_path / "gray", "--resolution", "15")
    (tmp_path / "other").mkdir()
    assert "holds no autoencoder" in fails("train_ldm", "--vqvae", tmp_path / "other")


def test_odd_latents_that_a_block_cannot_give_back(fails):
    assert "AttnUpBlock2D can't give back samples of 7x7" in fails("train_ldm", "--resolution", "14")


@every_script
def test_labels_out_of_range(script, fails, folder, tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    rows = {"image": sorted(map(str, folder.rglob("*.png"))), "label": [0, 1] * 5 + [0, None]}
    (tmp_path / "parquet").mkdir()
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "parquet" / "train.parquet")
    said = fails(script, "--train_data_dir", tmp_path / "parquet")
    assert "row 11" in said and "allowed are the ids 0 to 1 (cat, dog)" in said


@pytest.mark.parametrize("script", ["train_ddpm", "train_ldm"])
def test_labels_that_the_pictures_do_not_have(script, fails, folder, tmp_path):
    flat = tmp_path / "flat"
    for index in range(12):
        picture(flat / f"{index}.png", index)
    assert "the pictures have none" in fails(script, "--train_data_dir", flat)
    tokens = {"unet": {**TINY_UNET, **TOKENS, "encoder_hid_dim_type": None}}
    assert "the two ways to take labels" in fails(script, preset=tokens)


@pytest.mark.parametrize("script", ["train_ddpm", "train_ldm"])
def test_guidance_without_label_dropout(script, fails):
    said = fails(script, "--label_dropout", "0")
    assert "--guidance_scale 1.5 needs a model trained with label dropout" in said
    for part in ("-0.1", "1", "nan"):
        said = fails(script, "--guidance_unet_at", part)
        assert "--guidance_unet_at must be at least 0 and less than 1" in said
    said = fails(script, "--guidance_unet_at", "0.1", "--single_label_dropout", "0.1")
    assert "leave out one of them" in said


@every_script
def test_an_unknown_preset_flag_or_key(script, fails, tmp_path, capsys):
    assert MAIN[script](["--preset", "digit", "--output_dir", str(tmp_path / "output")]) == 2
    assert "did you mean digits?" in capsys.readouterr().err
    assert "did you mean --learning_rate?" in fails(script, "--learnin_rate", "1")
    assert "did you mean resolution?" in fails(script, preset={"resolutions": 16})
    key = {"train_vqgan": "vqvae.norm_num_groups", "train_classifier": "classifier.hidden_sizes",
           "train_wgan": "generator.norm_num_groups"}  # fmt: skip
    key = key.get(script, "unet.norm_num_groups")
    assert f"did you mean {key.split('.')[1]}?" in fails(script, f"--{key[:-1]}", "4")
    assert "learning_rate" in fails(script, "--learning_rate", "fast")
    assert "--train_batch_size must be at least 1" in fails(script, "--train_batch_size", "0")
    assert not (tmp_path / "output").exists()


@every_script
def test_an_output_folder_that_holds_something_else(script, fails, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    assert "is not empty and not a run folder" in fails(script)
    assert "is not empty and not a run folder" in fails(script, "--overwrite_output_dir")
    (output / "config.yaml").write_text("name: my other project\n")
    assert "is not empty and not a run folder" in fails(script, "--overwrite_output_dir")
    other = "train_ddpm" if script == "train_vqgan" else "train_vqgan"
    (output / "config.yaml").write_text(f"script: {other}\n")
    assert f"holds a run of {other}" in fails(script)
    assert (output / "thesis.tex").read_text() == "precious"


@every_script
def test_a_checkpoint_or_tracker_that_is_not_there(script, fails, tmp_path):
    said = fails(script, "--resume_from_checkpoint", tmp_path / "checkpoint-7")
    assert "is not a checkpoint" in said
    assert "tensorboard" in fails(script, "--report_to", "clipboard")


@pytest.mark.parametrize("script", ["train_ddpm", "train_ldm"])
def test_a_noise_schedule_that_cannot_be_trained(script, fails):
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}
    assert "needs prediction_type v_prediction" in fails(script, preset={"noise_scheduler": zero_snr})
    said = fails(script, "--noise_scheduler.prediction_type", "flow")
    assert "must be one of epsilon, sample, v_prediction" in said


@pytest.mark.parametrize("script", ["train_ddpm", "train_ldm"])
@pytest.mark.parametrize("wrong", [{"attention_head_dim": 64}, {"mid_block_type": "UNetMidBlock2DCrossAttn"}])
def test_parts_of_a_unet_that_do_not_fit_each_other(script, wrong, fails):
    """They would be found in the first step only, of a latent diffusion after its whole first stage."""
    said = fails(script, preset={"unet": {**TINY_UNET, **PROJECTION, **wrong}})
    assert "section unet makes a model that can't take samples of" in said


def test_a_time_without_end(fails):
    assert "--max_train_seconds must be positive, not inf" in fails("train_ddpm", "--max_train_seconds", "inf")


def test_a_model_of_another_shape_leaves_the_configuration_of_the_run(tmp_path, capsys):
    preset, run = write_preset(tmp_path / "p.yaml", {**TINY_PRESET, "max_train_steps": 4}), tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run)]
    assert MAIN["train_ddpm"](argv) == 0
    saved = (run / "config.yaml").read_text()
    other = ["--resume_from_checkpoint", "latest", "--unet.block_out_channels", "[16, 16]"]
    assert MAIN["train_ddpm"]([*argv, *other]) == 2
    assert "is of another model than this run's unet" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == saved and MAIN["train_ddpm"](argv) == 0


def test_classes_that_are_not_there_can_not_be_evened_out(fails, tmp_path):
    for index in range(12):
        picture(tmp_path / "flat" / f"{index}.png", index)
    unet = {"unet": {**TINY_UNET}}
    said = fails("train_ddpm", "--train_data_dir", tmp_path / "flat", "--class_balance", "0.5", preset=unet)
    assert "--class_balance evens out classes, but" in said and "has none" in said


def test_what_the_first_stage_lacks_is_found_before_anything_is_written(fails):
    said = fails("train_ldm", "--train_vqgan.evaluation_classifier", "gone")
    assert "gone can't be loaded" in said
    said = fails("train_ldm", "--train_vqgan.perceptual_weight", "1", "--train_vqgan.perceptual_model", "gone")
    assert "--perceptual_model gone can't be loaded" in said


def test_an_autoencoder_of_another_kind_is_refused(fails, tmp_path):
    from diffusers import AutoencoderKLTemporalDecoder

    AutoencoderKLTemporalDecoder(in_channels=1, block_out_channels=(32,), layers_per_block=1).save_config(
        tmp_path / "v"
    )
    said = fails("train_ldm", "--vae", tmp_path / "v")
    assert "holds a AutoencoderKLTemporalDecoder, not one of VQModel, AutoencoderKL, AutoencoderTiny" in said


def test_an_autoencoder_that_scales_each_channel_by_itself_is_measured_or_refused(fails, tmp_path):
    vae = make_autoencoder("AutoencoderKL")
    vae.register_to_config(latents_mean=[0.5] * 3, latents_std=[2.0] * 3)
    vae.save_pretrained(tmp_path / "v")
    said = fails("train_ldm", "--vae", tmp_path / "v", "--latent_scaling", "config")
    assert "scales each channel by itself; give --latent_scaling measured" in said
