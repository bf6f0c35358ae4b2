"""Device-specific fast paths, each one file, chosen once with a reason that is shown to the operator.

Knows devices and measures them. Does not know models.
"""
