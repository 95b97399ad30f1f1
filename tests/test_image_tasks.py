"""Variation, inpainting, interpolation and inversion: all by the one pipeline."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from PIL import Image
from tiny import KINDS, PREDICTION_TYPES, ask, make_pipeline, seeds

from hwdiffusion.pipelines import slerp


SCHEDULERS = [
    None,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
]


def picture(pipe, count: int = 1, seed: int = 3) -> torch.Tensor:
    """Pictures `(B, C, H, W)` in [0, 1]."""
    channels = pipe.unet.config.in_channels if pipe.vqvae is None else 1
    return torch.rand(count, channels, *pipe.image_size, generator=torch.Generator().manual_seed(seed))


def mask_of(pipe, columns: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, *pipe.image_size)
    mask[..., :columns] = 1
    return mask


# -- variation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_strength_goes_from_the_picture_itself_to_a_picture_from_noise(kind):
    pipe = make_pipeline(kind)
    image, call = picture(pipe), {**ask(kind, 1), "output_type": "latent"}
    clean = pipe.encode_images(image * 2 - 1).detach()
    same = pipe(image=image, strength=0, generator=seeds(0), **call).images
    torch.testing.assert_close(same, clean)
    assert pipe.num_timesteps == 0
    forgotten = pipe(image=image, strength=1, generator=seeds(0), **call).images
    assert torch.equal(forgotten, pipe(generator=seeds(0), **call).images)
    between = pipe(image=image, strength=0.5, generator=seeds(0), **call).images
    assert pipe.num_timesteps == 2
    assert not torch.equal(between, same) and not torch.equal(between, forgotten)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
def test_the_unet_first_sees_the_picture_noised_to_the_strength(prediction_type, strength):
    pipe, seen = make_pipeline("pixel", prediction_type), []
    image, noise = picture(pipe), torch.randn(1, 1, 8, 8)
    pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    pipe(labels=[1], image=image, strength=strength, latents=noise, num_inference_steps=8)
    sample, timestep = seen[0]
    assert len(seen) == 8 * strength and timestep <= 1000 * strength
    ((alpha, sigma),) = pipe.noise_levels(timestep[None])
    torch.testing.assert_close(sample, alpha * (image * 2 - 1) + sigma * noise, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS[1:])
def test_every_scheduler_starts_where_the_strength_says(scheduler):
    """Whatever scale it keeps its samples in, the UNet sees signal and noise as it was trained to."""
    pipe, seen = make_pipeline("pixel"), []
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    image, noise = picture(pipe), torch.randn(1, 1, 8, 8)
    pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    pipe(labels=[1], image=image, strength=0.4, latents=noise, num_inference_steps=8, generator=seeds(0))
    sample, timestep = seen[0]
    assert 250 <= timestep <= 400
    ((alpha, sigma),) = pipe.noise_levels(timestep[None])
    torch.testing.assert_close(sample, alpha * (image * 2 - 1) + sigma * noise, atol=1e-4, rtol=0)


def true_noise(pipe, mean=0.3, deviation=0.5):
    """Put a perfect model of data N(mean, deviation²) in the UNet's place, and give what its flow does to a sample."""

    def forward(sample, timestep, **_):
        ((alpha, sigma),) = pipe.noise_levels(timestep.reshape(1))
        noise = sigma * (sample - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)
        clean = (sample - sigma * noise) / alpha
        return (alpha * noise - sigma * clean,)

    pipe.unet.forward = forward

    def end(sample, alpha, sigma):  # the probability flow keeps a sample's place in its distribution
        place = (sample - alpha * mean) / (alpha**2 * deviation**2 + sigma**2) ** 0.5
        return mean + deviation * place

    return end


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS[2:], PNDMScheduler])
@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_from_any_strength_every_solver_follows_the_flow(scheduler, strength):
    """On a Gaussian the end of a deterministic sampler is known."""
    pipe = make_pipeline("pixel")
    if scheduler is EulerAncestralDiscreteScheduler:
        pytest.skip("it is stochastic")
    if scheduler is not None:
        settings = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    end, seen = true_noise(pipe), []
    predict = pipe._predict
    pipe._predict = lambda sample, t, level, *rest: (seen.append((sample, level)), predict(sample, t, level, *rest))[1]
    options = {"image": picture(pipe), "strength": strength, "num_inference_steps": 50, "output_type": "latent"}
    found = pipe(labels=[1], generator=seeds(0), **options).images
    sample, (alpha, sigma) = seen[0]
    torch.testing.assert_close(found, end(sample, alpha, sigma), atol=0.05, rtol=0)


