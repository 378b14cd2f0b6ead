"""Model cards of ILVR checkpoints."""

from .model_card import CARD_DATA, ILVRModelCard, Result


__all__ = ["CARD_DATA", "ILVRModelCard", "Result"]
