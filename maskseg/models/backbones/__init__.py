"""Trunks and feature pyramids: normalized images -> features."""
