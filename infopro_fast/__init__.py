"""infopro_fast: fused losses and a lean trainer for locally supervised deep learning (InfoPro, ICLR 2021).

>>> import infopro_fast
>>> net = infopro_fast.build("resnet32", modules=4)
>>> trainer = infopro_fast.LocalTrainer(net, infopro_fast.trainer.released_sgd(lr=0.1))
"""

from . import lazy

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy.exports(__name__, __file__)
