"""ConvNeXt as a trunk (Liu et al., "A ConvNet for the 2020s", CVPR 2022)."""

from convnext_trunk.trunk import ConvNeXt

__all__ = ["ConvNeXt"]