def test_pndm_with_runge_kutta_steps_can_not_begin_in_the_middle():
    pipe = make_pipeline("pixel")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="skip_prk_steps=True"):
        pipe(labels=[1], image=picture(pipe), strength=0.5)


def test_more_strength_takes_the_picture_further_away():
    pipe = make_pipeline("pixel")
    image = picture(pipe)
    errors = [
        (pipe(labels=[1], image=image, strength=s, generator=seeds(0), output_type="pt").images - image).norm().item()
        for s in (0, 0.25, 0.5, 0.75)
    ]
    assert errors == sorted(errors) and errors[0] < 1e-5


def test_the_label_decides_what_a_picture_turns_into():
    pipe = make_pipeline("pixel")
    image = picture(pipe)
    cat, dog = (
        pipe(labels=[k], image=image, strength=0.5, generator=seeds(0), output_type="pt").images for k in (0, 1)
    )
    assert (cat - dog).abs().max() > 1e-3


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_made_of_a_picture_belongs_to_its_generator(scheduler, masked):
    pipe = make_pipeline("latent")
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    images = picture(pipe, 3)
    options = {"strength": 0.75, "output_type": "latent", "guidance_scale": 2.0}
    if masked:
        options["mask_image"] = mask_of(pipe, 7)
    together = pipe(labels=[0, 1, 2], image=images, generator=seeds(5, 6, 7), **options).images
    alone = pipe(labels=[1], image=images[1:2], generator=seeds(6), **options).images
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)


def test_one_picture_serves_all_labels_and_one_label_all_pictures():
    pipe = make_pipeline("pixel")
    image = picture(pipe)
    run = lambda **call: pipe(generator=seeds(0, 0), strength=0.5, output_type="latent", **call).images  # noqa: E731
    torch.testing.assert_close(run(labels=[0, 1], image=image), run(labels=[0, 1], image=torch.cat([image, image])))
    torch.testing.assert_close(run(labels=[1, 1], image=image), run(labels=1, image=torch.cat([image, image])))
    twice = run(labels=[1], image=image, num_images_per_prompt=2)
    torch.testing.assert_close(twice[0], twice[1])


@pytest.mark.parametrize("kind", ["pixel", "odd"])
def test_pictures_of_every_type_are_the_same_picture(kind):
    pipe = make_pipeline(kind)
    values = (picture(pipe) * 255).round()
    array = values[0].permute(1, 2, 0).numpy().astype(np.uint8)
    pil = Image.fromarray(array.squeeze())
    given = [values / 255, values[0] / 255, [values[0] / 255], array[None] / 255.0, pil, [pil], pil.convert("RGBA")]
    given += [array[None], values.to(torch.uint8)]
    if kind == "pixel":
        given.append(Image.fromarray(array.squeeze().astype(np.uint16) * 257))  # 16 bits
    results = [
        pipe(labels=[1], image=image, strength=0.5, generator=seeds(0), output_type="pt").images for image in given
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=2e-2 if kind == "pixel" else 1e-5, rtol=0)


def test_a_larger_picture_is_scaled_and_latents_stay_what_they_are():
    pipe = make_pipeline("latent")
    large = Image.fromarray(np.full((40, 40, 3), 200, np.uint8))
    assert pipe.preprocess_image(large).shape == (1, 1, 16, 16)
    latents = torch.randn(2, 2, 8, 8)
    assert pipe.encode_images(pipe.preprocess_image(latents)) is latents


# -- inpainting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["pixel", "latent", "odd"])
def test_what_the_mask_keeps_is_kept_to_the_bit(kind, scheduler):
    pipe = make_pipeline(kind)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    image = picture(pipe)
    drawn = pipe(labels=[1], image=image, mask_image=mask_of(pipe, 5), generator=seeds(0), output_type="pt").images
    torch.testing.assert_close(drawn[..., 5:], image[..., 5:], atol=1e-6, rtol=0)
    assert (drawn[..., :5] - image[..., :5]).abs().mean() > 1e-2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_is_kept_is_as_noisy_as_the_unet_is_told(scheduler):
    pipe, seen = make_pipeline("pixel"), []
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    image, noise = picture(pipe), torch.randn(1, 1, 8, 8)
    options = {"mask_image": mask_of(pipe, 4), "num_inference_steps": 6, "generator": seeds(0)}
    pipe(labels=[1], image=image, latents=noise, **options)
    for sample, timestep in seen[1:]:  # the first step begins at pure noise
        ((alpha, sigma),) = pipe.noise_levels(timestep[None])
        expected = alpha * (image * 2 - 1) + sigma * noise
        torch.testing.assert_close(sample[..., 4:], expected[..., 4:], atol=1e-4, rtol=0)


