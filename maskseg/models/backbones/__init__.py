"""Trunks and feature pyramids: normalised images -> features."""
