"""What an autoencoder gives back of the validation pictures: PSNR, SSIM, Fréchet distance, use of its codebook."""

import math

import torch
from accelerate.utils import gather
from diffusers import VQModel
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from hwdiffusion import InputError
from hwdiffusion.codebook import perplexity_of
from hwdiffusion.data import ImageDataset, to_model_range
from hwdiffusion.extractors import load_extractor
from hwdiffusion.latents import slice_size, turns
from hwdiffusion.metrics import FeatureStatistics, frechet_distance
from hwdiffusion.run_folder import current_processes


WINDOW = 11  # pixels, of SSIM: pictures of less than half of it have none
HIGHEST_PSNR = 10 * math.log10(255**2 * 12)  # of what differs by its rounding alone: 1/12, in mean square


class ReconstructionJudge:
    """Measures a `VQModel` on all pictures of a data set; the processes share the work.

    Args:
        dataset: the held-out pictures.
        classifier: a folder of train_classifier.py, whose features give a Fréchet distance; or `None`.

    Raises:
        InputError: the classifier can't be loaded, or has more features than there are pictures.
    """

    def __init__(self, dataset: ImageDataset, classifier: str | None = None):
        self.dataset = dataset
        self.extractor = None
        if classifier is not None:
            self.extractor = load_extractor(
                "classifier", classifier, current_processes().device, "--evaluation_classifier"
            )
            if len(dataset) <= self.extractor.dimension:
                raise InputError(
                    f"a Fréchet distance of {self.extractor.dimension} features needs at least "
                    f"{self.extractor.dimension + 1} validation pictures, but there are {len(dataset)}; leave "
                    "--evaluation_classifier out, or give more"
                )

    @torch.no_grad()
    def __call__(self, vqvae: VQModel) -> dict[str, float]:
        """Figures of reconstructions, rounded to 8 bits as they are saved.

        Returns:
            `eval_psnr` (dB, at most that of an error of the rounding alone, 58.9) and `eval_ssim` (Wang et al. 2004;
            not of tiny pictures), means over all; `eval_codebook_used`, how many codes they choose,
            `eval_codebook_possible`, how many they would if each latent chose any code alike, which is all of them
            where there are many latents, and `eval_codebook_perplexity`; with a classifier `eval_frechet_distance`,
            from the pictures to their reconstructions.
        """
        world_size = current_processes().num_processes
        figures, counts, done = [], torch.zeros(vqvae.quantize.n_e, device=vqvae.device), 0
        sides = None
        for places, own in turns(len(self.dataset), slice_size(self.dataset[[0]][0].shape[-2:])):
            images = self.dataset[places][0].to(vqvae.device)
            given_back, indices = reconstruct(vqvae, images)
            counts += torch.bincount(indices[:own].reshape(-1), minlength=len(counts)).to(counts)
            x, y = images.float(), given_back.float()
            psnr = peak_signal_noise_ratio(y, x, data_range=255.0, reduction="none", dim=(1, 2, 3))
            columns = [psnr.clamp(max=HIGHEST_PSNR)[:, None]]
            if min(x.shape[-2:]) > WINDOW // 2:
                ssim = structural_similarity_index_measure(
                    y, x, data_range=255.0, kernel_size=WINDOW, reduction="none"
                )
                columns.append(ssim.reshape(len(x), 1))
            extracted = [self.extractor(side)[0].to(psnr) for side in (images, given_back)] if self.extractor else []
            rows = torch.cat(columns + extracted, dim=1)
            rows = (gather(rows) if world_size > 1 else rows)[: len(self.dataset) - done].cpu()
            done += len(rows)
            figures.append(rows[:, : len(columns)].double())
            if self.extractor is not None:
                dimension = self.extractor.dimension
                sides = sides or [FeatureStatistics(dimension) for _ in range(2)]
                for side, features in zip(sides, rows[:, len(columns) :].split(dimension, dim=1)):
                    side.update(features)
        counts = gather(counts[None]).sum(dim=0) if world_size > 1 else counts
        means = torch.cat(figures).mean(dim=0).tolist()
        codes, choices = len(counts), done * indices[0].numel()
        measured = {
            **dict(zip(("eval_psnr", "eval_ssim"), means)),
            "eval_codebook_used": int((counts > 0).sum()),
            "eval_codebook_possible": round(codes * (1 - (1 - 1 / codes) ** choices)),
            "eval_codebook_perplexity": perplexity_of(counts),
        }
        if sides is not None:
            measured["eval_frechet_distance"] = frechet_distance(*sides)
        return measured


def reconstruct(vqvae: VQModel, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a `VQModel` gives back of uint8 pictures `(B, C, H, W)`, uint8 too, and the codes it chose, `(B, h·w)`."""
    latents = vqvae.encode(to_model_range(images)).latents
    indices = vqvae.quantize(latents)[2][2]
    pictures = vqvae.decode(latents).sample
    pictures = ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pictures, indices.reshape(len(images), -1)