def test_a_black_mask_keeps_all_and_a_white_one_nothing():
    pipe = make_pipeline("pixel")
    image, call = picture(pipe), {"labels": [1], "output_type": "pt"}
    nothing, everything = (mask_of(pipe, columns) for columns in (0, 8))
    kept = pipe(image=image, mask_image=nothing, generator=seeds(0), **call).images
    torch.testing.assert_close(kept, image)
    new = pipe(image=image, mask_image=everything, generator=seeds(0), **call).images
    torch.testing.assert_close(new, pipe(generator=seeds(0), **call).images)


def test_what_is_drawn_anew_looks_at_what_is_kept():
    """With the same noise, other surroundings make another picture."""
    pipe = make_pipeline("pixel")
    options = {"mask_image": mask_of(pipe, 4), "output_type": "pt"}
    one, other = (
        pipe(labels=[1], image=picture(pipe, seed=seed), generator=seeds(0), **options).images[..., :4]
        for seed in (3, 4)
    )
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["pixel", "latent"])
def test_masks_of_every_type_are_the_same_mask(kind):
    pipe = make_pipeline(kind)
    image, mask = picture(pipe), mask_of(pipe, 4)
    array = mask[0, 0].numpy()
    pil = Image.fromarray((array * 255).astype(np.uint8))
    drawn = [
        pipe(labels=[1], image=image, mask_image=one, generator=seeds(0), output_type="pt").images
        for one in (mask, mask[0], array, pil, pil.convert("RGB"), [mask[0]], mask > 0, array > 0, mask.long() * 255)
    ]
    for result in drawn[1:]:
        torch.testing.assert_close(result, drawn[0])


# -- interpolation ----------------------------------------------------------------------------------------------------


def test_slerp_goes_along_the_sphere():
    first, second = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    weights = torch.linspace(0, 1, 5)
    way = slerp(first, second, weights)
    torch.testing.assert_close(way[0], first)
    torch.testing.assert_close(way[-1], second)
    ends = torch.stack([first.norm(), second.norm()])
    norms = way.flatten(1).norm(dim=1)
    assert (norms >= ends.min() * 0.99).all() and (norms <= ends.max() * 1.01).all()  # of the line's middle: 0.7
    unit = slerp(torch.eye(3)[0], torch.eye(3)[2], weights)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(5))
    angles = torch.atan2(unit[:, 2], unit[:, 0])
    torch.testing.assert_close(angles, weights * torch.pi / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(slerp(first, torch.zeros_like(first), weights)[2], first / 2)


@pytest.mark.parametrize("scheduler", [None, DDPMScheduler])
def test_the_ends_of_a_way_are_pictures_of_their_own(scheduler):
    pipe = make_pipeline("tokens")
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    way = pipe.interpolate(["cat", "wild"], num_images=5, generator=seeds(0)[0], output_type="latent").images
    for place, label in ((0, "cat"), (-1, "wild")):  # one seed: the noise of all
        alone = pipe(labels=[label], generator=seeds(0), output_type="latent").images
        torch.testing.assert_close(way[place : place + 1 or None], alone, atol=1e-5, rtol=0)
    steps = (way[1:] - way[:-1]).flatten(1).norm(dim=1)
    assert steps.max() < (way[-1] - way[0]).norm()


@pytest.mark.parametrize("kind", ["latent", "unconditional"])
def test_a_way_between_seeds_ends_at_their_pictures(kind):
    pipe = make_pipeline(kind)
    labels = None if kind == "unconditional" else ["dog"]
    way = pipe.interpolate(labels, num_images=4, generator=seeds(0, 1), output_type="latent").images
    for place, seed in ((0, 0), (3, 1)):
        alone = pipe(labels=labels, generator=seeds(seed), output_type="latent").images
        torch.testing.assert_close(way[place : place + 1], alone, atol=1e-5, rtol=0)
    given = pipe.interpolate(labels, num_images=4, latents=torch.randn(2, *pipe._latent_shape()), output_type="latent")
    assert len(given.images) == 4


# -- inversion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, prediction_type",
    [(kind, form) for kind in ("latent", "unconditional") for form in ("v_prediction", "flow_prediction")],
)
def test_an_inverted_picture_is_drawn_again(kind, prediction_type):
    pipe = make_pipeline(kind, prediction_type)
    labels = None if kind == "unconditional" else [1, 2]
    image = picture(pipe, 2)
    clean = pipe.encode_images(image * 2 - 1).detach()
    errors = []
    for refinements in (0, 2, 6):
        noise = pipe.invert(image, labels, num_inference_steps=8, num_refinements=refinements)
        call = {"labels": labels, "num_images_per_prompt": 2 if labels is None else 1, "guidance_scale": 1.0}
        again = pipe(latents=noise, num_inference_steps=8, output_type="latent", **call).images
        errors.append(((again - clean).norm() / clean.norm()).item())
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.01


