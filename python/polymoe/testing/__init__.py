"""The conformance kit: what every backend of polymoe must pass.

The author of a backend runs it with

    pytest -p polymoe.testing.plugin --pyargs polymoe.testing --polymoe-backend NAME

and may use the parts: tolerances derived from the arithmetic, case generators, poisoned memory, and the checks of every
op against float64 in polymoe.testing.conformance.
"""
