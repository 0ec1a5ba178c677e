"""Deliberate breakages of the package, as data: each must be caught by tests that ``make test`` runs.

A file ``ROOM.toml`` lists ``[[mutant]]`` tables: ``name`` (the wrong behaviour), ``file``, ``find`` (text that occurs
exactly once in it), ``replace`` and ``tests`` (node ids expected to fail). ``make mutants`` applies each to a copy of
the working tree and runs its tests; see :mod:`tests.mutants.__main__`.
"""
