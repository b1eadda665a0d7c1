"""A tiny random SSACL model folder and synthetic films for tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ssacl.anatomy import FINDINGS
from ssacl.config import Config, parse_config
from ssacl.data.tokenization import train_tokenizers
from ssacl.models.ssacl import SSACL
from ssacl.training.checkpoint import load_model_folder, save_model_folder

REPORT = (
    "There is a moderate left pleural effusion. The heart is mildly enlarged. No pneumothorax. "
    "The right lung is clear. A right upper lobe nodule is seen. The bones are intact."
)


def tiny_config() -> Config:
    return parse_config(
        {
            "model": {
                "vision": {
                    "image_size_px": 64,
                    "patch_size_px": 8,
                    "width": 32,
                    "depth": 2,
                    "num_heads": 2,
                    "decoder_width": 32,
                    "decoder_depth": 1,
                    "decoder_num_heads": 2,
                },
                "text": {"width": 24, "depth": 1, "num_heads": 2, "ffn_width": 48, "vocab_size": 400},
                "language": {"width": 32, "depth": 2, "num_heads": 2, "vocab_size": 500, "max_positions": 256},
            }
        }
    )


def tiny_model_folder(folder: Path, stages: tuple[str, ...] = ("contrastive", "generation", "findings"), spoil: bool = False) -> Path:
    """Write a sealed model folder with random weights; `spoil` puts a not-a-number into them."""
    config = tiny_config()
    texts = [REPORT, ", ".join(FINDINGS), REPORT.upper().lower()] * 20
    tokenizers = train_tokenizers(texts, text_vocab_size=400, lm_vocab_size=500)
    torch.manual_seed(7)
    model = SSACL.from_config(config, tokenizers).eval()
    with torch.no_grad():
        # The weights below do not depend on how many parts the model has.
        torch.manual_seed(7)
        # Fresh weights are so small that every image looks alike and positions hardly matter.
        for name, value in model.named_parameters():
            if "wpe" in name or "wte" in name or name.startswith(("encoder", "findings_head", "opt_proj", "region")):
                value.add_(0.2 * torch.randn_like(value))
        if spoil:
            model.findings_head.somewhere.weight[0, 0] = float("nan")
    thresholds = dict.fromkeys(FINDINGS, 0.5)
    save_model_folder(folder, model, config, tokenizers, thresholds, {}, {"stages": list(stages)})
    return folder


def other_weights(folder: Path, other: Path) -> Path:
    """A copy of a model folder that is another version."""
    loaded = load_model_folder(folder)
    with torch.no_grad():
        for value in loaded.model.opt_proj.parameters():
            value.add_(0.5)
    save_model_folder(other, loaded.model, loaded.config, loaded.tokenizers, loaded.thresholds, {}, loaded.manifest["provenance"])
    return other


def film(width: int = 96, height: int = 128, seed: int = 0) -> np.ndarray:
    """[height, width] uint8: two dark fields in grey with noise; no two seeds alike."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    grey = np.full((height, width), 150.0)
    for centre in (0.3, 0.7):
        grey -= 90 * np.exp(-(((x - centre) / 0.15) ** 2 + ((y - 0.45 - 0.1 * random.random()) / 0.3) ** 2))
    return (grey + random.normal(0, 6 + 10 * random.random(), grey.shape)).clip(0, 255).astype(np.uint8)


def encoded_film(kind: str, width: int = 96, height: int = 128, seed: int = 0) -> bytes:
    """A film as a PNG, JPEG or DICOM file."""
    pixels = film(width, height, seed)
    buffer = io.BytesIO()
    if kind in ("PNG", "JPEG"):
        Image.fromarray(pixels).save(buffer, format=kind)
        return buffer.getvalue()
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.PatientName, ds.PatientID = "PLANTED^NAME", "PLANTED-ID"
    ds.Modality, ds.BodyPartExamined, ds.ViewPosition = "DX", "CHEST", "PA"
    ds.Rows, ds.Columns, ds.SamplesPerPixel = height, width, 1
    ds.PhotometricInterpretation, ds.PixelRepresentation = "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = pixels.tobytes()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()
