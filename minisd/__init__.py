"""minisd: Stable Diffusion customising in plain PyTorch, from a keyword to a style of your own."""

__version__ = "0.1.0"
