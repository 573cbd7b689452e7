"""Digital phantoms, coils and signals with known truth."""
