"""Training of networks in local modules."""

from infopro_fast import lazy

__getattr__, __dir__, __all__ = lazy.exports(__name__, __file__)
