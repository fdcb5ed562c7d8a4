"""What an inference engine needs around the mixing ops."""

from mamba_ops.serving.plan import Plan as Plan
