"""What models cost, and what they have learned."""
