"""Model cards of ILVR checkpoints."""

from .model_card import ILVRModelCard, Result


__all__ = ["ILVRModelCard", "Result"]
