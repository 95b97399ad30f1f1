"""What pictures are compared by: our own classifier, Inception, DINOv2.

An extractor takes uint8 pictures `(B, C, H, W)` of any size, gray or colour, and gives their features `(B, D)` and,
if it is a classifier of labels, probabilities `(B, K)`. Each does its own scaling, so that sources compare.
"""

import hashlib
from pathlib import Path

import torch

from hwdiffusion import InputError
from hwdiffusion.pipelines import scaled
from hwdiffusion.places import is_here


def load_extractor(name: str, source: str | None, device: torch.device | str = "cpu", flag: str = "--classifier"):
    """The extractor of that name.

    Args:
        name: classifier, inception or dinov2.
        source: a folder or Hub id of the classifier or the DINOv2, a file with the weights of Inception; `None` takes
            the standard one, which a classifier hasn't.
        flag: by which a classifier is given, for what is said of it.

    Raises:
        InputError: it can't be had.
    """
    if name == "classifier":
        if source is None:
            raise InputError("the extractor `classifier` needs --classifier FOLDER; train_classifier.py trains one")
        return ClassifierExtractor(source, device, flag)
    return {"inception": InceptionExtractor, "dinov2": DINOv2Extractor}[name](source, device)


def as_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Pictures `(B, C, H, W)` with 1 or 3 channels as pictures with 1 or 3 channels."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    luma = images.new_tensor([0.299, 0.587, 0.114])[:, None, None]  # as Pillow's mode L (ITU-R 601-2)
    return (images * luma).sum(dim=1, keepdim=True)


def load_classifier(source: str, flag: str = "--classifier"):
    """A network of `train_classifier.py`, in evaluation mode; InputError where a folder or Hub id holds none."""
    from transformers import ResNetForImageClassification

    if Path(source).is_file():
        raise InputError(f"{flag} {source} is a file; name a folder of train_classifier.py")
    if is_here(source, flag) and (Path(source) / "model_index.json").is_file():
        raise InputError(f"{flag} {source} is a pipeline, no classifier; name a folder of train_classifier.py")
    try:
        model = ResNetForImageClassification.from_pretrained(source).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{flag} {source} can't be loaded: {reason}") from error
    if not hasattr(model.config, "image_size") or not hasattr(model.config, "pretext"):
        raise InputError(f"{flag} {source} says nothing of its inputs; use one of train_classifier.py")
    return model


class ClassifierExtractor:
    """A classifier of `train_classifier.py`; the features are those before its last layer.

    Raises:
        InputError: the folder holds no such classifier, or one that sees noisy pictures or latents.
    """

    name = "classifier"

    def __init__(self, source: str, device="cpu", flag: str = "--classifier"):
        self.model = load_classifier(source, flag).to(device)
        config = self.model.config
        if config.noise_aware:
            raise InputError(f"{flag} {source} is trained on noisy pictures; metrics need a clean one")
        self.source, self.device = source, device
        self.dimension = config.hidden_sizes[-1]
        self.of_sets = config.problem_type == "multi_label_classification"
        # a network that only knows how a picture is turned can't judge labels
        self.class_names = (
            [config.id2label[k] for k in sorted(config.id2label)] if config.pretext == "labels" else None
        )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.model.config
        pictures = as_channels(images.to(self.device).float() / 127.5 - 1, config.num_channels)
        pooled = self.model.resnet(scaled(pictures, config.image_size)).pooler_output  # (B, D, 1, 1)
        if self.class_names is None:
            return pooled.flatten(1).cpu(), None
        logits = self.model.classifier(pooled).cpu()
        # each label by itself in float64, in which sure ones can still be told apart
        probabilities = logits.double().sigmoid() if self.of_sets else logits.softmax(dim=1)
        return pooled.flatten(1).cpu(), probabilities

    def describe(self) -> dict:
        config = self.model.config
        digest = hashlib.sha256()
        for _, tensor in sorted(self.model.state_dict().items()):
            digest.update(tensor.cpu().numpy().tobytes())
        return {
            "extractor": self.name,
            "model": Path(self.source).name,
            "weights_sha256": digest.hexdigest()[:16],
            "trained_on": config.trained_on,
            "pretext": config.pretext,
            "of_sets": self.of_sets,
            "test_accuracy": config.test_accuracy,
            "dimension": self.dimension,
        }


class InceptionExtractor:
    """The Inception-v3 that Fréchet distances are usually given by, as torch-fidelity computes it (extra `fid`)."""

    name, dimension, class_names = "inception", 2048, None

    def __init__(self, source: str | None = None, device="cpu"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise InputError('the extractor `inception` needs `pip install "hwdiffusion[fid]"`') from error
        try:
            # torch-fidelity would unpickle anything: only a file of nothing but tensors gets that far
            path = source
            if source is None:
                torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, weights_only=True, map_location="cpu")
                path = str(Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name))
            torch.load(path, weights_only=True, map_location="cpu")
            self.model = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path)
        except Exception as error:  # whatever the download or the file trips over
            reason = " ".join(str(error).split())[:200]
            where = "the standard weights" if source is None else source
            raise InputError(f"{where} of Inception can't be loaded, name a file of them: {reason}") from error
        self.model.to(device)
        self.source, self.device = source, device

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self.model(images.contiguous().to(self.device))[0].cpu(), None

    def describe(self) -> dict:
        weights = "standard" if self.source is None else Path(self.source).name
        return {"extractor": self.name, "model": weights, "dimension": self.dimension}


class DINOv2Extractor:
    """A DINOv2 of the Hub (Oquab et al. 2023); the features are those of its class token."""

    name, class_names = "dinov2", None

    def __init__(self, source: str | None = None, device="cpu"):
        from transformers import Dinov2Model

        self.source, self.device = source or "facebook/dinov2-small", device
        is_here(self.source, "DINOv2")
        try:
            self.model = Dinov2Model.from_pretrained(self.source).to(device).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"DINOv2 {self.source} can't be loaded: {reason}") from error
        self.dimension = self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        # the whole picture at 224x224 (its own processor would cut off the edges), ImageNet's mean and deviation
        pictures = scaled(as_channels(images.to(self.device).float() / 255, 3), (224, 224))
        mean = pictures.new_tensor([0.485, 0.456, 0.406])[:, None, None]
        deviation = pictures.new_tensor([0.229, 0.224, 0.225])[:, None, None]
        return self.model((pictures - mean) / deviation).pooler_output.cpu(), None

    def describe(self) -> dict:
        return {"extractor": self.name, "model": Path(self.source).name, "dimension": self.dimension}
