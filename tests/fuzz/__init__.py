"""Random calls, legal and not, of all that users call: each is right, or ends in a sentence with nothing written.

`python -m tests.fuzz --count 20000` makes many and prints a table of how they ended.
"""
