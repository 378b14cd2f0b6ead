"""Claims about the method: arms that differ in one thing, trained on several seeds, tested with their controls."""
