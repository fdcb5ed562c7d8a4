"""Functions and modules with the names and signatures of other libraries, which call the ops of this package."""

from mamba_ops.compat.installing import Installation as Installation
from mamba_ops.compat.installing import install as install
