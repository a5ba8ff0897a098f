"""The configurations that come with the package: `python train.py --config configs/NAME.py`."""
