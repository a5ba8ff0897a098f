"""configs/folder.py on images, and with networks, that are small enough for a rehearsal on a CPU."""

import runpy
from dataclasses import replace
from pathlib import Path

_folder = runpy.run_path(str(Path(__file__).resolve().parents[2] / "configs" / "folder.py"))["config"]
_model = _folder.model

config = replace(
    _folder,
    model=replace(
        _model,
        image=replace(_model.image, short_side=64, long_side=96),
        backbone=replace(_model.backbone, width=8),
        rpn=replace(_model.rpn, channels=16, anchors_per_image=32),
        train_proposals=replace(_model.train_proposals, pre_nms_top_n=64, post_nms_top_n=16),
        test_proposals=replace(_model.test_proposals, pre_nms_top_n=64, post_nms_top_n=16),
        roi_sampling=replace(_model.roi_sampling, rois_per_image=16),
    ),
)
