"""Functions with the names and signatures of other libraries, which call the ops of this package."""
