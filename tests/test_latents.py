import pytest
import torch
from diffusers import VQModel
from tiny import AUTOENCODERS, make_autoencoder

from hwdiffusion import latents as latents_module
from hwdiffusion.arguments import DataArguments
from hwdiffusion.data import load_data, to_model_range
from hwdiffusion.latents import (
    AT_ONCE,
    LatentDataset,
    cached_latents,
    centred,
    encode,
    encode_batches,
    encode_together,
    measure_scaling_factor,
    slice_size,
    standardised,
)
from hwdiffusion.pipelines import raw_latents, scale_latents


def tiny_vqvae(seed: int = 0) -> VQModel:
    """With latents and codes far from zero, as those of a trained one may be."""
    torch.manual_seed(seed)
    vqvae = VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=3,
        sample_size=8,
        num_vq_embeddings=32,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()
    shift = torch.tensor([2.0, -3.0, 0.5])
    with torch.no_grad():
        vqvae.quant_conv.weight *= torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
        vqvae.quant_conv.bias += shift
        vqvae.quantize.embedding.weight.normal_().add_(shift)
    return vqvae


@pytest.fixture(scope="module")
def dataset():
    args = DataArguments(dataset_name="digits", resolution=[8], image_mode="L", max_train_samples=50)
    args.seed = 0
    return load_data(args).train


def pictures(dataset) -> torch.Tensor:
    return to_model_range(dataset[range(len(dataset))][0])


@torch.no_grad()
def chosen_codes(vqvae: VQModel, images: torch.Tensor) -> torch.Tensor:
    return vqvae.quantize(vqvae.encode(images).latents)[2][2]


@torch.no_grad()
def test_centred_latents_reconstruct_the_same_pictures_by_the_same_codes(dataset):
    vqvae, images = tiny_vqvae(), pictures(dataset)
    moved = centred(vqvae, encode(vqvae, dataset, flips=False))
    assert len(chosen_codes(vqvae, images).unique()) > 5
    assert torch.equal(chosen_codes(moved, images), chosen_codes(vqvae, images))
    torch.testing.assert_close(moved(images).sample, vqvae(images).sample, rtol=0, atol=1e-5)
    # what a pipeline does: unquantised latents of the second stage, decoded
    latents = vqvae.encode(images).latents
    shift = latents - moved.encode(images).latents
    noisy = latents + 0.1
    torch.testing.assert_close(moved.decode(noisy - shift).sample, vqvae.decode(noisy).sample, rtol=0, atol=1e-5)


def test_centred_latents_have_mean_0_in_each_channel_and_scaled_variance_1(dataset):
    vqvae = tiny_vqvae()
    before = encode(vqvae, dataset, flips=True)
    assert before.mean(dim=(0, 1, 3, 4)).abs().max() > 1
    moved = centred(vqvae, before)
    latents = encode(moved, dataset, flips=True)
    assert latents.mean(dim=(0, 1, 3, 4)).abs().max() < 1e-5
    assert (latents * moved.config.scaling_factor).std().item() == pytest.approx(1, abs=1e-5)


def test_centred_leaves_the_trained_model_as_it_was(dataset):
    vqvae = tiny_vqvae()
    before = {name: value.clone() for name, value in vqvae.state_dict().items()}
    centred(vqvae, encode(vqvae, dataset, flips=False))
    assert all(torch.equal(value, before[name]) for name, value in vqvae.state_dict().items())
    assert vqvae.config.scaling_factor == tiny_vqvae().config.scaling_factor


def test_the_measured_scaling_factor_is_saved_with_the_model(dataset, tmp_path):
    vqvae = tiny_vqvae()
    moved = centred(vqvae, encode(vqvae, dataset, flips=False))
    moved.save_pretrained(tmp_path)
    saved = VQModel.from_pretrained(tmp_path).config.scaling_factor
    assert saved == moved.config.scaling_factor != vqvae.config.scaling_factor


def test_the_scaling_factor_takes_latents_to_unit_variance():
    latents = 7 * torch.randn(50, 2, 3, 4, 4) + 3
    assert (latents * measure_scaling_factor(latents)).std().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [16, 50, 256])
def test_all_pictures_are_encoded_in_their_order_plain_and_mirrored(dataset, batch_size):
    vqvae, images = tiny_vqvae(), pictures(dataset)
    latents = encode(vqvae, dataset, flips=True, batch_size=batch_size)
    assert latents.shape == (50, 2, 3, 4, 4)
    for view, expected in enumerate((images, images.flip(-1))):
        torch.testing.assert_close(latents[:, view], vqvae.encode(expected).latents, rtol=0, atol=1e-5)
    plain = encode(vqvae, dataset, flips=False, batch_size=batch_size)
    torch.testing.assert_close(plain, latents[:, :1], rtol=0, atol=1e-5)


def test_cached_latents_are_read_back_without_encoding_again(dataset, tmp_path, monkeypatch):
    path = tmp_path / "latents.safetensors"
    written = cached_latents(tiny_vqvae(), dataset, True, path)
    monkeypatch.delattr(latents_module, "encode")
    read = cached_latents(tiny_vqvae(), dataset, True, path)
    assert torch.equal(read.latents, written.latents)
    assert torch.equal(read.labels, dataset.labels)
    assert [file.name for file in tmp_path.iterdir()] == ["latents.safetensors"]


