import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from diffusers import VQModel
from sklearn.datasets import load_digits

from hwdiffusion.arguments import VQGANArguments
from hwdiffusion.codebook import Codebook, advice, perplexity_of, rotated, whiten
from hwdiffusion.randomness import Draws
from hwdiffusion.train_scripts import train_vqgan


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


def usage_after_training_from_collapse(restart: bool, **options) -> float:
    vqvae = tiny_vqvae(codes=64)
    codebook = Codebook(vqvae, **options)
    vqvae.quantize.embedding.weight.data.fill_(0.1)
    optimizer = torch.optim.AdamW((weight for weight in vqvae.parameters() if weight.requires_grad), lr=1e-3)
    for step, batch in enumerate(digits(640).split(32)):
        reconstruction, codebook_loss = vqvae(batch, return_dict=False)
        (F.mse_loss(reconstruction, batch) + codebook_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        codebook.update()
        if (step + 1) % 5 == 0:
            usage = codebook.usage()
            if restart:
                codebook.restart(draws(step), optimizer)
            codebook.reset()
    return usage


@pytest.mark.parametrize(
    "options, without",
    [({}, 0.1), ({"rotation": True}, 0.1), ({"update": "ema", "ema_decay": 0.9}, 0.3)],  # averages help a little
    ids=str,
)
def test_a_collapsed_codebook_recovers_by_restarts_and_not_without(options, without):
    assert usage_after_training_from_collapse(restart=False, **options) < without
    assert usage_after_training_from_collapse(restart=True, **options) > 0.5


def test_more_dead_codes_than_latents_restart_on_the_latents_of_other_pictures():
    vqvae, codebook, _ = with_dead_codes(codes=1000)
    more = vqvae.encode(digits(200)[100:]).latents.detach()
    assert (codebook.chosen() == 0).sum() > 256  # those of 16 pictures
    dead = codebook.chosen() == 0
    codebook.restart(draws(1), more_latents=lambda: more)
    restarted = codebook.vectors.detach()[dead]
    assert are_among(restarted, vectors_of(more)).all()
    assert len(restarted.unique(dim=0)) == min(int(dead.sum()), len(vectors_of(more).unique(dim=0)))


def test_few_dead_codes_restart_on_the_last_batch_and_nothing_else_is_encoded():
    _, codebook, latents = with_dead_codes()
    codebook.restart(draws(1), more_latents=lambda: pytest.fail("encoded for nothing"))
    assert are_among(codebook.vectors.detach()[16:], latents).all()


# -- k-means ----------------------------------------------------------------------------------------------------------


def test_a_start_by_k_means_is_nearer_to_the_latents_than_a_drawn_one():
    errors = []
    for kmeans in (False, True):
        vqvae = tiny_vqvae()
        latents = vqvae.encode(digits(64)).latents.detach()
        codebook = Codebook(vqvae)
        codebook.start(latents, draws(), kmeans)
        errors.append(torch.cdist(vectors_of(latents), codebook.vectors).amin(dim=1).square().mean().item())
    assert errors[1] < 0.7 * errors[0]


def test_with_too_few_latents_for_clusters_codes_start_on_the_latents():
    vqvae = tiny_vqvae(codes=1000)
    latents = vqvae.encode(digits(16)).latents.detach()
    codebook = Codebook(vqvae)
    codebook.start(latents, draws(), kmeans=True)
    assert are_among(codebook.vectors.detach(), vectors_of(latents)).all()


# -- moving averages --------------------------------------------------------------------------------------------------


def test_a_moving_average_codebook_follows_the_papers_recursion():
    """van den Oord et al. 2017, eq. 6 to 8, of N and m that start at 1 and the code's first place."""
    vqvae = tiny_vqvae()
    codebook = Codebook(vqvae, update="ema", ema_decay=0.9)
    codebook.start(vqvae.encode(digits(16)).latents, draws())
    counts, sums = torch.ones(32), codebook.vectors.detach().clone()
    for batch in digits(64).split(16):
        codes = sums / counts[:, None]
        latents = vectors_of(vqvae.encode(batch).latents.detach())
        one_hot = F.one_hot(torch.cdist(latents, codes).argmin(dim=1), 32).float()
        for half in batch.split(8):  # two micro-batches are one step
            vqvae(half)
        codebook.update()
        counts, sums = 0.9 * counts + 0.1 * one_hot.sum(dim=0), 0.9 * sums + 0.1 * one_hot.T @ latents
        torch.testing.assert_close(codebook.vectors.detach(), sums / counts[:, None])


def test_the_optimizer_leaves_a_moving_average_codebook_alone_and_teaches_the_encoder_to_commit():
    vqvae = tiny_vqvae()
    codebook = Codebook(vqvae, update="ema")
    codebook.start(vqvae.encode(digits(16)).latents, draws())
    _, loss = vqvae(digits(32)[16:], return_dict=False)
    loss.backward()
    assert codebook.vectors.grad is None and not codebook.vectors.requires_grad
    assert vqvae.encoder.conv_in.weight.grad.abs().sum() > 0


def test_two_processes_average_as_one_that_sees_both_batches():
    batches = digits(32).split(16)
    alone = tiny_vqvae()
    one = Codebook(alone, update="ema", ema_decay=0.5)
    one.start(alone.encode(batches[0]).latents, draws())
    alone(torch.cat(batches))
    one.update()

    # the averages are the same on both processes, as what is gathered is
    vqvae, other = tiny_vqvae(), tiny_vqvae()
    ours, theirs = (Codebook(model, update="ema", ema_decay=0.5) for model in (vqvae, other))
    for codebook in (ours, theirs):
        codebook.start(vqvae.encode(batches[0]).latents, draws())
    vqvae(batches[0])
    other(batches[1])
    parts = [(codebook.batch_counts.clone(), codebook.batch_sums.clone()) for codebook in (ours, theirs)]
    for codebook in (ours, theirs):
        codebook.gather = lambda tensor: torch.stack([part[tensor.ndim - 2] for part in parts])
        codebook.update()
    for model in (vqvae, other):
        torch.testing.assert_close(model.quantize.embedding.weight, alone.quantize.embedding.weight)
    for name in ours.alike:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)) and getattr(ours, name).abs().sum() > 0


