from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel, VQModel
from tiny import AUTOENCODERS, make_autoencoder, make_pipeline, seeds

from hwdiffusion import InputError
from hwdiffusion.config import load_preset, parse, preset_names
from hwdiffusion.data import image_channels, image_size
from hwdiffusion.models import (
    FLOW_SAMPLERS,
    SAMPLERS,
    build_noise_scheduler,
    build_pipeline,
    build_unet,
    build_vqvae,
    check_factor,
    latent_shape,
    load_autoencoder,
    load_pipeline,
    sampling_scheduler,
    swap_scheduler,
)
from hwdiffusion.objectives import add_noise
from hwdiffusion.pipelines import label_tokens, num_label_classes, unet_conditioning


VQVAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 3,
    "num_vq_embeddings": 16,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
PROJECTION = {"class_embed_type": "simple_projection"}
CROSS_ATTENTION = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
}
TOKENS = {**CROSS_ATTENTION, "encoder_hid_dim_type": "text_proj"}


# ---------------------------------------------------------------------------------------------------------------------
# What is built
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def denoise(unet, sample: torch.Tensor, ids: list[int], num_classes: int) -> torch.Tensor:
    tokens = label_tokens(torch.tensor(ids)[:, None], num_classes) if num_classes else None
    return unet(sample, torch.tensor([3, 900]), **unet_conditioning(unet.config, tokens)).sample


@pytest.mark.parametrize("preset", [name for name in preset_names() if "unet" in load_preset(name)])
@torch.no_grad()
def test_every_shipped_preset_builds_models_that_fit_together(preset):
    script = "train_ldm" if "train_ldm" in load_preset(preset) else "train_ddpm"
    config = parse(script, ["--preset", preset])
    shape = (image_channels(config.args), *image_size(config.args))
    small = (shape[0], *(min(side, 64) for side in shape[1:]))  # large ones would take minutes
    if script == "train_ldm":
        vqvae = build_vqvae(config.sections["vqvae"], shape[0], shape[1:])
        images = torch.randn(2, *small)
        assert vqvae(images).sample.shape == images.shape
        shape, small = latent_shape(vqvae, shape[1:]), latent_shape(vqvae, small[1:])
        assert vqvae.encode(images).latents.shape == (2, *small)
    scheduler = build_noise_scheduler(config.sections["noise_scheduler"], latent=script == "train_ldm")
    unet = build_unet(config.sections["unet"], shape, num_classes=10).eval()  # it tries its own shape, without content
    sample = torch.randn(2, *small)
    noisy = add_noise(scheduler, sample, torch.randn_like(sample), torch.tensor([3, 900]))
    num_classes = num_label_classes(unet.config)
    assert num_classes == (0 if "unconditional" in preset else 10)
    first, other = denoise(unet, noisy, [0, 1], num_classes), denoise(unet, noisy, [0, 9], num_classes)
    assert first.shape == sample.shape
    torch.testing.assert_close(first[0], other[0])
    assert torch.equal(first[1], other[1]) == (num_classes == 0)  # the label reaches the prediction


def test_the_latents_of_the_mnist_preset_have_an_odd_size():
    config = parse("train_ldm", ["--preset", "mnist-ldm"])
    assert latent_shape(build_vqvae(config.sections["vqvae"], 1, (28, 28)), (28, 28)) == (4, 7, 7)


@pytest.mark.parametrize("section", [PROJECTION, TOKENS], ids=["projection", "tokens"])
def test_the_data_decides_the_shape_and_the_number_of_classes(section):
    unet = build_unet({**UNET, **section}, (3, 8, 12), num_classes=5)
    assert (unet.config.in_channels, unet.config.out_channels) == (3, 3)
    assert num_label_classes(unet.config) == 5
    assert denoise(unet, torch.randn(2, 3, 8, 12), [4, 0], 5).shape == (2, 3, 8, 12)


