"""Tiny models and data for all tests. Nothing here needs the network or a GPU."""

import os
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reached for the network would fail here
# Tests run side by side, and tiny models gain nothing from threads: two of them on one core are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY_VQVAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 2,
    "num_vq_embeddings": 32,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
TINY_UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
TINY_GENERATOR = {"block_out_channels": [8, 16], "latent_dim": 8, "label_dim": 4, "norm_num_groups": 4}
TINY_CRITIC = {"block_out_channels": [8, 16]}
PROJECTION = {"class_embed_type": "simple_projection"}
TOKENS = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
    "encoder_hid_dim_type": "text_proj",
}


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data sets; tests that need it are skipped without."""
    folder = os.environ.get("HWDIFFUSION_DATA")
    if not folder:
        pytest.skip("HWDIFFUSION_DATA names no folder with real data")
    return Path(folder)


@pytest.fixture
def preset(tmp_path) -> str:
    """The path of the tiny preset."""
    from running import TINY_PRESET, write_preset

    return write_preset(tmp_path / "tiny.yaml", TINY_PRESET)
