"""PINQI: physics-informed learned quantitative maps (Zimmermann et al., doi:10.1109/TCI.2024.3388869)."""
