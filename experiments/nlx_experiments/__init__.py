"""nlx experiments."""
