"""Adapters to other libraries. Each is imported by name and imports its library; polymoe itself needs none of them."""
