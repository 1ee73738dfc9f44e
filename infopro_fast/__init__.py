"""infopro_fast: fused losses and a lean trainer for locally supervised deep learning (InfoPro, ICLR 2021).

>>> import infopro_fast
>>> net = infopro_fast.build("resnet32", modules=4)
>>> trainer = infopro_fast.LocalTrainer(net, infopro_fast.trainer.released_sgd(lr=0.1))
"""

import importlib

__version__ = "0.1.0"

# Imported at first use, so that `import infopro_fast.ops` needs torch alone.
_HOMES = {"build": "infopro_fast.modules.network", "LocalTrainer": "infopro_fast.trainer.step"}
_PACKAGES = ("data", "modules", "ops", "trainer")

__all__ = ["LocalTrainer", "__version__", "build", "ops"]


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOMES, *_PACKAGES})
