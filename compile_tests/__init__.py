"""The Dynamo gate: one graph, no recompiles, no clones, swaps that hold, traces on devices that are not there."""
