"""infopro_fast: fused losses and a lean trainer for locally supervised deep learning (InfoPro, ICLR 2021)."""

__version__ = "0.1.0"
