"""CPU-first training of Mamba selective state-space models with a hyperspherical-prototype head."""
