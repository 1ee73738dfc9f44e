"""Memory of training in local modules: measured, planned, compared.

- `measure_step`: bytes of every module in a step of a `LocalTrainer`, on any device; under `FakeTensorMode`
  nothing runs;
- `LiveBytes`: bytes alive at any point of any program, by purpose;
- `make_plan`, `largest_batch`, `largest_image`: where to cut a network, and what fits into a budget;
- `compare`: ways to train the same network side by side.
"""

from infopro_fast import lazy

__getattr__, __dir__, __all__ = lazy.exports(__name__, __file__)
