from .function import attention_mass

__all__ = ["attention_mass"]
