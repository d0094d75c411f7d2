"""Everything that torch has to know of the ops beside their kernels; to import it is to tell it."""

from . import compile, decompositions, fake, vmap  # noqa: F401
