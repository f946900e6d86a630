"""Studies: designs trained and evaluated alike, compared, and reported."""
