"""Tests of ops and layers on several ranks, each a process that speaks gloo."""
