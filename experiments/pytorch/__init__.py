"""The experiments written in PyTorch, and what compares them."""
