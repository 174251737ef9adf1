from .function import join_rows, split_rows

__all__ = ["join_rows", "split_rows"]
