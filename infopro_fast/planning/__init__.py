"""Cut a network where it fits: bytes of its blocks, measured without running them, and the best split.

- `build`: a network in local modules, cut as told, as published, or as planned;
- `plan`, `largest_batch`, `largest_image`: where to cut a network, and what fits into a budget;
- `LiveBytes`: bytes alive at any point of any program, by purpose.
"""

from infopro_fast import lazy

__getattr__, __dir__, __all__ = lazy.exports(__name__, __file__)
