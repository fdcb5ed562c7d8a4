"""`mamba-ops doctor`: what there is on this machine, what works, and what to do about the rest."""
