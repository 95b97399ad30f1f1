"""Classifier guidance, autoguidance and their mixing, against their equations."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from tiny import NAMES, PREDICTION_TYPES, make_classifier, make_pipeline, make_unet, seeds

from hwdiffusion.pipelines import classifier_inputs, label_tokens, predict_clean, unet_conditioning


def steps_of_a_call(pipe, **call) -> list[tuple]:
    """What the scheduler is given at each step: the model's output, the timestep, the sample."""
    given, step = [], pipe.scheduler.step

    def remember(model_output, t, sample, **kwargs):
        given.append((model_output.clone(), t, sample.clone()))
        return step(model_output, t, sample, **kwargs)

    remember.__signature__ = inspect.signature(step)
    pipe.scheduler.step = remember
    try:
        pipe(**call, output_type="latent")
    finally:
        del pipe.scheduler.step
    return given


def log_probability(classifier, sample, level, label):
    inputs = classifier_inputs(sample, torch.tensor([level]), classifier.config.image_size)
    return F.log_softmax(classifier(pixel_values=inputs).logits, dim=1)[0, label]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_classifier_guidance_moves_the_predicted_noise_by_the_gradient(prediction_type):
    """ε̂ - s σ ∇ log p(y | x), whatever it is that the UNet predicts (Dhariwal and Nichol 2021, algorithm 2)."""
    pipe, s = make_pipeline("pixel", prediction_type), 3.0
    pipe.classifier = make_classifier(pipe)
    noise = torch.randn(1, 1, 8, 8, generator=seeds(0)[0])
    call = {"labels": ["dog"], "latents": noise, "num_inference_steps": 4}
    # of the second step, as a flow's first is at pure noise, of which no classifier can know anything
    call["guidance_interval"] = (0.3, 0.4)
    plain, guided = (steps_of_a_call(pipe, **call, classifier_guidance_scale=w)[1] for w in (0.0, s))
    assert torch.equal(plain[2], guided[2])
    (plain, timestep, sample), (guided, _, _) = plain, guided
    ((alpha, sigma),) = pipe.noise_levels(timestep[None])
    x = sample.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_probability(pipe.classifier, x, float(timestep) / 1000, 1), x)
    assert gradient.abs().max() > 1e-6

    def predicted_noise(output):
        return (sample - alpha * predict_clean(output, sample, alpha, sigma, prediction_type)) / sigma

    moved = predicted_noise(guided) - predicted_noise(plain)
    torch.testing.assert_close(moved, -s * sigma * gradient, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_noise_levels_are_those_of_the_training(prediction_type):
    pipe = make_pipeline("pixel", prediction_type)
    timesteps = torch.tensor([999, 500, 250, 1])
    clean, noise = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    for timestep, (alpha, sigma) in zip(timesteps, pipe.noise_levels(timesteps)):
        if prediction_type == "flow_prediction":
            expected = (1 - timestep / 1000) * clean + timestep / 1000 * noise
        else:
            expected = pipe.scheduler.add_noise(clean, noise, timestep[None])
        torch.testing.assert_close(alpha * clean + sigma * noise, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["pixel", "latent"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_classifier_guidance_makes_the_classifier_surer(kind, guidance_scale):
    """At the last and least noisy step, and alone or on top of classifier-free guidance."""
    pipe = make_pipeline(kind)
    pipe.classifier = make_classifier(pipe)
    for label in NAMES:
        surer = []
        for scale in (0.0, 20.0):
            options = {"guidance_scale": guidance_scale, "classifier_guidance_scale": scale}
            latents = pipe(labels=[label], generator=seeds(0), output_type="latent", **options).images
            surer.append(log_probability(pipe.classifier, latents, 0.0, label).item())
        assert surer[1] > surer[0]


def test_a_classifier_of_sets_guides_by_each_of_its_labels():
    """The gradient is that of Σ log σ(logit) over the labels of the set, which are asked for together."""
    pipe = make_pipeline("tokens", "epsilon", max_labels=3)
    pipe.classifier = make_classifier(pipe, problem_type="multi_label_classification")
    noise = torch.randn(1, 1, 8, 8, generator=seeds(0)[0])
    call = {"labels": [["wild", "cat"]], "latents": noise, "num_inference_steps": 4, "guidance_interval": (0.3, 0.4)}
    plain, guided = (steps_of_a_call(pipe, **call, classifier_guidance_scale=w)[1] for w in (0.0, 3.0))
    (plain, timestep, sample), (guided, _, _) = plain, guided
    ((_, sigma),) = pipe.noise_levels(timestep[None])
    x = sample.clone().requires_grad_()
    inputs = classifier_inputs(x, torch.tensor([float(timestep) / 1000]), pipe.classifier.config.image_size)
    logits = pipe.classifier(pixel_values=inputs).logits[0]
    (gradient,) = torch.autograd.grad(logits[[0, 2]].sigmoid().log().sum(), x)
    assert gradient.abs().max() > 1e-6
    torch.testing.assert_close(guided - plain, -3 * sigma * gradient, rtol=2e-3, atol=1e-6)


def test_a_guided_picture_belongs_to_its_generator():
    pipe = make_pipeline("latent")
    pipe.classifier = make_classifier(pipe)
    pipe.guidance_unet = make_unet("latent", (2, 8, 8), seed=1)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    options = {"guidance_scale": 2.0, "classifier_guidance_scale": 5.0, "output_type": "latent"}
    together = pipe(labels=[0, 1, 2], generator=seeds(5, 6, 7), **options).images
    alone = pipe(labels=[1], generator=seeds(6), **options).images
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)


def test_the_null_label_asks_the_classifier_for_nothing():
    pipe = make_pipeline("pixel")
    pipe.classifier = make_classifier(pipe)
    one, other = (
        pipe(labels=[None, 1], generator=seeds(0, 1), classifier_guidance_scale=scale, output_type="latent").images
        for scale in (0.0, 9.0)
    )
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


def test_a_classifier_gives_labels_to_an_unconditional_model():
    pipe = make_pipeline("unconditional")
    with pytest.raises(ValueError, match="unconditional"):
        pipe(labels=["cat"])
    pipe.classifier = make_classifier(pipe)
    assert pipe.num_classes == 3 and pipe.id2label == NAMES
    for refused in ({"classifier_guidance_scale": 0.0}, {"classifier_guidance_scale": 0}):
        with pytest.raises(ValueError, match="act by classifier_guidance_scale alone, which is 0"):
            pipe(labels=["cat"], **refused)
    with pytest.raises(ValueError, match="act by classifier_guidance_scale alone, which is 0"):
        pipe.invert(torch.zeros(1, 1, 8, 8), ["cat"])
    default, one = (
        pipe(labels=["cat"], generator=seeds(0), output_type="latent", **scale).images
        for scale in ({}, {"classifier_guidance_scale": 1.0})
    )
    assert torch.equal(default, one)
    with pytest.raises(ValueError, match="classifier_guidance_scale=2.0 needs labels"):
        pipe(classifier_guidance_scale=2.0)
    cat, dog = (
        pipe(labels=[name], classifier_guidance_scale=20.0, generator=seeds(0), output_type="latent").images
        for name in ("cat", "dog")
    )
    assert not torch.equal(cat, dog)


def test_guidance_works_inside_of_inference_mode():
    pipe = make_pipeline("pixel")
    pipe.classifier = make_classifier(pipe)
    options = {"labels": [1], "classifier_guidance_scale": 5.0, "output_type": "latent"}
    expected = pipe(**options, generator=seeds(0)).images
    with torch.inference_mode():
        torch.testing.assert_close(pipe(**options, generator=seeds(0)).images, expected)


def test_autoguidance_is_its_equation():
    """weak + w (cond - weak), both of the same label (Karras et al. 2024, eq. 1)."""
    pipe, w = make_pipeline("pixel"), 2.5
    pipe.guidance_unet = make_unet("pixel", seed=1)
    noise = torch.randn(1, 1, 8, 8)
    call = {"labels": [1], "latents": noise, "num_inference_steps": 2, "guidance_scale": w}
    (guided, timestep, _), *_ = steps_of_a_call(pipe, **call)
    with torch.no_grad():
        tokens = label_tokens(torch.tensor([[1]]), 3)
        cond, weak = (
            unet(noise, timestep, **unet_conditioning(unet.config, tokens)).sample
            for unet in (pipe.unet, pipe.guidance_unet)
        )
    torch.testing.assert_close(guided, weak + w * (cond - weak))


@pytest.mark.parametrize("kind", ["pixel", "unconditional"])
def test_autoguidance_needs_no_null_label_and_by_the_same_model_is_none(kind):
    pipe = make_pipeline(kind, **({} if kind == "unconditional" else {"has_null_label": False}))
    labels = None if kind == "unconditional" else [1]
    run = lambda scale: pipe(labels, guidance_scale=scale, generator=seeds(0), output_type="latent").images  # noqa: E731
    with pytest.raises(ValueError, match="guidance_unet"):
        run(2.0)
    pipe.guidance_unet = pipe.unet
    torch.testing.assert_close(run(2.0), run(1.0))
    pipe.guidance_unet = make_unet(kind, seed=1)
    assert (run(2.0) - run(1.0)).abs().max() > 1e-3


def test_only_steps_inside_of_the_interval_pay_for_guidance():
    pipe = make_pipeline("pixel")
    pipe.guidance_unet, pipe.classifier = make_unet("pixel", seed=1), make_classifier(pipe)
    calls = {"unet": 0, "guidance_unet": 0, "classifier": 0}
    for name in calls:
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    pipe(
        labels=[1],
        num_inference_steps=10,
        guidance_scale=2.0,
        classifier_guidance_scale=1.0,
        guidance_interval=(0, 0.35),
    )
    # the first step, at pure noise, has nothing for a classifier to see
    assert calls == {"unet": 10, "guidance_unet": 4, "classifier": 3}


BIRDS = {0: "hen", 1: "duck", 2: "goose"}


@pytest.mark.parametrize(
    "contract, names, message",
    [
        ({}, {0: "cat", 1: "dog"}, "the classifier knows the 2 classes cat, dog, but the pipeline the 3 classes cat"),
        ({}, BIRDS, "the classifier knows the 3 classes hen, duck, goose, but the pipeline"),
        (
            {"num_channels": 4},
            NAMES,
            "sees pixels of 3 channels and the noise level, but the pipeline works on pixels of 1",
        ),
        ({"latent": True}, NAMES, "sees latents of 1 channels and the noise level, but the pipeline works on pixels"),
        ({"noise_aware": False}, NAMES, "has not seen noisy samples"),
        ({"noise_schedule": {"flow": True}}, NAMES, "was trained on another noise schedule"),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused(contract, names, message):
    pipe = make_pipeline("pixel")
    pipe.classifier = make_classifier(pipe, names, **contract)
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the UNet was called"))
    with pytest.raises(ValueError, match=message):
        pipe(labels=[1], classifier_guidance_scale=1.0)


def test_a_classifier_in_training_mode_is_refused():
    """It would normalise the pictures of a batch by each other, and change itself."""
    pipe = make_pipeline("pixel")
    pipe.classifier = make_classifier(pipe).train()
    with pytest.raises(ValueError, match="in training mode"):
        pipe(labels=[1], classifier_guidance_scale=1.0)


def test_guidance_without_its_model_or_with_another_is_refused():
    pipe = make_pipeline("pixel")
    with pytest.raises(ValueError, match="needs a classifier; train one by train_classifier.py --noise_aware"):
        pipe(labels=[1], classifier_guidance_scale=1.0)
    with pytest.raises(ValueError, match="classifier_guidance_scale must be a number of at least 0, not -1"):
        pipe(labels=[1], classifier_guidance_scale=-1)
    pipe.guidance_unet = make_unet("pixel", (2, 8, 8))
    with pytest.raises(ValueError, match="guidance_unet .* its in_channels is 2, not 1"):
        pipe(labels=[1], guidance_scale=2.0)
    pipe.guidance_unet = make_unet("unconditional")
    with pytest.raises(ValueError, match="guidance_unet .* its number of classes is 0, not 3"):
        pipe(labels=[1], guidance_scale=2.0)


# -- a guidance for each label of a set -------------------------------------------------------------------------------


def sets_pipeline(**config):
    return make_pipeline("tokens", max_labels=3, **config)


SETS = {"labels": [["cat"], ["dog", "wild"]], "num_inference_steps": 4}


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_equal_guidance_of_all_labels_is_guidance(scale):
    pipe, noise = sets_pipeline(), torch.randn(2, 1, 8, 8, generator=seeds(0)[0])
    call = {**SETS, "latents": noise, "guidance_scale": scale, "output_type": "latent"}
    plain = pipe(**call).images
    same = pipe(**call, label_guidance_scale=[[scale], [scale, scale]]).images
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)
    other = pipe(**call, label_guidance_scale=[[scale], [scale + 3, scale]]).images
    torch.testing.assert_close(other[0], plain[0], rtol=1e-4, atol=1e-5)  # the first picture's is as it was
    assert (other[1] - plain[1]).abs().max() > 1e-3


def test_the_guidance_of_a_label_weighs_what_leaving_it_out_changes():
    pipe, noise = sets_pipeline(), torch.randn(1, 1, 8, 8, generator=seeds(0)[0])
    call = {"labels": [["dog", "cat", "wild"]], "latents": noise, "num_inference_steps": 4, "guidance_scale": 2.0}
    output, timestep, sample = steps_of_a_call(pipe, **call, label_guidance_scale=[[2.0, 5.0, 0.0]])[0]

    def predicted(*ids):
        tokens = label_tokens(torch.tensor([[*ids, -1, -1, -1][:3]]), 3)
        with torch.no_grad():
            return pipe.unet(sample, timestep, **unet_conditioning(pipe.unet.config, tokens)).sample

    null, cond = predicted(), predicted(1, 0, 2)
    expected = null + 2 * (cond - null) + 3 * (cond - predicted(1, -1, 2)) - 2 * (cond - predicted(1, 0))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_empty_sets_have_no_label_to_guide():
    pipe, noise = sets_pipeline(), torch.randn(1, 1, 8, 8, generator=seeds(0)[0])
    call = {"latents": noise, "num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
    guided = pipe(labels=[[]], label_guidance_scale=[[]], **call).images
    assert torch.equal(guided, pipe(labels=[[]], **call).images)


def test_the_guidance_of_labels_goes_with_them_whatever_their_order():
    pipe, noise = sets_pipeline(), torch.randn(2, 1, 8, 8, generator=seeds(0)[0])
    call = {"latents": noise, "num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
    one = pipe(labels=[["dog", "wild"]], num_images_per_prompt=2, label_guidance_scale=[[1.0, 4.0]], **call).images
    other = pipe(labels=[["wild", "dog"]] * 2, label_guidance_scale=torch.tensor([[4.0, 1.0]] * 2), **call).images
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "weights, said",
    [
        ([[1.0]], "has 1 entries, but there are labels of 2"),
        ([[1.0], [1.0]], r"label_guidance_scale\[1\] has 1 numbers for 2 labels"),
        ([[1.0], [1.0, -1.0]], r"label_guidance_scale\[1\] must hold numbers of at least 0, not \[1.0, -1.0\]"),
        ([[1.0], [1.0, "2"]], "must hold numbers of at least 0"),
        (3.0, "has 1 entries"),
    ],
)
def test_guidance_of_labels_that_does_not_fit_is_refused(weights, said):
    with pytest.raises(ValueError, match=said):
        sets_pipeline()(**SETS, label_guidance_scale=weights)


def test_guidance_of_labels_needs_labels_that_were_dropped_in_training():
    with pytest.raises(ValueError, match="needs labels, and a UNet that was trained with label dropout"):
        sets_pipeline(has_null_label=False)(**SETS, label_guidance_scale=[[1.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="needs labels"):
        make_pipeline("unconditional")(label_guidance_scale=[[1.0]])
    pipe = sets_pipeline()
    pipe.guidance_unet = make_unet("tokens", seed=1)
    with pytest.raises(ValueError, match="contrasts labels, not models; give the pipeline no guidance_unet"):
        pipe(**SETS, label_guidance_scale=[[1.0], [1.0, 1.0]])
