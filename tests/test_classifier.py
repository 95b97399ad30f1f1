"""train_classifier.py through its command line: what it learns, what it says of itself, how it is fed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from PIL import Image
from running import TINY_PRESET, write_preset
from sklearn.datasets import load_digits
from transformers import ResNetForImageClassification

from hwdiffusion import InputError
from hwdiffusion.data import load_data
from hwdiffusion.extractors import ClassifierExtractor, load_extractor
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.reference import data_arguments
from hwdiffusion.train_scripts import train_classifier, train_ddpm, train_vqgan
from hwdiffusion.train_scripts.train_classifier import moved


@pytest.fixture
def train(tmp_path):
    preset = write_preset(tmp_path / "tiny.yaml", {**TINY_PRESET, "resolution": 8, "max_train_steps": 2})

    def run(*flags):
        argv = ["--preset", preset, "--output_dir", str(tmp_path / "run"), *map(str, flags)]
        assert train_classifier.main(argv) == 0
        return tmp_path / "run"

    return run


def test_the_folder_is_a_stock_model_with_its_accuracy_in_the_card(train, tmp_path, capsys):
    run = train()
    model = ResNetForImageClassification.from_pretrained(run).eval()
    assert model.config.image_size == [16, 16] and model.config.num_channels == 1
    assert [model.config.id2label[k] for k in range(10)] == [str(k) for k in range(10)]
    # by hand, what the script measured: the tenth that was split off
    held_out = load_data(data_arguments("digits", [8, 8], "L")).validation
    images, labels = held_out[range(len(held_out))]
    inputs = F.interpolate(images.float() / 127.5 - 1, size=[16, 16], mode="bilinear", antialias=True)
    with torch.no_grad():
        right = model(pixel_values=inputs).logits.argmax(dim=1) == labels[:, 0]
    assert model.config.test_accuracy == pytest.approx(right.float().mean().item())
    assert f"**{model.config.test_accuracy:.4f}**" in (run / "README.md").read_text()
    assert "library_name: transformers" in (run / "README.md").read_text()


def test_the_extractor_gives_what_the_model_says(train):
    run = train()
    extractor = load_extractor("classifier", str(run))
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    features, probabilities = extractor(images)
    assert features.shape == (5, 16) == (5, extractor.dimension)
    inputs = F.interpolate(images.float() / 127.5 - 1, size=[16, 16], mode="bilinear", antialias=True)
    with torch.no_grad():
        output = extractor.model(pixel_values=inputs, output_hidden_states=True)
    torch.testing.assert_close(probabilities, output.logits.softmax(dim=1))
    torch.testing.assert_close(features, output.hidden_states[-1].mean(dim=(2, 3)))
    gray_in_colour = extractor(images.expand(-1, 3, -1, -1))[0]
    torch.testing.assert_close(gray_in_colour, features, rtol=1e-3, atol=1e-4)
    assert extractor.describe()["trained_on"].startswith("100 training and 180 validation pictures")


def test_pictures_without_labels_teach_the_rotations(train, tmp_path):
    for index, image in enumerate(load_digits().images[:60]):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).save(tmp_path / "flat" / f"{index}.png")
    run = train("--train_data_dir", tmp_path / "flat", "--max_train_samples", 40, "--resolution", 8, 12)
    extractor = ClassifierExtractor(str(run))
    assert extractor.class_names is None and extractor.model.config.pretext == "rotation"
    assert extractor.model.config.image_size == [24, 24]  # a square, which can be turned
    assert extractor(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))[1] is None
    assert extractor.describe()["pretext"] == "rotation"


def test_rotations_can_be_learned(tmp_path):
    argv = ["--pretext", "rotation", "--num_train_epochs", "12", "--output_dir", str(tmp_path / "run")]
    argv += ["--resolution", "8", "--classifier.hidden_sizes", "[16, 32]", "--classifier.depths", "[1, 1]"]
    assert train_classifier.main([*argv, "--classifier.embedding_size", "16"]) == 0
    config = ResNetForImageClassification.from_pretrained(tmp_path / "run").config
    assert config.test_accuracy > 0.7  # chance is 0.25; a 1 and a 0 look much the same upside down
    assert list(config.id2label.values()) == ["0°", "90°", "180°", "270°"]


def test_a_noise_aware_classifier_is_told_the_level_and_refused_for_metrics(train):
    run = train("--noise_aware")
    config = ResNetForImageClassification.from_pretrained(run).config
    assert config.num_channels == 2 and config.noise_aware and not config.latent
    assert "in the last channel the timestep" in (run / "README.md").read_text()
    with pytest.raises(InputError, match="trained on noisy pictures"):
        load_extractor("classifier", str(run))


def test_a_noise_aware_classifier_learns_on_latents(train, tmp_path):
    preset = write_preset(tmp_path / "vq.yaml", {**TINY_PRESET, "resolution": 8, "max_train_steps": 2})
    assert train_vqgan.main(["--preset", preset, "--output_dir", str(tmp_path / "vq")]) == 0
    run = train("--noise_aware", "--vqvae", tmp_path / "vq")
    config = ResNetForImageClassification.from_pretrained(run).config
    assert config.num_channels == 3 and config.latent and config.image_size == [8, 8]


@pytest.mark.parametrize("flow", [False, True])
def test_it_guides_the_pipeline_whose_noise_it_has_seen(train, flow, tmp_path):
    """Trained by the commands, given to the trained pipeline, saved with it."""
    noise = {"_class_name": "FlowMatchEulerDiscreteScheduler"} if flow else TINY_PRESET["noise_scheduler"]
    settings = {**TINY_PRESET, "noise_scheduler": noise, "resolution": 8, "max_train_steps": 2}
    preset = write_preset(tmp_path / "noise.yaml", settings)
    for script in (train_ddpm, train_classifier):
        flags = ["--noise_aware"] if script is train_classifier else []
        assert script.main(["--preset", preset, *flags, "--output_dir", str(tmp_path / script.__name__)]) == 0
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path / train_ddpm.__name__)
    assert pipe.config.prediction_type == ("flow_prediction" if flow else "v_prediction")
    pipe.classifier = ResNetForImageClassification.from_pretrained(tmp_path / train_classifier.__name__).eval()
    options = {"labels": [3], "num_inference_steps": 2, "output_type": "pt", "classifier_guidance_scale": 3.0}
    images = pipe(**options, generator=torch.Generator().manual_seed(0)).images
    pipe.save_pretrained(tmp_path / "guided")
    guided = ClassConditionalPipeline.from_pretrained(tmp_path / "guided")
    torch.testing.assert_close(guided(**options, generator=torch.Generator().manual_seed(0)).images, images)
    other = train("--noise_aware", "--noise_scheduler.num_train_timesteps", 500)  # with other noise
    pipe.classifier = ResNetForImageClassification.from_pretrained(other)
    with pytest.raises(ValueError, match="trained on another noise schedule"):
        pipe(**options)


def test_latents_are_scaled_as_sampling_scales_them(train, tmp_path, monkeypatch):
    preset = write_preset(tmp_path / "vq.yaml", {**TINY_PRESET, "resolution": 8, "max_train_steps": 2})
    assert train_vqgan.main(["--preset", preset, "--output_dir", str(tmp_path / "vq")]) == 0
    train("--noise_aware", "--vqvae", tmp_path / "vq", "--dry_run")
    assert not (tmp_path / "run").exists()
    seen, forward = [], ResNetForImageClassification.forward

    def spy(self, pixel_values):
        seen.append(pixel_values)
        return forward(self, pixel_values)

    monkeypatch.setattr(ResNetForImageClassification, "forward", spy)
    # without noise, what goes in are the latents times the factor in the autoencoder's config
    monkeypatch.setattr("diffusers.DDPMScheduler.add_noise", lambda self, sample, noise, timesteps: sample)
    vqvae = VQModel.from_pretrained(tmp_path / "vq")
    vqvae.register_to_config(scaling_factor=100 * vqvae.config.scaling_factor)
    vqvae.save_pretrained(tmp_path / "vq")
    train("--noise_aware", "--vqvae", tmp_path / "vq")
    assert 30 < seen[0][:, :-1].std() < 300


def test_pictures_are_moved_as_far_as_asked_and_no_farther():
    class Draws:
        def __init__(self, values):
            self.values = torch.tensor([values])

        def uniform(self, name, shape):
            return (self.values + 1) / 2

    image = torch.zeros(1, 1, 12, 12)
    image[..., 4, 6] = 1.0
    torch.testing.assert_close(moved(image, Draws([1.0, 1.0, 1.0, 1.0]), 0, 0, 0), image)
    right = moved(image, Draws([1.0, -1.0, 0.0, 0.0]), 0.25, 0, 0)  # the grid goes right, so the picture goes left
    assert right[0, 0].argmax() == (4 + 3) * 12 + 6 - 3
    turned = moved(image, Draws([0.0, 0.0, 1.0, 0.0]), 0, 90, 0)
    assert {turned[0, 0].argmax().item()} <= {torch.rot90(image, k, (-2, -1))[0, 0].argmax().item() for k in (1, 3)}


def test_what_can_not_be_a_classifier(tmp_path, capsys):
    def said(*flags) -> str:
        assert train_classifier.main(["--output_dir", str(tmp_path / "run"), *flags]) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    assert "an autoencoder is for --noise_aware" in said("--vae", "somewhere")
    assert "image_size in section classifier" in said("--classifier.image_size", "32")
    assert "must be square" in said("--pretext", "rotation", "--classifier.image_size", "[16, 32]")
    assert "did you mean hidden_sizes" in said("--classifier.hidden_size", "[8]")
    assert "makes no ResNetConfig" in said("--classifier.layer_type", "dense")
    (tmp_path / "one" / "cat").mkdir(parents=True)
    for index in range(20):
        Image.new("L", (8, 8)).save(tmp_path / "one" / "cat" / f"{index}.png")
    assert "fewer than two classes" in said("--train_data_dir", str(tmp_path / "one"), "--pretext", "none")
