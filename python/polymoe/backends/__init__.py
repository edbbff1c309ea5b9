"""The built-in backends. Thin: which op maps to which kernel, and what is supported."""
