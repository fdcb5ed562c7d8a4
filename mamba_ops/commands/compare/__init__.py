"""One model on several backends, as the public function `mamba_ops.compare` and as a subcommand."""
