"""Short documents of several lengths, for tokenizers and blocks."""

TEXTS = [f"document {n}: " + "lorem ipsum dolor sit amet " * (n % 5 + 1) for n in range(40)]