def test_latents_that_are_not_finite_teach_a_codebook_of_averages_nothing():
    vqvae = tiny_vqvae()
    codebook = Codebook(vqvae, update="ema")
    codebook.start(vqvae.encode(digits(16)).latents, draws())
    before = {name: tensor.clone() for name, tensor in vqvae.quantize.state_dict().items()}
    averages = {name: getattr(codebook, name).clone() for name in codebook.alike}
    broken = digits(32)[16:]
    broken[3, 0, 2, 2] = math.nan
    vqvae(broken)
    codebook.update()
    torch.testing.assert_close(dict(vqvae.quantize.state_dict()), before)
    for name, tensor in averages.items():
        assert torch.equal(getattr(codebook, name), tensor)
    vqvae(digits(32)[16:])
    codebook.update()
    assert codebook.vectors.isfinite().all() and not torch.equal(codebook.vectors, before["embedding.weight"])


def test_a_code_that_is_not_chosen_keeps_its_place_however_long():
    vqvae = tiny_vqvae()
    codebook = Codebook(vqvae, update="ema", ema_decay=0.5)
    codebook.start(vqvae.encode(digits(16)).latents, draws())
    place = torch.tensor([50.0, -60.0, 70.0])
    codebook._set(torch.arange(32) == 5, place[None])
    for _ in range(200):
        codebook.update()
        torch.testing.assert_close(codebook.vectors[5].detach(), place)


def test_restarted_codes_of_a_moving_average_codebook_stay_where_they_restarted():
    vqvae = tiny_vqvae()
    codebook = Codebook(vqvae, update="ema")
    with torch.no_grad():
        codebook.start(vqvae.encode(digits(16)).latents, draws())
        vqvae(digits(1))
    codebook.update()
    dead = codebook.chosen() == 0
    assert codebook.restart(draws(1)) == dead.sum() > 0
    restarted = codebook.vectors.detach()[dead].clone()
    codebook.update()
    torch.testing.assert_close(codebook.vectors.detach()[dead], restarted)


