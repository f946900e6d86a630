"""Studies: designs trained and evaluated under equal conditions, compared, and reported."""