def test_the_latent_shape_follows_the_codes_and_the_size():
    vqvae = build_vqvae({**VQVAE, "vq_embed_dim": 5}, 3, (8, 12))
    assert latent_shape(vqvae, (8, 12)) == tuple(vqvae.encode(torch.randn(1, 3, 8, 12)).latents.shape[1:]) == (5, 4, 6)


def test_a_section_is_passed_on_as_it_is():
    unet = build_unet({**UNET, "dropout": 0.25, "flip_sin_to_cos": False, "act_fn": "gelu"}, (1, 8, 8), 0)
    assert (unet.config.dropout, unet.config.flip_sin_to_cos, unet.config.act_fn) == (0.25, False, "gelu")
    scheduler = build_noise_scheduler({"beta_start": 0.001, "beta_end": 0.01, "num_train_timesteps": 77}, False)
    torch.testing.assert_close(scheduler.betas, torch.linspace(0.001, 0.01, 77))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_saved_scheduler_has_the_noise_it_was_trained_with(prediction_type):
    trained = build_noise_scheduler(
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type}, latent=True
    )
    sampler = sampling_scheduler(trained)
    assert torch.equal(sampler.alphas_cumprod, trained.alphas_cumprod)
    assert sampler.config.prediction_type == prediction_type
    assert sampler.config.clip_sample is False


def diffusion_arguments(**given) -> SimpleNamespace:
    defaults = {"num_inference_steps": 7, "guidance_unet_at": 0.0, "guidance_interval": [0.0, 1.0]}
    return SimpleNamespace(**{**defaults, **given})


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}


def test_a_flow_is_named_by_its_scheduler_and_known_to_its_pipeline():
    trained = build_noise_scheduler({**FLOW, "beta_schedule": None}, latent=True)  # a preset's, taken out by a flag
    sampler = sampling_scheduler(trained)
    assert type(trained) is type(sampler) is FlowMatchEulerDiscreteScheduler and sampler.config.shift == 2.0
    data, args = SimpleNamespace(id2label={}, max_labels=1), diffusion_arguments()
    pipeline = build_pipeline(build_unet(UNET, (1, 8, 8), 0), trained, None, data, args)
    assert pipeline.config.prediction_type == "flow_prediction"


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("flow", [False, True])
def test_every_named_sampler_is_one_for_the_model_or_refused(name, flow):
    pipe = make_pipeline("pixel", "flow_prediction" if flow else "v_prediction")
    if flow and name not in FLOW_SAMPLERS:
        with pytest.raises(ValueError, match="the model predicts a flow, which euler, heun, dpmpp, dpmpp_sde, unipc"):
            swap_scheduler(pipe, name)
        return
    noise, w = torch.randn(1, 1, 8, 8), {"labels": [1], "output_type": "latent"}
    fine = pipe(latents=noise, num_inference_steps=50, **w).images
    swap_scheduler(pipe, name)
    drawn = pipe(latents=noise, num_inference_steps=25, generator=seeds(0), **w).images
    assert drawn.isfinite().all()
    if name in ("ddim", "dpmpp", "unipc", "euler", "heun"):  # deterministic: the same way to the same picture
        assert (drawn - fine).norm() < 0.15 * fine.norm()
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    swap_scheduler(pipe, "euler")
    swap_scheduler(pipe, name)  # there and back nothing is lost
    again = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    assert again == config


def test_latents_are_not_clipped_and_pixels_are():
    assert build_noise_scheduler({}, latent=True).config.clip_sample is False
    assert build_noise_scheduler({}, latent=False).config.clip_sample is True


@pytest.mark.parametrize("prediction_type, first", [("v_prediction", 999), ("sample", 999), ("epsilon", 900)])
def test_what_a_run_is_saved_with_begins_at_pure_noise_where_it_can(prediction_type, first):
    scheduler = sampling_scheduler(build_noise_scheduler({"prediction_type": prediction_type}, latent=True))
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == first


def test_with_zero_terminal_snr_sampling_starts_at_the_last_timestep():
    section = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    sampler = sampling_scheduler(build_noise_scheduler(section, latent=True))
    sampler.set_timesteps(10)
    assert sampler.timesteps[0] == 999
    assert sampler.alphas_cumprod[999] == 0


