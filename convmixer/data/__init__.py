"""Everything that opens pictures."""
