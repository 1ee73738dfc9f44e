"""Triton's interpreter, quicker: what it works out anew for every operation of every program is worked out
once.

An operation on a small tile takes numpy a microsecond and the interpreter hundreds, most of them to describe
types: the numpy dtype of a dtype, the number of elements and the name of a block's type, a shape as
constants. All are functions of their arguments alone. What is computed stays the same; an interpreter that
has no such function any more is as quick as it is.
"""

from __future__ import annotations

import dataclasses

from triton.language import core
from triton.runtime import interpreter


def quicken() -> None:
    """In this process, for good."""
    # A third of the time, thrown away: without debug in the options nobody looks at what these checks find.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _remember_numpy_dtypes()
    _remember_blocks()
    _remember_shapes()
    _know_a_dtype_at_sight()
    _read_scalars()
    _replace_the_language_once_a_launch()


def _remember_numpy_dtypes() -> None:
    find, found = interpreter._get_np_dtype, {}

    def get(dtype):
        name = dtype.name  # a block's and a pointer's names have their elements' in them
        if name not in found:
            found[name] = find(dtype)
        return found[name]

    interpreter._get_np_dtype = get


def _remember_blocks() -> None:
    """What a block's type has beside its element: numbers and a name that depend on sizes."""
    make, made = core.block_type.__init__, {}

    def init(self, element_ty, shape):
        key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
        if key not in made:
            make(self, element_ty, shape)
            made[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        vars(self).update(made[key], element_ty=element_ty)

    core.block_type.__init__ = init


def _remember_shapes() -> None:
    make, made = core.tensor.__init__, {}

    def init(self, handle, type):
        sizes = type.shape if type.is_block() else ()
        if sizes not in made:
            make(self, handle, type)
            made[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = made[sizes]

    core.tensor.__init__ = init


def _know_a_dtype_at_sight() -> None:
    compare = core.dtype.__eq__
    core.dtype.__eq__ = lambda self, other: self is other or compare(self, other)


def _read_scalars() -> None:
    """Read a scalar, an array of one number, as int() of numpy 2.4 demands: Triton 3.6 does not."""
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index


def _replace_the_language_once_a_launch() -> None:
    """Not at every call of a device function from the same file, for which everything is replaced already."""
    launch, replace, replaced = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def call(self, *args, **kwargs):
        replaced.clear()
        return launch(self, *args, **kwargs)

    def replace_once(fn):
        file = id(fn.__globals__)
        if file in replaced:
            return None  # only a launch looks at it, to put everything back
        replaced.add(file)
        return replace(fn)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = call, replace_once
