"""What `mamba-ops bench` measures: our ops beside the peers that are installed. `benchmarks/` shares its parts."""
