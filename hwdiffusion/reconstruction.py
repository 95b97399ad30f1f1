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
from hwdiffusion.latents import slice_size
from hwdiffusion.metrics import FeatureStatistics, frechet_distance
from hwdiffusion.run_folder import current_processes


WINDOW = 11  # pixels, of SSIM: pictures of less than half of it have none


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
            self.extractor = load_extractor("classifier", classifier, current_processes().device)
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
            `eval_psnr` (dB) and `eval_ssim` (Wang et al. 2004; not of tiny pictures), means over all;
            `eval_codebook_used`, how many codes they choose, `eval_codebook_possible`, how many they could (all, or as
            many as they have latents), `eval_codebook_perplexity`; with a classifier `eval_frechet_distance`, from
            the pictures to their reconstructions.
        """
        processes = current_processes()
        rank, world_size = processes.process_index, processes.num_processes
        size = slice_size(self.dataset[[0]][0].shape[-2:])
        figures, counts, vectors = [], torch.zeros(vqvae.quantize.n_e, device=vqvae.device), 0
        sides = None
        for start in range(0, len(self.dataset), size * world_size):
            # every process has a whole batch, so that the gathering lines up; the surplus counts for nothing
            first = start + rank * size
            places = torch.arange(first, first + size)
            own = min(size, max(0, len(self.dataset) - first))
            images = self.dataset[places.clamp(max=len(self.dataset) - 1)][0].to(vqvae.device)
            given_back, indices = reconstruct(vqvae, images)
            counts += torch.bincount(indices[:own].reshape(-1), minlength=len(counts)).to(counts)
            x, y = images.float(), given_back.float()
            psnr = peak_signal_noise_ratio(y, x, data_range=255.0, reduction="none", dim=(1, 2, 3))
            ssim = torch.full_like(psnr, torch.nan)
            if min(x.shape[-2:]) > WINDOW // 2:
                ssim = structural_similarity_index_measure(
                    y, x, data_range=255.0, kernel_size=WINDOW, reduction="none"
                )
            columns = [psnr[:, None], ssim.reshape(size, 1)]
            if self.extractor is not None:
                columns += [self.extractor(side)[0].to(psnr) for side in (images, given_back)]
            rows = torch.cat(columns, dim=1)
            rows = (gather(rows) if world_size > 1 else rows)[: len(self.dataset) - start].cpu()
            figures.append(rows[:, :2].double())
            vectors += len(rows) * indices[0].numel()
            if self.extractor is not None:
                dimension = self.extractor.dimension
                sides = sides or [FeatureStatistics(dimension) for _ in range(2)]
                for side, features in zip(sides, rows[:, 2:].split(dimension, dim=1)):
                    side.update(features)
        counts = gather(counts[None]).sum(dim=0) if world_size > 1 else counts
        psnr, ssim = torch.cat(figures).mean(dim=0).tolist()
        measured = {
            "eval_psnr": psnr,
            **({} if math.isnan(ssim) else {"eval_ssim": ssim}),
            "eval_codebook_used": int((counts > 0).sum()),
            "eval_codebook_possible": min(len(counts), vectors),
            "eval_codebook_perplexity": perplexity_of(counts),
        }
        if sides is not None:
            measured["eval_frechet_distance"] = frechet_distance(*sides)
        return measured


def reconstruct(vqvae: VQModel, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a `VQModel` gives back of uint8 pictures `(B, C, H, W)`, uint8 too, and the codes it chose, `(B, h·w)`."""
    latents = vqvae.encode(to_model_range(images)).latents
    quantized, _, (_, _, indices) = vqvae.quantize(latents)
    pictures = vqvae.decode(quantized, force_not_quantize=True).sample
    pictures = ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pictures, indices.reshape(len(images), -1)
