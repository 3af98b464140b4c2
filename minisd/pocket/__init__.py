"""A pocket-sized Stable Diffusion: its drawn 64x64 world, its training and its tiny weights."""
