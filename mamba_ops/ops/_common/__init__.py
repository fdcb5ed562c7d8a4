"""What several ops share: checks of arguments, slot tables, chunk layouts, rounding, plans, inputs for samples."""
