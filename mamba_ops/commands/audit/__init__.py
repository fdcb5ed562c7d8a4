"""`mamba-ops audit`: finds what is to be audited, here or in a child process, and shows or writes the report."""