def test_averages_are_part_of_a_checkpoint():
    vqvae = tiny_vqvae()
    codebook = Codebook(vqvae, update="ema")
    codebook.start(vqvae.encode(digits(16)).latents, draws())
    vqvae(digits(16))
    codebook.update()
    assert set(codebook.state_dict()) == {"counts", "ema_counts", "ema_sums"} == {"counts", *codebook.alike}


# -- the rotation trick -----------------------------------------------------------------------------------------------


def test_rotated_latents_are_the_codes_and_gradients_turn_back_the_way_they_came():
    """Fifty et al. 2024: q = λRe with R orthogonal and Rê = q̂; so ∂/∂e = λRᵀ."""
    torch.manual_seed(0)
    latents, quantized = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    latents.requires_grad_()
    out = rotated(latents, quantized)
    torch.testing.assert_close(out, quantized)
    at = (1, slice(None), 2, 3)
    rows = [torch.autograd.grad(out[at][k], latents, retain_graph=True)[0][at] for k in range(4)]
    jacobian, e, q = torch.stack(rows), latents[at].detach(), quantized[at]
    rotation = jacobian * e.norm() / q.norm()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(torch.det(rotation), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(rotation @ e / e.norm(), q / q.norm())
    across = torch.linalg.qr(torch.stack([e, q, *torch.eye(4, dtype=torch.float64)[:2]], dim=1))[0][:, 2]
    torch.testing.assert_close(rotation @ across, across)  # nothing turns but the plane of e and q


def test_rotated_latents_that_are_zero_or_opposite_to_their_code_stay_finite():
    latents = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 0.0]]).T[None, :, None].requires_grad_()
    quantized = torch.tensor([[1.0, 1.0], [-1.0, -2.0], [0.0, 0.0]]).T[None, :, None]
    out = rotated(latents, quantized)
    assert torch.equal(out, quantized)
    out.square().sum().backward()
    assert latents.grad.isfinite().all()


@pytest.mark.parametrize("rotation", [False, True])
def test_the_rotation_trick_changes_what_the_encoder_learns_and_not_what_is_decoded(rotation):
    decoded, gradients = [], []
    for trick in (False, rotation):
        vqvae = tiny_vqvae()
        codebook = Codebook(vqvae, rotation=trick)
        codebook.start(vqvae.encode(digits(16)).latents, draws())
        reconstruction, _ = vqvae(digits(32)[16:], return_dict=False)
        reconstruction.square().mean().backward()
        decoded.append(reconstruction)
        gradients.append(vqvae.encoder.conv_in.weight.grad)
    torch.testing.assert_close(*decoded)
    assert torch.allclose(*gradients) is not rotation


# -- the entropy regulariser ------------------------------------------------------------------------------------------


def test_the_entropy_loss_is_lowest_where_every_latent_is_sure_and_all_codes_are_chosen_alike():
    codebook = Codebook(tiny_vqvae(codes=4))
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    codebook.vectors.data.copy_(corners)

    def loss_of(latents):
        codebook.latents = latents
        return codebook.entropy_loss(draws()).item()

    assert loss_of(corners.repeat(3, 1)) == pytest.approx(-math.log(4), abs=1e-4)
    assert loss_of(corners[:1].repeat(12, 1)) == pytest.approx(0, abs=1e-4)  # sure, but of one code
    assert loss_of(torch.full((12, 3), 0.25) + 0.0) > -1e-3  # between them all


def test_the_entropy_of_a_large_batch_is_taken_of_latents_from_all_over_its_pictures():
    codebook = Codebook(tiny_vqvae(codes=8))
    codebook.vectors.data.normal_()
    codebook.latents = torch.randn(4 * 32 * 32, 3, requires_grad=True)
    codebook.entropy_loss(draws()).backward()
    seen = (codebook.latents.grad != 0).any(dim=1).reshape(4, 32, 32)
    assert 900 < seen.sum() <= 1024
    assert seen.any(dim=(1, 2)).all() and seen.any(dim=(0, 2)).all() and seen.any(dim=(0, 1)).all()


