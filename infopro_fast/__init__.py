"""infopro_fast: fused losses and a lean trainer for locally supervised deep learning (InfoPro, ICLR 2021).

>>> import infopro_fast
>>> net = infopro_fast.build("resnet32", modules=4)
>>> trainer = infopro_fast.LocalTrainer(net, infopro_fast.trainer.released_sgd(lr=0.1))
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = ["LocalTrainer", "__version__", "build", "data", "modules", "ops", "trainer"]

if TYPE_CHECKING:
    from . import data, modules, ops, trainer
    from .modules.network import build
    from .trainer.step import LocalTrainer
else:
    # Imported at first use: `infopro_fast.ops` needs torch alone, and settings need no torch.
    import importlib

    _HOMES = {"build": "infopro_fast.modules.network", "LocalTrainer": "infopro_fast.trainer.step"}

    def __getattr__(name):
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        if name in __all__:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
