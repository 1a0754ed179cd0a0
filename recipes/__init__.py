"""YAML recipes that ship with the package; see `tokdyn recipes ls`."""
