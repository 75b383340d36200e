"""What a conversion costs and gains: quality, decode speed, and the card that says so."""
