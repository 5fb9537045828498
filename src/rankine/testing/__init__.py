"""The contract that every method is held to, importable, for methods of any package:

    pytest --pyargs rankine.testing --rankine-method my_svd

runs it on a method by name. For a table of your own knobs subclass `suite.MethodChecks` with a
`row` fixture, as tests/methods/ does here. Needs pytest; everything runs on tiny seeded models.
"""
