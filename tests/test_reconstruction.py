import math

import pytest
import torch
from tiny import NAMES
from torch import nn

from hwdiffusion import InputError
from hwdiffusion.arguments import DataArguments
from hwdiffusion.codebook import Codebook
from hwdiffusion.data import load_data, to_model_range
from hwdiffusion.models import build_classifier, build_vqvae
from hwdiffusion.randomness import Draws
from hwdiffusion.reconstruction import ReconstructionJudge, reconstruct


VQVAE = {"block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
         "latent_channels": 3, "num_vq_embeddings": 64, "norm_num_groups": 4}  # fmt: skip


@pytest.fixture(scope="module")
def dataset():
    args = DataArguments(dataset_name="digits", resolution=[16], image_mode="L", max_train_samples=150)
    args.seed = 0
    return load_data(args).train


@pytest.fixture
def vqvae():
    torch.manual_seed(0)
    vqvae = build_vqvae(VQVAE, 1, (16, 16)).eval()
    vqvae.quantize.embedding.weight.data.normal_()
    return vqvae


class Identity(nn.Module):
    """Gives pictures back as they are, or with something done to them; every pixel is a latent."""

    device = torch.device("cpu")

    def __init__(self, change=lambda pictures: pictures):
        super().__init__()
        self.quantize, self.change = nn.Module(), change
        self.quantize.n_e = 5

    def encode(self, pictures):
        return type("Encoded", (), {"latents": pictures})

    def decode(self, latents):
        return type("Decoded", (), {"sample": self.change(latents)})


def with_codes(model: Identity, codes) -> Identity:
    model.quantize.forward = lambda latents: (latents, None, (None, None, codes(latents).reshape(-1)))
    return model


@torch.no_grad()
def test_reconstructions_are_those_of_the_models_own_forward_pass(dataset, vqvae):
    images = dataset[range(20)][0]
    pictures, indices = reconstruct(vqvae, images)
    sample = vqvae(to_model_range(images)).sample
    assert (pictures - ((sample + 1) * 127.5).clamp(0, 255)).abs().max() <= 0.5
    latents = vqvae.encode(to_model_range(images)).latents.permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.equal(indices.reshape(-1), torch.cdist(latents, vqvae.quantize.embedding.weight).argmin(dim=1))


def test_psnr_and_ssim_are_means_over_the_pictures_by_their_formulas(dataset):
    moved = with_codes(Identity(lambda x: x * 0.5), lambda latents: torch.zeros(latents.numel()).long())
    measured = ReconstructionJudge(dataset)(moved)
    x = dataset.images.double()
    y = ((to_model_range(dataset.images) * 0.5 + 1) * 127.5).round().double()
    errors = (x - y).square().mean(dim=(1, 2, 3))
    assert measured["eval_psnr"] == pytest.approx((10 * torch.log10(255**2 / errors)).mean().item(), rel=1e-5)

    # SSIM (Wang et al. 2004, eq. 13) by windows written out
    offsets = torch.arange(-5, 6).double()
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(window, window)[None, None] / window.sum() ** 2

    def blurred(images):
        return nn.functional.conv2d(nn.functional.pad(images, (5, 5, 5, 5), mode="reflect"), window)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = blurred(x), blurred(y)
    vx, vy, cxy = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
    ssim = (2 * mx * my + c1) * (2 * cxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert measured["eval_ssim"] == pytest.approx(ssim.mean().item(), rel=1e-3)


def test_codes_are_counted_over_the_whole_data_set(dataset):
    brightest = dataset.images.max().item()
    model = with_codes(Identity(lambda x: x * 0.9), lambda latents: (latents > 0.99).long() + 2)
    measured = ReconstructionJudge(dataset)(model)
    share = (to_model_range(dataset.images) > 0.99).double().mean().item()
    assert brightest == 255 and 0 < share < 1
    assert measured["eval_codebook_used"] == 2 and measured["eval_codebook_possible"] == 5
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert measured["eval_codebook_perplexity"] == pytest.approx(math.exp(entropy), rel=1e-5)


def test_few_latents_could_choose_fewer_codes_than_there_are(dataset, vqvae):
    one = dataset.subset(torch.arange(1).numpy())
    torch.manual_seed(0)
    vqvae.quantize.n_e, vqvae.quantize.embedding = 1000, nn.Embedding(1000, 3)
    chosen = [len(torch.randint(1000, (256,)).unique()) for _ in range(200)]
    possible = ReconstructionJudge(one)(vqvae)["eval_codebook_possible"]
    assert possible == pytest.approx(sum(chosen) / 200, rel=0.01)


def test_perfect_pictures_have_the_psnr_of_their_rounding_and_not_an_infinite_one(dataset):
    perfect = with_codes(Identity(), lambda latents: torch.zeros(latents.numel()).long())
    measured = ReconstructionJudge(dataset)(perfect)
    assert measured["eval_psnr"] == pytest.approx(58.92, abs=0.01)
    assert measured["eval_ssim"] == pytest.approx(1, abs=1e-5)


def test_what_is_measured_counts_for_nothing_in_training(dataset, vqvae):
    codebook = Codebook(vqvae)
    codebook.start(vqvae.encode(to_model_range(dataset[range(8)][0])).latents, Draws(0, 0, torch.zeros(1)))
    ReconstructionJudge(dataset)(vqvae)
    assert codebook.chosen().sum() == 0


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    section = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    contract = {"pretext": "labels", "noise_aware": False, "trained_on": "noise", "test_accuracy": None}
    folder = tmp_path_factory.mktemp("classifier")
    build_classifier(section, 1, (16, 16), list(NAMES.values()), **contract).save_pretrained(folder)
    return str(folder)


def test_the_frechet_distance_is_nothing_for_perfect_pictures_and_grows_with_their_faults(dataset, classifier):
    distances = []
    for strength in (0.0, 0.1, 0.5):
        blurred = with_codes(
            Identity(lambda x, strength=strength: x + strength * (nn.functional.avg_pool2d(x, 5, 1, 2) - x)),
            lambda latents: torch.zeros(latents.numel()).long(),
        )
        distances.append(ReconstructionJudge(dataset, classifier)(blurred)["eval_frechet_distance"])
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert 1e-6 < distances[1] < distances[2]


def test_too_few_pictures_for_a_frechet_distance_are_refused(dataset, classifier):
    few = dataset.subset(torch.arange(16).numpy())
    with pytest.raises(InputError, match="needs at least 17 validation pictures, but there are 16"):
        ReconstructionJudge(few, classifier)
    with pytest.raises(InputError, match="--evaluation_classifier gone can't be loaded"):
        ReconstructionJudge(few, "gone")
