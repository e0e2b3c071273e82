"""The terminal: the only package that imports rich. Results go to stdout, progress and messages to stderr.

Whoever prints imports the module it prints with, so that an answer at once does not wait for all of rich.
"""