def test_latents_are_encoded_again_when_the_autoencoder_changed(dataset, tmp_path):
    path, vqvae = tmp_path / "latents.safetensors", tiny_vqvae()
    before = cached_latents(vqvae, dataset, False, path).latents
    with torch.no_grad():
        vqvae.encoder.conv_in.weight[0, 0, 0, 0] += 0.1
    after = cached_latents(vqvae, dataset, False, path).latents
    assert not torch.equal(after, before)
    assert torch.equal(after, encode(vqvae, dataset, False))
    assert torch.equal(cached_latents(vqvae, dataset, False, path).latents, after)


def test_latents_are_encoded_again_when_mirrored_ones_are_wanted_or_pictures_changed(dataset, tmp_path):
    path, vqvae = tmp_path / "latents.safetensors", tiny_vqvae()
    assert cached_latents(vqvae, dataset, False, path).latents.shape[1] == 1
    assert cached_latents(vqvae, dataset, True, path).latents.shape[1] == 2
    args = DataArguments(dataset_name="digits", resolution=[8], image_mode="L", max_train_samples=50)
    args.seed = 1
    other = load_data(args).train
    latents = cached_latents(vqvae, other, True, path)
    assert torch.equal(latents.latents, encode(vqvae, other, True))
    assert torch.equal(latents.labels, other.labels)


def test_a_latent_data_set_serves_batches_in_the_order_asked_for():
    latents, labels = torch.arange(10.0).reshape(5, 1, 2, 1, 1), torch.arange(5)[:, None]
    dataset = LatentDataset(latents, labels)
    batches = torch.utils.data.DataLoader(dataset, batch_sampler=[[3, 1], [4, 4]], collate_fn=lambda batch: batch)
    for (served, ids), order in zip(batches, ([3, 1], [4, 4])):
        assert torch.equal(served, latents[order]) and ids[:, 0].tolist() == order


# -- any autoencoder --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_standardised_latents_have_mean_0_and_variance_1_and_the_saved_autoencoder_says_how(name, dataset, tmp_path):
    given, images = make_autoencoder(name), pictures(dataset)
    latents = encode(given, dataset, flips=True)
    saved, moved = standardised(given, latents)
    ours = scale_latents(saved.config, latents - moved)
    assert ours.mean().abs() < 1e-4
    assert ours.std().item() == pytest.approx(1, abs=1e-4)

    # whoever loads it scales alike, and what was scaled is decoded as the given autoencoder decodes it
    saved.save_pretrained(tmp_path)
    loaded = type(saved).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(
        scale_latents(loaded.config, raw_latents(loaded, images)), ours[:, 0], rtol=0, atol=1e-4
    )
    shift = getattr(loaded.config, "shift_factor", None) or 0.0
    back = loaded.decode(ours[:, 0] / loaded.config.scaling_factor + shift).sample
    torch.testing.assert_close(back, make_autoencoder(name).decode(latents[:, 0]).sample, rtol=0, atol=1e-4)


def test_a_vqmodel_near_its_centre_is_left_as_it_is(dataset):
    vqvae = centred(tiny_vqvae(), encode(tiny_vqvae(), dataset, flips=False))
    saved, moved = standardised(vqvae, encode(vqvae, dataset, flips=True))
    assert saved is vqvae and moved.abs().max() == 0


def test_latents_of_an_autoencoder_kl_are_the_mean_of_its_posterior(dataset):
    vae, images = make_autoencoder("AutoencoderKL"), pictures(dataset)
    with torch.no_grad():
        assert torch.equal(raw_latents(vae, images), vae.encode(images).latent_dist.mean)


def test_without_a_shift_latents_are_scaled_alone():
    vae = make_autoencoder("AutoencoderKL")
    assert vae.config.shift_factor is None
    latents = torch.randn(2, 3, 4, 4)
    assert torch.equal(scale_latents(vae.config, latents), latents * vae.config.scaling_factor)


# -- slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, expected", [((8, 8), 256), ((64, 64), 256), ((128, 128), 64), ((512, 512), 4)])
def test_a_slice_has_fewer_pictures_the_larger_they_are(size, expected):
    assert slice_size(size) == expected
    assert slice_size((4096, 4096)) == 1


@torch.no_grad()
def test_pictures_are_encoded_in_slices_and_give_the_same_latents(dataset, monkeypatch):
    vqvae, seen = tiny_vqvae(), []
    whole = encode(vqvae, dataset, flips=False)[:, 0]
    encoded = VQModel.encode
    monkeypatch.setattr(VQModel, "encode", lambda self, x, **k: seen.append(len(x)) or encoded(self, x, **k))
    monkeypatch.setattr(latents_module, "AT_ONCE", 8 * 8 * 8)
    images = dataset[range(len(dataset))][0]
    for sliced in (
        encode(vqvae, dataset, flips=False)[:, 0],
        encode_together(vqvae, images),
        encode_batches(vqvae, images.split(20), flips=False)[:, 0],
    ):
        torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-5)
    assert AT_ONCE > 512 and max(seen) == 8 and sum(seen) == 150
