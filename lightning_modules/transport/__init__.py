"""Mass-preserving maps between a brain and a cube, and what is written with them."""
