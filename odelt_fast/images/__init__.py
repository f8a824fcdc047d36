"""Readers of image and latent sources, for training and evaluation: `open_source`."""

from odelt_fast.images.digits import DigitsSource
from odelt_fast.images.encoded import EncodedImages
from odelt_fast.images.opening import is_latents, open_source
from odelt_fast.images.sources import ImageSource

__all__ = ["DigitsSource", "EncodedImages", "ImageSource", "is_latents", "open_source"]
