import sys
import types

import pytest
import torch
from transformers import ResNetConfig, ResNetModel

from hwdiffusion import InputError
from hwdiffusion.perceptual import FeatureLoss, build_perceptual_loss, laplacian_pyramid_loss


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (2, 9)])
def test_the_laplacian_loss_is_zero_if_and_only_if_the_pictures_are_equal(size):
    images = torch.rand(1, 1, *size)
    assert laplacian_pyramid_loss(images, images) == 0
    for row in range(size[0]):
        for column in range(size[1]):
            changed = images.clone()
            changed[0, 0, row, column] += 0.1
            assert laplacian_pyramid_loss(changed, images) > 1e-4


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (13, 29), (28, 28), (5, 64)])
def test_the_laplacian_loss_of_a_constant_difference_is_the_constant_at_any_size(size):
    images = torch.rand(2, 3, *size)
    assert laplacian_pyramid_loss(images + 0.25, images).item() == pytest.approx(0.25, rel=1e-5)
    assert laplacian_pyramid_loss(images - 0.25, images).item() == pytest.approx(0.25, rel=1e-5)


def test_the_laplacian_loss_is_a_norm_of_the_difference():
    torch.manual_seed(0)
    a, b, c = torch.rand(3, 2, 1, 13, 9).double()
    distance = laplacian_pyramid_loss
    assert distance(a, b).item() == pytest.approx(distance(b, a).item())
    assert distance(3 * a, 3 * b).item() == pytest.approx(3 * distance(a, b).item())
    assert distance(a, c) <= distance(a, b) + distance(b, c)


def feature_loss() -> FeatureLoss:
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return FeatureLoss(ResNetModel(config))


def test_the_feature_loss_teaches_the_picture_and_not_the_model():
    loss = feature_loss()
    before = {name: value.clone() for name, value in loss.model.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    reconstruction = torch.randn(2, 3, 32, 32, requires_grad=True)
    loss(reconstruction, images).backward()
    assert reconstruction.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in loss.model.parameters())
    assert loss(images, images) == 0 < loss(reconstruction, images)
    assert all(torch.equal(value, before[name]) for name, value in loss.model.state_dict().items())


def test_the_feature_loss_sees_gray_pictures_as_gray_in_color():
    loss = feature_loss()
    a, b = torch.randn(2, 2, 1, 32, 32)
    torch.testing.assert_close(loss(a, b), loss(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)))


# -- by name ----------------------------------------------------------------------------------------------------------


def test_without_a_name_it_is_the_laplacian_pyramid():
    assert build_perceptual_loss(None, (3, 8, 8)) is laplacian_pyramid_loss


def test_a_model_of_transformers_is_loaded_from_its_folder_and_frozen(tmp_path):
    feature_loss().model.save_pretrained(tmp_path)
    loss = build_perceptual_loss(str(tmp_path), (1, 32, 32))
    x, y = torch.rand(2, 2, 1, 32, 32)
    assert loss(x, x) == 0 < loss(x, y)
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_a_module_of_the_users_own_is_found_where_the_command_is_given(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "import torch\n"
        "class Weighted(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.weight = torch.nn.Parameter(torch.tensor(2.0))\n"
        "    def forward(self, x, y):\n"
        "        return self.weight * (x - y).abs().mean()\n"
        "def plain():\n"
        "    return lambda x, y: (x - y).square().mean()\n"
        "def nothing():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    x, y = torch.rand(2, 2, 3, 8, 8)
    weighted = build_perceptual_loss("my_losses:Weighted", (3, 8, 8))
    assert weighted(x, y) == 2 * (x - y).abs().mean() and not weighted.weight.requires_grad
    assert build_perceptual_loss("my_losses:plain", (3, 8, 8))(x, y) == (x - y).square().mean()
    assert sys.path == path
    for name, said in (
        ("my_losses:nothing", "gives a int, which can't be called"),
        ("my_losses:gone", "has no attribute 'gone'"),
        ("gone:Weighted", "No module named 'gone'"),
    ):
        with pytest.raises(InputError, match=f"--perceptual_model {name} can't be loaded: .*{said}"):
            build_perceptual_loss(name, (3, 8, 8))


def test_lpips_is_that_of_its_package_seen_in_three_channels(monkeypatch):
    """The package can't be had everywhere (its weights are downloaded), so one in its place shows how it is called."""

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "vgg"

        def forward(self, x, y):
            assert x.shape == y.shape == (len(x), 3, 8, 8)
            return (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    x, y = torch.rand(2, 2, 1, 8, 8)
    assert build_perceptual_loss("lpips", (1, 8, 8))(x, y).item() == pytest.approx((x - y).abs().mean().item())
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match="lpips can't be loaded: it needs `pip install lpips`"):
        build_perceptual_loss("lpips", (1, 8, 8))


def test_a_model_that_cannot_be_loaded_or_takes_other_channels_is_refused(tmp_path):
    with pytest.raises(
        InputError, match="^--perceptual_model .*gone can't be loaded: there is no such file or folder$"
    ):
        build_perceptual_loss(str(tmp_path / "gone"), (3, 8, 8))
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "gray")
    with pytest.raises(InputError, match="can't compare pictures of 3x32x32: "):
        build_perceptual_loss(str(tmp_path / "gray"), (3, 32, 32))


def test_a_loss_that_is_no_number_or_a_model_of_texts_is_refused(tmp_path, monkeypatch):
    from transformers import BertConfig, BertModel

    (tmp_path / "other_losses.py").write_text("def pixelwise():\n    return lambda x, y: (x - y).square()\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError,
        match="other_losses:pixelwise can't compare pictures of 1x2x2: it must give one number, .* not .1, 1, 2, 2.",
    ):
        build_perceptual_loss("other_losses:pixelwise", (1, 2, 2))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="bert can't compare pictures of 3x8x8"):
        build_perceptual_loss(str(tmp_path / "bert"), (3, 8, 8))
