"""Linear acquisition operators and their adjoints."""
