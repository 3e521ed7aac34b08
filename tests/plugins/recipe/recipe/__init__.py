"""An optimizer, a schedule, and an adapter for the photometric transforms of albumentations."""

from recipe.lion import Lion
from recipe.photometric import Photometric
from recipe.schedule import polynomial

__all__ = ["Lion", "Photometric", "polynomial"]
