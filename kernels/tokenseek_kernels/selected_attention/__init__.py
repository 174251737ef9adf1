from .function import causal_attention, selected_attention

__all__ = ["causal_attention", "selected_attention"]
