"""Handwritten digits: a convolutional network that learns in seconds, so that no method is tuned to language models."""

from examples.digits.data import DigitsDataModule
from examples.digits.module import DigitsModule

__all__ = ["DigitsDataModule", "DigitsModule"]
