"""Model cards: their text, their figures and what is measured for them."""
