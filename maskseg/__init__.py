"""maskseg: a modular, pure-Python framework to train, evaluate and use Mask R-CNN-style models."""

__version__ = "0.1.0"