@pytest.mark.parametrize(
    "section, dropout, expected",
    [
        (PROJECTION, 0.1, {"has_null_label": True, "default_guidance_scale": 2.0, "max_labels": 3}),
        (PROJECTION, 0.0, {"has_null_label": False, "default_guidance_scale": 2.0, "max_labels": 3}),
        ({}, 0.1, {"has_null_label": False, "default_guidance_scale": 1.0, "max_labels": 1}),
    ],
    ids=["labels", "labels without dropout", "no labels"],
)
def test_the_pipeline_knows_what_was_trained(section, dropout, expected):
    unet = build_unet({**UNET, **section}, (1, 8, 8), 2)
    data = SimpleNamespace(id2label={0: "cat", 1: "dog"}, max_labels=3)
    args = diffusion_arguments(label_dropout=dropout, guidance_scale=2.0, guidance_interval=[0.0, 0.5])
    pipeline = build_pipeline(unet, build_noise_scheduler({}, False), None, data, args)
    assert {key: pipeline.config[key] for key in expected} == expected
    assert pipeline.id2label == (data.id2label if section else {})
    args.guidance_unet_at = 0.1  # which guides without labels, too
    guided = build_pipeline(unet, build_noise_scheduler({}, False), None, data, args)
    assert guided.config.default_guidance_scale == 2.0
    assert pipeline.config["default_num_inference_steps"] == 7
    assert pipeline.config["default_guidance_interval"] == ([0.0, 0.5] if section else [0.0, 1.0])
    assert guided.config["default_guidance_interval"] == [0.0, 0.5]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"norm_num_groups": 3}, r"divisible by norm_num_groups \(3\), but 8 isn't"),
        ({"norm_num_groups": 0}, "norm_num_groups .* positive whole number"),
        ({"block_out_channels": 8}, "block_out_channels .* list of positive numbers"),
        ({"block_out_channels": [8, "16"]}, "block_out_channels .* list of positive numbers"),
        ({"block_out_chanels": [8, 16]}, "'block_out_chanels'.*did you mean block_out_channels"),
        ({"in_channels": 3}, "in_channels in section vqvae is 3, but .* 1"),
        ({"out_channels": 3}, "out_channels in section vqvae is 3, but .* 1"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "block_out_channels 2, down_block_types 1, up_block_types 2"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "block_out_channels 2, down_block_types 2, up_block_types 3"),
        ({"down_block_types": ["DownEncoderBlock2D", "NoBlock2D"]}, "makes no VQModel: NoBlock2D"),
        ({"num_vq_embeddings": "many"}, "must be a positive whole number"),
    ],
)
def test_a_vqvae_section_that_does_not_fit_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        build_vqvae({**VQVAE, **changes}, 1, (8, 8))


def test_a_size_that_the_factor_does_not_divide_is_refused_with_sizes_that_it_does():
    with pytest.raises(InputError, match="28 30 is not divisible by the autoencoder's factor 4; use 28 28 or 32 32"):
        check_factor(4, (28, 30))
    for size in ((28, 28), (32, 32), (4, 8)):
        check_factor(4, size)
    with pytest.raises(InputError, match="factor 2; use 8 6 or 10 8"):
        build_vqvae(VQVAE, 1, (8, 7))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"norm_num_groups": 5}, r"divisible by norm_num_groups \(5\), but 8 isn't"),
        ({"sampel_size": 8}, "'sampel_size'.*did you mean sample_size"),
        ({"in_channels": 4}, "in_channels in section unet is 4, but .* 1"),
        ({"sample_size": 16}, "sample_size in section unet is 16, but .* 8"),
        ({"up_block_types": ["UpBlock2D"]}, "block_out_channels 2, down_block_types 2, up_block_types 1"),
        ({"down_block_types": ["DownBlock2D", "NoBlock2D"]}, "makes no UNet2DConditionModel: NoBlock2D"),
        (CROSS_ATTENTION, "encoder_hid_dim_type='text_proj'.*CrossAttnDownBlock2D"),
        ({"num_class_embeds": 10}, "num_class_embeds"),
        ({**PROJECTION, "projection_class_embeddings_input_dim": 7}, "input_dim in section unet is 7, but .* 10"),
        ({**TOKENS, "encoder_hid_dim": 7}, "encoder_hid_dim in section unet is 7, but .* 10"),
    ],
)
def test_a_unet_section_that_does_not_fit_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        build_unet({**UNET, **changes}, (1, 8, 8), 10)


