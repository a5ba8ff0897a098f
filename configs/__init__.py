"""The configurations that ship with the package: `python train.py --config configs/NAME.py`."""
