"""The rule that makes weights instead of storing them, as tests/golden/README.md states it; needs NumPy only."""

import zlib

import numpy as np

GAINS = (  # the first part of a name that occurs in the key
    ("fpn.inner_blocks", 1.0),
    ("fpn.layer_blocks", 1.0),
    ("rpn.head.cls_logits", 0.6),
    ("rpn.head.bbox_pred", 0.2),
    ("box_predictor.cls_score", 2.0),
    ("box_predictor.bbox_pred", 0.7),
    ("RCNN_rpn.RPN_cls_score", 1.5),
    ("RCNN_rpn.RPN_bbox_pred", 0.2),
    ("RCNN_cls_score", 2.0),
    ("RCNN_bbox_pred", 0.7),
    ("RCNN_base.0.weight", 1.4142135 / 60),
)


def rule_weight(key: str, shape: list[int], salt: int) -> np.ndarray:
    noise = np.random.default_rng([zlib.crc32(key.encode()), salt]).standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        return np.float32(1) + np.float32(0.1) * np.abs(noise)
    if key.endswith("running_mean"):
        return np.float32(0.1) * noise
    if key.endswith("bias"):
        return np.float32(0.05) * noise
    if len(shape) == 1:
        scale = np.float32(0.25 if key.endswith("bn3.weight") else 1.0)
        return scale * (np.float32(1) + np.float32(0.1) * noise)
    gain = next((value for part, value in GAINS if part in key), 1.4142135)
    return noise * np.float32(gain / np.sqrt(np.prod(shape[1:])))
