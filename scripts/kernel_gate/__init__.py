"""Compiles every Triton kernel for every target without a GPU, and holds the result against limits and budgets."""
