"""Memory of training in local modules, measured and compared.

- `measure_step`: bytes of every module in a step of a `LocalTrainer`, on any device; under
  `planning.FakeTensorMode` nothing runs;
- `compare`: ways to train the same network side by side.
"""

from infopro_fast import lazy

__getattr__, __dir__, __all__ = lazy.exports(__name__, __file__)