@pytest.mark.parametrize("section", [PROJECTION, TOKENS], ids=["projection", "tokens"])
def test_a_unet_that_takes_labels_is_refused_for_pictures_without(section):
    with pytest.raises(InputError, match="the unet section takes labels .* but the pictures have none"):
        build_unet({**UNET, **section}, (1, 8, 8), 0)


@torch.no_grad()
def test_blocks_that_cannot_give_an_odd_size_back_are_refused_and_others_are_not():
    with pytest.raises(InputError, match="AttnUpBlock2D can't give back samples of 7x7"):
        build_unet({**UNET, "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}, (1, 7, 7), 0)
    for last, size in (("UpBlock2D", 7), ("AttnUpBlock2D", 7), ("UpBlock2D", 8)):
        first = "AttnUpBlock2D" if size == 8 else "UpBlock2D"
        unet = build_unet({**UNET, "up_block_types": [first, last]}, (1, size, size), 0)
        sample = torch.randn(2, 1, size, size)
        assert denoise(unet, sample, [], 0).shape == sample.shape


@pytest.mark.parametrize(
    "section, latent, said",
    [
        ({"prediction_tpye": "sample"}, False, "'prediction_tpye'.*did you mean prediction_type"),
        ({"prediction_type": "flow"}, False, "one of epsilon, sample, v_prediction, not flow"),
        ({"beta_schedule": "steep"}, False, "makes no DDPMScheduler: steep"),
        ({"rescale_betas_zero_snr": True}, False, "rescale_betas_zero_snr .* needs prediction_type v_prediction"),
        ({"clip_sample": True}, True, "clip_sample in section noise_scheduler is True"),
        ({"_class_name": "DDIMScheduler"}, False, "_class_name .* must be DDPMScheduler or FlowMatchEulerDiscreteSch"),
        (
            {**FLOW, "beta_schedule": "linear"},
            False,
            "takes no beta_schedule; .* --noise_scheduler.beta_schedule null",
        ),
        ({**FLOW, "shfit": 3.0}, False, "'shfit'.*did you mean shift"),
        ({**FLOW, "use_dynamic_shifting": True}, False, "use_dynamic_shifting .* can't be trained"),
    ],
)
def test_a_noise_scheduler_section_that_does_not_fit_is_refused(section, latent, said):
    with pytest.raises(InputError, match=said):
        build_noise_scheduler(section, latent)


# ---------------------------------------------------------------------------------------------------------------------
# A trained autoencoder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model, a pipeline-like one with it in vqvae/, and the model."""
    torch.manual_seed(0)
    vqvae = build_vqvae(VQVAE, 1, (8, 8)).eval()
    vqvae.register_to_config(scaling_factor=1.25)
    folder = tmp_path_factory.mktemp("trained")
    vqvae.save_pretrained(folder / "model")
    vqvae.save_pretrained(folder / "pipeline" / "vqvae")
    (folder / "pipeline" / "model_index.json").write_text("{}")
    return folder, vqvae


@pytest.mark.parametrize("name", ["model", "pipeline"])
@torch.no_grad()
def test_a_trained_vqvae_is_read_from_its_folder_and_from_a_pipelines(trained, name):
    folder, vqvae = trained
    loaded = load_autoencoder(str(folder / name), 1, (8, 12)).eval()
    assert loaded.config.scaling_factor == 1.25
    images = torch.randn(2, 1, 8, 12)
    assert torch.equal(loaded(images).sample, vqvae(images).sample)


def test_a_trained_vqvae_that_does_not_fit_the_pictures_is_refused(trained):
    folder, _ = trained
    with pytest.raises(InputError, match="takes pictures of 1 channels, but --image_mode gives 3"):
        load_autoencoder(str(folder / "model"), 3, (8, 8))
    with pytest.raises(InputError, match="7 8 is not divisible by the autoencoder's factor 2; use 6 8 or 8 10"):
        load_autoencoder(str(folder / "model"), 1, (7, 8))


def test_what_holds_no_vqvae_is_refused(trained, tmp_path):
    folder, vqvae = trained
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no autoencoder: none of config.json, vqvae/config.json"):
        load_autoencoder(str(tmp_path / "empty"), 1, (8, 8))
    build_unet(UNET, (1, 8, 8), 0).save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match="unet holds a UNet2DConditionModel, not one of VQModel, AutoencoderKL"):
        load_autoencoder(str(tmp_path / "unet"), 1, (8, 8))
    vqvae.save_config(tmp_path / "weightless")
    with pytest.raises(InputError, match="weightless can't be loaded"):
        load_autoencoder(str(tmp_path / "weightless"), 1, (8, 8))
    vqvae.save_pretrained(tmp_path / "torn")
    weights = tmp_path / "torn" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="torn can't be loaded"):
        load_autoencoder(str(tmp_path / "torn"), 1, (8, 8))


