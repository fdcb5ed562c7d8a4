"""The names and signatures of other libraries, over our ops: what was written for those runs on these."""
