"""Images, sounds, and tiny random bases that read them, all made here."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}


def png(rng: np.random.Generator, label: int = 0) -> bytes:
    """Noise of some height, redder where the label is 1."""
    pixels = rng.integers(0, 120, (int(rng.integers(20, 50)), 40, 3)).astype(np.uint8)
    pixels[..., 0] += np.uint8(100 * label)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def tone(pitch: float, seconds: float, rate: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(samples,) half as loud as can be."""
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def wav(rng: np.random.Generator, pitch: float, rate: int = 16_000, channels: int = 1) -> bytes:
    """A tone with noise, 0.2 to 0.5 seconds of 16 bits."""
    clean = tone(pitch, float(rng.uniform(0.2, 0.5)), rate)
    samples = clean + rng.normal(0, 0.01, len(clean))
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.repeat(samples, channels) * 32_000).astype("<i2").tobytes())
    return stream.getvalue()


def write_vit(folder: Path) -> Path:
    """A random ViT and its processor as a base."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**TINY, image_size=32, patch_size=8)
    transformers.ViTModel(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_wav2vec2(folder: Path) -> Path:
    """A random Wav2Vec2 of places of 20 samples, and its feature extractor, as a base."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        **TINY,
        conv_dim=(16, 16),
        conv_stride=(10, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=16,
    )
    transformers.Wav2Vec2Model(config).save_pretrained(folder)
    reader: Any = transformers.Wav2Vec2FeatureExtractor
    reader().save_pretrained(folder)
    return folder


def write_ast(folder: Path) -> Path:
    """A random AST and its feature extractor as a base."""
    torch.manual_seed(0)
    config = transformers.ASTConfig(**TINY, max_length=60, num_mel_bins=32)
    transformers.ASTModel(config).save_pretrained(folder)
    reader: Any = transformers.ASTFeatureExtractor
    reader(max_length=60, num_mel_bins=32).save_pretrained(folder)
    return folder
