"""What a sweep searches (a TOML file a recipe), and the sweep: Ray Tune over runs."""