def test_a_folder_that_does_not_exist_is_refused(trained):
    folder, _ = trained
    with pytest.raises(
        InputError, match="the autoencoder .*modell can't be loaded: there is no such .* mean .*model?"
    ):
        load_autoencoder(str(folder / "modell"), 1, (8, 8))
    with pytest.raises(InputError, match="the run ./digits can't be loaded: there is no such file or folder"):
        load_pipeline("./digits", torch.device("cpu"))


def test_models_are_stock_classes():
    assert type(build_vqvae(VQVAE, 1, (8, 8))) is VQModel
    assert type(build_unet(UNET, (1, 8, 8), 0)) is UNet2DConditionModel


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("place", ["", "vqvae", "vae"])
@torch.no_grad()
def test_every_kind_of_autoencoder_is_loaded_from_its_own_folder_and_from_a_pipelines(name, place, tmp_path):
    vae = make_autoencoder(name, channels=3)
    vae.save_pretrained(tmp_path / place)
    loaded = load_autoencoder(str(tmp_path), 3, (16, 24)).eval()
    assert type(loaded) is type(vae)
    shape = latent_shape(loaded, (16, 24))
    latents = torch.randn(2, *shape)
    images = loaded.decode(latents).sample
    assert images.shape == (2, 3, 16, 24)
    assert torch.equal(images, vae.decode(latents).sample)
    with pytest.raises(InputError, match="takes pictures of 3 channels, but --image_mode gives 1"):
        load_autoencoder(str(tmp_path), 1, (16, 24))
    with pytest.raises(InputError, match="not divisible by the autoencoder's factor 2"):
        load_autoencoder(str(tmp_path), 3, (15, 24))


@torch.no_grad()
def test_weights_in_torchs_own_format_are_read_as_tensors_and_nothing_else_is_unpickled(trained, tmp_path):
    """As older repositories of the Hub have them, CompVis/ldm-celebahq-256 for one."""
    _, vqvae = trained
    vqvae.save_pretrained(tmp_path / "vqvae", safe_serialization=False)
    (weights,) = (tmp_path / "vqvae").glob("*.bin")
    images = torch.randn(2, 1, 8, 12)
    assert torch.equal(load_autoencoder(str(tmp_path), 1, (8, 12)).eval()(images).sample, vqvae(images).sample)

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"encoder.conv_in.weight": Trap()}, weights)
    with pytest.raises(InputError, match="can't be loaded"):
        load_autoencoder(str(tmp_path), 1, (8, 12))
    assert not (tmp_path / "sprung").exists()
