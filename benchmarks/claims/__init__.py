"""One file per system: its paper's relative claim, re-measured. `make claims` runs them."""
