import pytest
import torch
import torch.nn.functional as F

from hwdiffusion.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss


def discriminator(in_channels: int = 1, num_layers: int = 2) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(in_channels, channels=16, num_layers=num_layers)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_pictures_logits_do_not_depend_on_its_batch(num_layers):
    model = discriminator(3, num_layers).train()
    images = torch.randn(6, 3, 32, 32)
    images[3:] *= 10
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    assert together.std() > 1e-3
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_each_layer_halves_the_patches_and_all_weights_learn(num_layers, size):
    model = discriminator(1, num_layers)
    logits = model(torch.randn(2, 1, *size))
    assert logits.shape == (2, 1, *(side // 2**num_layers for side in size))
    logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_hinge_losses_have_their_values():
    real, fake = torch.tensor([2.0, 0.5, -1.0, 1.0]), torch.tensor([-2.0, 0.0, 1.0, -1.0])
    assert discriminator_loss(real, fake).item() == 0.5 * ((0.5 + 2.0) / 4 + (1.0 + 2.0) / 4)
    assert generator_loss(fake).item() == 0.5


def test_the_discriminator_learns_from_what_is_inside_the_margin_only_and_the_generator_from_all():
    real = torch.tensor([3.0, 0.5], requires_grad=True)
    fake = torch.tensor([-3.0, -0.5], requires_grad=True)
    discriminator_loss(real, fake).backward()
    assert real.grad.tolist() == [0.0, -0.25] and fake.grad.tolist() == [0.0, 0.25]
    fake.grad = None
    generator_loss(fake).backward()
    assert fake.grad.tolist() == [-0.5, -0.5]


def losses() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A reconstruction loss and an adversarial one of a last layer, with gradients far above the 1e-4 of eq. 7."""
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(4, 1, 3, padding=1)
    ).double()
    images = decoder(torch.randn(4, 2, 16, 16).double())
    adversarial = -1e4 * discriminator().double()(images).mean()
    return 1e3 * F.mse_loss(images, torch.ones_like(images)), adversarial, decoder[2].weight


def norm_of_gradient(loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    weight.grad = None
    loss.backward(retain_graph=True)
    return weight.grad.square().sum().sqrt()


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_norms():
    reconstruction, adversarial, weight = losses()
    ours = adaptive_weight(reconstruction, adversarial, weight, largest=1e9)
    expected = norm_of_gradient(reconstruction, weight) / norm_of_gradient(adversarial, weight)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not ours.requires_grad


def test_the_adaptive_weight_takes_out_the_scale_of_both_losses():
    reconstruction, adversarial, weight = losses()
    plain = adaptive_weight(reconstruction, adversarial, weight, largest=1e9).item()
    assert adaptive_weight(3 * reconstruction, adversarial, weight, largest=1e9).item() == pytest.approx(3 * plain)
    halved = adaptive_weight(reconstruction, 2 * adversarial, weight, largest=1e9).item()
    assert halved == pytest.approx(plain / 2, rel=1e-5)


def test_the_adaptive_weight_leaves_the_graph_and_other_gradients_alone():
    reconstruction, adversarial, weight = losses()
    adaptive_weight(reconstruction, adversarial, weight)
    assert weight.grad is None
    (reconstruction + adversarial).backward()
    assert weight.grad.isfinite().all()


def test_the_adaptive_weight_is_bounded_where_the_adversarial_gradient_vanishes():
    reconstruction, adversarial, weight = losses()
    assert adaptive_weight(reconstruction, 0 * adversarial, weight, largest=7.0).item() == 7.0


def test_the_adaptive_weight_is_that_of_the_gradients_averaged_over_processes():
    reconstruction, adversarial, weight = losses()
    seen = []

    def reduce(gradient):
        seen.append(gradient)
        return torch.full_like(gradient, float(len(seen)))

    ours = adaptive_weight(reconstruction, adversarial, weight, reduce)
    assert [gradient.shape for gradient in seen] == [weight.shape] * 2
    assert ours.item() == pytest.approx(1 / 2, rel=1e-4)
