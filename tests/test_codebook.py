import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from diffusers import VQModel
from sklearn.datasets import load_digits

from hwdiffusion.codebook import Codebook
from hwdiffusion.randomness import Draws


def tiny_vqvae(codes: int = 32) -> VQModel:
    torch.manual_seed(0)
    return VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=3,
        sample_size=8,
        num_vq_embeddings=codes,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def digits(count: int) -> torch.Tensor:
    images = torch.from_numpy(load_digits().images[:count]).float()
    return images[:, None] / 8 - 1  # (B, 1, 8, 8) in [-1, 1]


def vectors_of(latents: torch.Tensor) -> torch.Tensor:
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


def are_among(vectors: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return (vectors[:, None] == others[None]).all(dim=-1).any(dim=1)


def draws(step: int = 0, first: int = 0) -> Draws:
    return Draws(0, step, torch.arange(first, first + 4))


def with_dead_codes(codes: int = 32) -> tuple[VQModel, Codebook, torch.Tensor]:
    """A model and codebook that has seen a batch; only the first half of the codes is near enough to be chosen."""
    vqvae = tiny_vqvae(codes)
    codebook = Codebook(vqvae)
    images = digits(16)
    with torch.no_grad():
        codebook.start(vqvae.encode(images).latents, draws())
        vqvae.quantize.embedding.weight[codes // 2 :] += 1000
        vqvae(images)
        latents = vectors_of(vqvae.encode(images).latents)
    return vqvae, codebook, latents


@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_commitment_is_weighted_by_beta_on_the_side_of_the_encoder(beta):
    """van den Oord et al. 2017, eq. 3: the codebook's term has weight 1."""
    vqvae = tiny_vqvae()
    codebook = Codebook(vqvae, commitment_beta=beta)
    images = digits(4)
    codebook.start(vqvae.encode(images).latents, draws())
    latents = (vqvae.encode(images).latents + 0.1).detach().requires_grad_()
    loss = vqvae.decode(latents).commit_loss
    on_encoder, on_codes = torch.autograd.grad(loss, [latents, vqvae.quantize.embedding.weight])

    vectors, codes = vectors_of(latents.detach()), vqvae.quantize.embedding.weight.detach()
    chosen = torch.cdist(vectors, codes).argmin(dim=1)
    pull = 2 * (vectors - codes[chosen]) / vectors.numel()
    torch.testing.assert_close(vectors_of(on_encoder), beta * pull)
    torch.testing.assert_close(on_codes, torch.zeros_like(codes).index_add(0, chosen, -pull))


@pytest.mark.parametrize("codes", [32, 1000], ids=["fewer codes than latents", "more codes than latents"])
def test_codes_start_on_encoder_outputs(codes):
    vqvae = tiny_vqvae(codes)
    latents = vqvae.encode(digits(16)).latents.detach()
    Codebook(vqvae).start(latents, draws())
    started, vectors = vqvae.quantize.embedding.weight, vectors_of(latents)
    assert are_among(started, vectors).all()
    assert len(started.unique(dim=0)) == min(codes, len(vectors.unique(dim=0)))


def test_all_processes_start_with_the_same_codes_and_other_seeds_with_others():
    started = []
    for each in (draws(), draws(first=4), Draws(1, 0, torch.arange(4))):
        vqvae = tiny_vqvae()
        Codebook(vqvae).start(vqvae.encode(digits(16)).latents, each)
        started.append(vqvae.quantize.embedding.weight.detach())
    assert torch.equal(started[0], started[1])
    assert not torch.equal(started[0], started[2])


def test_restart_replaces_exactly_the_codes_that_were_not_chosen():
    vqvae, codebook, latents = with_dead_codes()
    chosen = torch.cdist(latents, codebook.vectors).argmin(dim=1).unique()
    dead = torch.ones(32, dtype=torch.bool)
    dead[chosen] = False
    before = codebook.vectors.detach().clone()
    assert codebook.restart(draws(1)) == dead.sum() >= 16
    after = codebook.vectors.detach()
    assert torch.equal(after[~dead], before[~dead])
    assert are_among(after[dead], latents).all()


def test_restart_clears_the_moments_of_the_replaced_codes_only():
    vqvae, codebook, _ = with_dead_codes()
    optimizer = torch.optim.AdamW(vqvae.parameters(), lr=0.0)
    codebook.vectors.grad = torch.ones_like(codebook.vectors)
    optimizer.step()
    moments = optimizer.state[codebook.vectors]
    before = {name: moments[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    dead = codebook.chosen() == 0
    codebook.restart(draws(1), optimizer)
    for name, moment in before.items():
        assert (moment != 0).all()
        assert (moments[name][dead] == 0).all()
        assert torch.equal(moments[name][~dead], moment[~dead])
    assert moments["step"] == 1


def test_without_dead_codes_nothing_is_restarted():
    vqvae, codebook, _ = with_dead_codes()
    codebook.counts += 1
    before = codebook.vectors.detach().clone()
    assert codebook.restart(draws(1)) == 0
    assert torch.equal(codebook.vectors, before)


def test_codes_that_another_process_chose_are_alive():
    vqvae, codebook, latents = with_dead_codes()
    ours = codebook.counts > 0
    theirs = torch.zeros(1, 32)
    theirs[0, 20:] = 1
    codebook.gather = lambda tensor: torch.cat([tensor, theirs if tensor.shape == (1, 32) else tensor])
    before = codebook.vectors.detach().clone()
    assert codebook.usage() == (ours | (theirs[0] > 0)).float().mean()
    codebook.restart(draws(1))
    assert torch.equal(codebook.vectors[20:], before[20:])
    assert are_among(codebook.vectors[16:20].detach(), latents).all()


def test_usage_and_perplexity_are_those_of_the_choices_since_the_last_reset():
    vqvae = tiny_vqvae()
    codebook = Codebook(vqvae)
    images = digits(48)
    codebook.start(vqvae.encode(images).latents, draws())
    vqvae(digits(60)[48:])
    codebook.reset()
    for batch in images.split(16):
        vqvae(batch)
    vectors = vectors_of(vqvae.encode(images).latents)
    counts = torch.bincount(torch.cdist(vectors, codebook.vectors).argmin(dim=1), minlength=32)
    assert codebook.usage() == (counts > 0).float().mean()
    assert codebook.perplexity() == pytest.approx(math.exp(scipy.stats.entropy(counts)), rel=1e-5)


@pytest.mark.parametrize("chosen", [1, 2, 7, 32])
def test_perplexity_of_evenly_chosen_codes_is_their_number(chosen):
    codebook = Codebook(tiny_vqvae())
    codebook.counts[:chosen] = 5
    assert codebook.perplexity() == pytest.approx(chosen, rel=1e-5)
    assert codebook.usage() == chosen / 32


def test_what_is_decoded_outside_of_training_is_not_counted():
    vqvae = tiny_vqvae()
    codebook = Codebook(vqvae)
    vqvae.eval()(digits(4))
    assert codebook.usage() == 0
    vqvae.train()(digits(4))
    assert codebook.chosen().sum() == 4 * 4 * 4


def usage_after_training_from_collapse(restart: bool) -> float:
    vqvae = tiny_vqvae(codes=64)
    codebook = Codebook(vqvae)
    vqvae.quantize.embedding.weight.data.fill_(0.1)
    optimizer = torch.optim.AdamW(vqvae.parameters(), lr=1e-3)
    for step, batch in enumerate(digits(640).split(32)):
        reconstruction, codebook_loss = vqvae(batch, return_dict=False)
        (F.mse_loss(reconstruction, batch) + codebook_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 5 == 0:
            usage = codebook.usage()
            if restart:
                codebook.restart(draws(step), optimizer)
            codebook.reset()
    return usage


def test_a_collapsed_codebook_recovers_by_restarts_and_not_without():
    assert usage_after_training_from_collapse(restart=False) < 0.1
    assert usage_after_training_from_collapse(restart=True) > 0.5


def test_a_model_that_was_watched_is_saved_as_a_plain_one(tmp_path):
    vqvae, codebook, _ = with_dead_codes()
    codebook.restart(draws(1))
    assert vqvae.state_dict().keys() == tiny_vqvae().state_dict().keys()
    assert vqvae.config == tiny_vqvae().config
    vqvae.eval().save_pretrained(tmp_path)
    loaded = VQModel.from_pretrained(tmp_path).eval()
    images = digits(4)
    with torch.no_grad():
        assert torch.equal(loaded(images).sample, vqvae(images).sample)


def test_counts_are_part_of_a_checkpoint_and_codes_are_not():
    _, codebook, _ = with_dead_codes()
    assert list(codebook.state_dict()) == ["counts"]
    assert list(codebook.parameters()) == []
    other = Codebook(tiny_vqvae())
    other.load_state_dict(codebook.state_dict())
    assert other.perplexity() == codebook.perplexity() > 1
