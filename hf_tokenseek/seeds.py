"""Seeds for what is random and has to be the same again after a resume, and on every rank."""


def mixed_seed(*parts: int) -> int:
    """One seed from several integers; different parts give unrelated streams."""
    seed = 0x9E3779B97F4A7C15
    for part in parts:
        seed = (seed ^ part) * 0xBF58476D1CE4E5B9 % 2**63
        seed ^= seed >> 31
    return seed