def test_the_entropy_loss_pulls_apart_what_has_collapsed():
    vqvae = tiny_vqvae(codes=8)
    codebook = Codebook(vqvae)
    torch.manual_seed(0)
    codebook.vectors.data.normal_()
    optimizer = torch.optim.Adam([*vqvae.encoder.parameters(), *vqvae.quant_conv.parameters()], lr=1e-2)
    before = None
    for _ in range(12):
        vqvae(digits(64))
        before = before or codebook.usage()
        codebook.reset()
        loss = codebook.entropy_loss(draws())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vqvae(digits(64))
    assert codebook.usage() > before


# -- advice -----------------------------------------------------------------------------------------------------------


def test_advice_is_given_below_half_and_names_what_is_not_done_yet():
    args = VQGANArguments()
    assert advice(16, 32, args) is None
    said = advice(15, 32, args)
    assert (
        "use 15 codes where they could use 32" in said
        and "--codebook_restart_until 0.9" in said
        and "num_vq_embeddings 16" in said
    )
    args.codebook_restart_steps, args.codebook_update, args.entropy_weight = 0, "ema", 0.1
    said = advice(1, 32, args)
    assert "--codebook_restart_steps 100" in said and "--codebook_update" not in said and "entropy" not in said


def test_perplexity_of_counts():
    assert perplexity_of(torch.tensor([3.0, 3.0, 0.0, 3.0])) == pytest.approx(3)
    assert perplexity_of(torch.tensor([8.0, 0.0])) == pytest.approx(1)


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


# -- white latents ----------------------------------------------------------------------------------------------------


def test_white_latents_have_unit_variance_and_do_not_correlate_and_the_encoder_is_else_the_same():
    vqvae, images = tiny_vqvae(), digits(200)
    with torch.no_grad():  # two channels that nearly say the same
        vqvae.quant_conv.weight[1] = 3 * vqvae.quant_conv.weight[0] + 0.1 * vqvae.quant_conv.weight[1]
        before = vqvae.encode(images).latents
        whiten(vqvae, before)
        after = vectors_of(vqvae.encode(images).latents)
    torch.testing.assert_close(after.mean(dim=0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(after.T.cov(), torch.eye(3), atol=1e-2, rtol=0)
    # what they say is what they said: an affine function leads back
    vectors = vectors_of(before)
    back = torch.linalg.lstsq(torch.cat([after, torch.ones(len(after), 1)], dim=1), vectors).solution
    torch.testing.assert_close(torch.cat([after, torch.ones(len(after), 1)], dim=1) @ back, vectors, atol=1e-3, rtol=0)


@pytest.mark.parametrize("flat", [1, 3])
def test_latents_without_any_variance_in_some_directions_stay_finite(flat):
    vqvae, images = tiny_vqvae(), digits(50)
    with torch.no_grad():
        vqvae.quant_conv.weight[:flat] = 0
        whiten(vqvae, vqvae.encode(images).latents)
        assert vqvae.encode(images).latents.isfinite().all()


def test_one_channel_is_whitened_too():
    vqvae, images = VQModel(**{**tiny_vqvae().config, "latent_channels": 1, "vq_embed_dim": None}), digits(50)
    with torch.no_grad():
        whiten(vqvae, vqvae.encode(images).latents)
        after = vqvae.encode(images).latents
    torch.testing.assert_close(after.var(), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_a_run_with_white_latents_starts_its_codes_on_them(tmp_path, preset):
    argv = ["--preset", preset, "--max_train_steps", "1", "--learning_rate", "1e-9", "--use_ema", "false"]
    spreads = []
    for init in ("default", "white"):
        assert train_vqgan.main([*argv, "--latent_init", init, "--output_dir", str(tmp_path / init)]) == 0
        codes = VQModel.from_pretrained(tmp_path / init).quantize.embedding.weight.detach()
        spreads.append((codes.T.cov() - torch.eye(codes.shape[1])).abs().max())
    assert spreads[1] < 0.4 < spreads[0]