def test_inversion_is_of_deterministic_samplers():
    pipe = make_pipeline("pixel")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="invert runs DDIMScheduler backwards, not DDPMScheduler"):
        pipe.invert(picture(pipe), [1])
    pipe = make_pipeline("pixel")
    with pytest.raises(ValueError, match="num_refinements"):
        pipe.invert(picture(pipe), [1], num_refinements=-1)
    with pytest.raises(ValueError, match="one for each of 3 pictures"):
        pipe.invert(picture(pipe, 3), [1, 2])


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strength": 1.1}, r"strength must be a number in \[0, 1\], not 1.1"),
        ({"strength": -0.1}, "strength must be"),
        ({"strength": "0.5"}, "strength must be"),
        ({"strength": 0.1}, "strength=0.1 of 4 steps is less than one step; use a strength of at least 0.25, or more"),
        ({"image": None, "strength": 0.5}, "strength and mask_image need an image"),
        ({"image": None, "mask_image": torch.ones(1, 1, 8, 8)}, "strength and mask_image need an image"),
        ({"mask_image": torch.ones(1, 1, 4, 8)}, "mask_image is 4x8, but image is 8x8"),
        ({"mask_image": Image.new("L", (9, 8))}, "mask_image is 8x9, but image is 8x8"),
        ({"mask_image": torch.ones(1, 1, 8, 8) * 2.0}, r"mask_image holds values outside of \[0, 1\]"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "may name"),
        ({"mask_image": "mask.png"}, "must be a PIL image, an array or a tensor, not str"),
        ({"image": "picture.png"}, "image must be PIL images, arrays .* not str"),
        ({"image": []}, "image must be a picture or a list of them"),
        ({"image": torch.rand(1, 3, 8, 8)}, "image must have 1 channels, not 3"),
        ({"image": torch.full((1, 1, 8, 8), float("nan"))}, r"image holds values outside of \[0, 1\]"),
        ({"image": torch.rand(1, 1, 8, 8) * 2 - 1}, r"image holds values outside of \[0, 1\]"),
        ({"image": np.random.rand(1, 8, 8, 1) * 255}, r"image holds values outside of \[0, 1\]"),
        (
            {"image": torch.rand(3, 1, 8, 8), "labels": [0, 1]},
            "must be one for all or one for each picture, not 2 of l",
        ),
        ({"latents": torch.zeros(2, 1, 8, 8)}, r"latents must have the shape \(1, 1, 8, 8\)"),
        ({"generator": seeds(0, 1)}, "generator is a list of 2, but 1 pictures"),
    ],
)
def test_wrong_pictures_are_refused_before_the_first_step(arguments, message):
    pipe = make_pipeline("pixel")
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the UNet was called"))
    with pytest.raises(ValueError, match=message):
        pipe(**{"labels": [1], "image": picture(pipe), **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"labels": [0, 1, 2]}, "between two labels, or keeps one, not 3"),
        ({"generator": seeds(0, 1, 2)}, "between two generator, or keeps one, not 3"),
        ({"num_images": 1}, "num_images must be a whole number of at least 2"),
        ({"latents": torch.zeros(2, 1, 4, 4)}, r"latents must have the shape \(1 or 2, 1, 8, 8\), not \(2, 1, 4, 4\)"),
        ({"generator": 5}, "generator must be a torch.Generator or two of them, not 5"),
    ],
)
def test_ways_that_lead_nowhere_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline("pixel").interpolate(**{"labels": [1], **arguments})
