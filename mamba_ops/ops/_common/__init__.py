"""What several ops share: checks of arguments, slot tables, chunks, rounding, and the mixing ops' plans."""
