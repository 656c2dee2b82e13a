"""Which entities a text speaks of."""
