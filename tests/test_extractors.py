import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from hwdiffusion import InputError
from hwdiffusion.extractors import as_channels, load_extractor, scaled
from hwdiffusion.metrics import FeatureStatistics, frechet_distance


def noise(*shape, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_gray_is_what_pillow_calls_gray():
    colour = noise(1, 3, 9, 7)
    pillow = np.asarray(Image.fromarray(colour[0].permute(1, 2, 0).numpy()).convert("L"))
    ours = as_channels(colour.float(), 1)[0, 0]
    assert (ours - torch.from_numpy(pillow.copy())).abs().max() <= 1
    assert torch.equal(as_channels(ours[None, None], 3)[:, 2], ours[None])


def test_scaling_down_averages_and_scaling_to_the_same_size_changes_nothing():
    images = noise(2, 1, 8, 8).float()
    assert scaled(images, (8, 8)) is images
    stripes = torch.tensor([0.0, 1.0]).repeat(8).expand(1, 1, 16, 16)
    small = scaled(stripes, (4, 4))
    assert (small[..., 1:3, 1:3] - 0.5).abs().max() < 0.05  # without anti-aliasing they would be 0 or 1


def test_dinov2_is_fed_as_its_own_processor_feeds_it(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    extractor = load_extractor("dinov2", str(tmp_path))
    images = noise(2, 1, 224, 224)
    features, probabilities = extractor(images)
    assert probabilities is None and extractor.dimension == 16 and extractor.describe()["model"] == tmp_path.name
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = (images.expand(-1, 3, -1, -1) / 255 - mean[:, None, None]) / deviation[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(features, model(inputs).last_hidden_state[:, 0], rtol=1e-4, atol=1e-4)
    assert extractor(noise(2, 3, 30, 20))[0].shape == (2, 16)
    with pytest.raises(InputError, match="DINOv2 .*nowhere can't be loaded: there is no such file or folder"):
        load_extractor("dinov2", str(tmp_path / "nowhere"))


def test_a_pipeline_is_no_classifier(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="--evaluation_classifier .* is a pipeline, no classifier; name a folder of"):
        load_extractor("classifier", str(tmp_path), flag="--evaluation_classifier")


def test_without_the_extra_inception_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match=r"pip install .hwdiffusion\[fid\]"):
        load_extractor("inception", None)


@pytest.fixture
def inception_weights(tmp_path, monkeypatch):
    """A file of Inception's weights, untrained: the trained ones can't be shipped."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = module.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with monkeypatch.context() as patched:
        patched.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patched.setattr(network, "load_state_dict", lambda self, state: None)
        torch.save(network("inception", ["2048"]).state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


def test_inception_gives_the_distance_that_torch_fidelity_gives(inception_weights, tmp_path):
    import torch_fidelity

    extractor = load_extractor("inception", str(inception_weights))
    sides = [noise(40, 3, 28, 28, seed=0), (noise(40, 3, 28, 28, seed=1).float() * 0.7).to(torch.uint8)]
    ours = frechet_distance(*(FeatureStatistics(2048).update(extractor(side)[0]) for side in sides))
    for name, side in zip("ab", sides):
        (tmp_path / name).mkdir()
        for index, image in enumerate(side):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{index:02d}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), fid=True, cuda=False, verbose=False, cache=False,
        feature_extractor_weights_path=str(inception_weights),
    )  # fmt: skip
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_no_code_in_a_file_of_weights_is_run(inception_weights, tmp_path):
    class Malice:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    torch.save(Malice(), tmp_path / "evil.pth")
    with pytest.raises(InputError, match="can't be loaded"):
        load_extractor("inception", str(tmp_path / "evil.pth"))
    assert not (tmp_path / "run").exists()
