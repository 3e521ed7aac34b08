"""A mask head that also learns boundaries (Cheng et al., ECCV 2020)."""

from boundary_head.head import BoundaryHead

__all__ = ["BoundaryHead"]
